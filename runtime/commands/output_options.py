"""The options by which commands choose what they print: notes go to standard error, results to standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console

from linert.runtime.commands.option_group import Decorator, option_group


@dataclass(frozen=True)
class Output:
    """What a command prints. ``quiet``: nothing but errors. ``as_json``: one JSON object as the result."""

    quiet: bool = False
    as_json: bool = False

    def notes(self) -> Console:
        """Where notes and progress go: standard error."""
        return Console(stderr=True, highlight=False, quiet=self.quiet)

    @property
    def tables(self) -> bool:
        """Whether results are printed for people."""
        return not (self.quiet or self.as_json)

    def result(self, values: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print ``values`` as JSON where that was asked for, else the ``lines`` for people."""
        if self.as_json:
            click.echo(json.dumps(values))
        elif self.tables:
            for line in lines:
                click.echo(line)


def output_options() -> Decorator:
    """Give a command ``--quiet`` and ``--json``; it gets them as one ``output``, an :class:`Output`."""
    listed = [
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
    ]
    return option_group("output", listed, ("quiet", "as_json"), Output)
