"""The raster and the line buffer: sizes, budgets and what is protected. Plain numbers, no tensors.

A line buffer has ``prefix_len + budget_lines * line_width`` slots a layer, the line in progress included. Kept
always: the prefix, the first ``anchor_tokens`` image tokens and the last ``recent_lines`` lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import msgspec

from runtime.errors import GeometryError


class Mode(StrEnum):
    """What happens to a slot that was chosen: ``strict`` empties it at once (the semantics of LineAR), ``lazy``
    leaves it visible until it is overwritten."""

    STRICT = "strict"
    LAZY = "lazy"


class Step(NamedTuple):
    """One entry of the raster schedule: run ``stage`` in ``line``; ``column`` counts the line's decode steps."""

    stage: str
    line: int
    column: int


class Raster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The image as the transformer sees it: ``lines`` of ``line_width`` tokens behind ``prefix_len`` positions."""

    prefix_len: int
    line_width: int
    lines: int

    @property
    def image_tokens(self) -> int:
        return self.lines * self.line_width

    def schedule(self) -> Iterator[Step]:
        """Every stage run after the prefill, in order. The last token of the image is never fed."""
        for line in range(self.lines):
            last = line == self.lines - 1
            for column in range(self.line_width - last):
                yield Step("decode", line, column)
            if not last:
                yield Step("line_end", line, self.line_width)


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the cache keeps. ``budget_lines`` counts the line in progress."""

    policy: str
    mode: Mode
    budget_lines: int
    recent_lines: int
    anchor_tokens: int

    def capacity(self, raster: Raster) -> int:
        """Slots of a layer."""
        return raster.prefix_len + self.budget_lines * raster.line_width

    def check(self, raster: Raster) -> None:
        """Raise :class:`GeometryError` naming every setting that does not fit ``raster``."""
        faults = [
            f"{name} is {value}, must be at least {least}"
            for name, value, least in (
                ("budget_lines", self.budget_lines, 1),
                ("recent_lines", self.recent_lines, 0),
                ("anchor_tokens", self.anchor_tokens, 0),
            )
            if value < least
        ]
        if self.budget_lines > raster.lines:
            faults.append(f"budget_lines {self.budget_lines} is above the image's {raster.lines} lines")
        elif self.policy == "full" and self.budget_lines != raster.lines:
            faults.append(
                f"the full policy evicts nothing: budget_lines must be {raster.lines}, not {self.budget_lines}"
            )
        elif not faults and self.budget_lines < raster.lines:
            width = raster.line_width
            needed = self.anchor_tokens + (self.recent_lines + 1) * width
            if self.budget_lines * width < needed:
                lines = -(-needed // width)
                faults.append(
                    f"a budget of {self.budget_lines} lines ({self.budget_lines * width} tokens) cannot hold "
                    f"{self.anchor_tokens} anchor tokens, {self.recent_lines} recent lines and the line in "
                    f"progress ({needed} tokens): give at least {lines} lines, or protect less"
                )
        if faults:
            raise GeometryError("cache settings: " + "; ".join(faults))
