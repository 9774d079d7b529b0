"""The raster: the image as the transformer sees it, and the order in which a loop walks through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec


class Step(NamedTuple):
    """One entry of the raster schedule: run ``stage`` in ``line``; ``column`` counts the line's decode steps."""

    stage: str
    line: int
    column: int


class Raster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The image as the transformer sees it: ``lines`` of ``line_width`` tokens behind ``prefix_len`` positions.

    ``newlines``: tokens at the end of a line that are no part of the picture, 0 or 1.
    """

    prefix_len: int
    line_width: int
    lines: int
    newlines: int = 0

    @property
    def columns(self) -> int:
        """Tokens of a line that are part of the picture."""
        return self.line_width - self.newlines

    @property
    def image_tokens(self) -> int:
        return self.lines * self.line_width

    def size(self, patch: int) -> str:
        """Width and height in pixels, as in ``512x768``, where a token has ``patch`` on a side."""
        return f"{self.columns * patch}x{self.lines * patch}"

    def slots(self, lines: int) -> int:
        """Slots of a layer whose buffer holds ``lines``."""
        return self.prefix_len + lines * self.line_width

    def schedule(self) -> Iterator[Step]:
        """Every stage run after the prefill, in order. The last token of the image is never fed."""
        for line in range(self.lines):
            last = line == self.lines - 1
            for column in range(self.line_width - last):
                yield Step("decode", line, column)
            if not last:
                yield Step("line_end", line, self.line_width)


def recent_tokens(raster: Raster, recent_lines: float) -> int:
    """Whole tokens of ``recent_lines``."""
    return math.floor(recent_lines * raster.line_width + 1e-9)
