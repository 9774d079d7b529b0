"""The bundle that a command works on, and which of its image sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click

from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.drawing.samples import shortened


@dataclass(frozen=True)
class BundlePlace:
    """A bundle as it was asked for; ``size`` None is the first that was exported."""

    path: Path
    size: str | None = None

    def open(self, *, digests: bool = True) -> Bundle:
        """:func:`linert.runtime.bundles.bundle.open_bundle`."""
        return open_bundle(self.path, self.size, digests=digests)


def parse_size(text: str) -> str:
    """``768x512``: width and height in pixels."""
    if not re.fullmatch("[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", text):
        raise click.BadParameter(f"{shortened(text, 60)!r} is no size like 768x512")
    return text


def bundle_argument() -> Decorator:
    """Give a command its ``BUNDLE`` and ``--size``; it gets them as one ``place``, a :class:`BundlePlace`."""
    options = [
        click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path)),
        click.option(
            "--size",
            metavar="WIDTHxHEIGHT",
            callback=lambda c, p, text: None if text is None else parse_size(text),
            help="Size of the images, of those that the bundle draws. Default: the first that was exported.",
        ),
    ]
    return option_group("place", options, ["path", "size"], BundlePlace)
