"""``--config FILE``: defaults of a command's options, from a table of its name in a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from linert.runtime.errors import RequestError
from linert.runtime.files.text_files import read_text


def with_config(command: click.Command) -> click.Command:
    """``command`` with ``--config``. Its options stand in the file by their long names, without dashes: ``num-images = 8``, and
    switches as ``cuda-graphs = false``.

    What is given on the command line goes before what stands in the file.
    """
    if not any("--config" in parameter.opts for parameter in command.params):
        command.params.append(
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                is_eager=True,
                expose_value=False,
                callback=_set_defaults,
                help=f"Defaults of these options: the table [{command.name}] of a TOML file.",
            )
        )
    return command


def _set_defaults(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    name = ctx.info_name or ""
    try:
        tables = tomllib.loads(read_text(path, RequestError))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is no TOML file: {error}") from error
    values = tables.get(name, {})
    if not isinstance(values, dict):
        raise RequestError(f"{path}: {name} must be a table: [{name}]")
    known = {
        option.removeprefix("--"): parameter
        for parameter in ctx.command.params
        if isinstance(parameter, click.Option) and not parameter.is_eager
        for option in parameter.opts
        if option.startswith("--")
    }
    if strange := sorted(set(values) - set(known)):
        raise RequestError(
            f"{path}: linert {name} has no option {', '.join(strange)}; it has {', '.join(sorted(known))}"
        )
    ctx.default_map = {known[option].name: _value(known[option], value) for option, value in values.items()}


def _value(option: click.Option, value: Any) -> Any:
    """What click takes for the value of an option: text, so that it is checked as on the command line, or a flag."""
    if option.is_flag:
        return value
    if option.multiple:
        return [_text(part) for part in (value if isinstance(value, list) else [value])]
    return _text(value)


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
