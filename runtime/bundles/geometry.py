"""The raster and the line buffer: sizes, budgets and what is protected. Plain numbers, no tensors.

A layer's line buffer has ``prefix_len + lines * line_width`` slots. A run uses a budget of them, the line in
progress included. Kept always: the prefix, the first ``anchor_tokens`` image tokens and the last ``recent_lines`` lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from linert.runtime.errors import GeometryError
from linert.runtime.text import lines_text

FULL = "full"
"""The policy that evicts nothing: its budget is the whole image."""


class Mode(StrEnum):
    """What happens to a slot that was chosen: ``strict`` empties it at once (the semantics of LineAR), ``lazy``
    leaves it visible until it is overwritten."""

    STRICT = "strict"
    LAZY = "lazy"


class Aggregation(StrEnum):
    """How a slot's score sums up the attention that many queries paid it: the ``mean`` (for the policies that go on
    from line to line, the sum), or the ``max``."""

    MEAN = "mean"
    MAX = "max"


class HeadScores(StrEnum):
    """Whether every KV head evicts by its ``own`` scores, or all of a sequence by the ``averaged`` ones."""

    OWN = "own"
    AVERAGED = "averaged"


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


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the cache keeps.

    ``budget_lines``: lines of each layer, the one in progress counted. ``recent_lines``: newest lines that stay, cut to
    whole tokens. ``share_guidance``: the conditional and the
    unconditional row of an image evict alike.
    """

    policy: str
    mode: Mode
    budget_lines: tuple[int, ...]
    recent_lines: float
    anchor_tokens: int
    aggregation: Aggregation
    head_scores: HeadScores
    share_guidance: bool

    @property
    def evicts(self) -> bool:
        """Whether anything ever leaves the cache."""
        return self.policy != FULL

    def capacity(self, raster: Raster) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(raster.slots(lines) for lines in self.budget_lines)

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [f"{self.policy} ({self.mode})", f"{lines_text(self.budget_lines)} lines"]
        if self.evicts:
            parts += [f"{self.recent_lines:g} recent lines", f"{self.anchor_tokens} anchor tokens"]
            parts += ["max attention"] * (self.aggregation is Aggregation.MAX)
            parts += ["heads averaged"] * (self.head_scores is HeadScores.AVERAGED)
            parts += ["guidance shared"] * self.share_guidance
        return ", ".join(parts)

    def check(self, raster: Raster, capacity_lines: Sequence[int]) -> None:
        """Raise :class:`GeometryError` naming every setting that does not fit.

        Args:
            raster: the image.
            capacity_lines: lines of each layer's buffer.
        """
        faults = [
            f"{name} is {value}, must be at least {least}"
            for name, value, least in (
                ("budget_lines", min(self.budget_lines, default=0), 1),
                ("recent_lines", self.recent_lines, 0),
                ("anchor_tokens", self.anchor_tokens, 0),
            )
            # What is no number is not below it either.
            if not value >= least or value == math.inf
        ]
        if len(self.budget_lines) != len(capacity_lines):
            faults.append(f"budgets for {len(self.budget_lines)} layers; the model has {len(capacity_lines)}")
        elif not faults:
            faults += self._budget_faults(raster, capacity_lines)
        if faults:
            raise GeometryError("cache settings: " + "; ".join(faults))

    def _budget_faults(self, raster: Raster, capacity_lines: Sequence[int]) -> list[str]:
        least, most = min(self.budget_lines), max(self.budget_lines)
        if most > raster.lines:
            return [f"a budget of {most} lines is above the image's {raster.lines} lines"]
        over = [
            (layer, budget, held)
            for layer, (budget, held) in enumerate(zip(self.budget_lines, capacity_lines, strict=True))
            if budget > held
        ]
        if over:
            layer, budget, held = over[0]
            return [
                f"a budget of {budget} lines is above the {held} that the bundle's buffer has in layer {layer}: "
                f"export with --capacity-lines {budget}"
            ]
        if not self.evicts:
            if least != raster.lines:
                return [f"the full policy evicts nothing: its budget is {raster.lines} lines, not {least}"]
            return []
        needed = least_budget(raster, self.recent_lines, self.anchor_tokens)
        if least < min(needed, raster.lines):
            width = raster.line_width
            return [
                f"a budget of {least} lines ({least * width} tokens) cannot hold {self.anchor_tokens} anchor "
                f"tokens, {self.recent_lines:g} recent lines and the line in progress: give at least {needed} "
                "lines, or protect less"
            ]
        return []


def cache_text(cache: CacheSettings | None) -> str:
    """One line for people, of a model that need not have a cache."""
    return cache.text if cache else "none: what the model remembers is of one size"


def recent_tokens(raster: Raster, recent_lines: float) -> int:
    """Whole tokens of ``recent_lines``."""
    return math.floor(recent_lines * raster.line_width + 1e-9)


def least_budget(raster: Raster, recent_lines: float, anchor_tokens: int) -> int:
    """Lines that hold what is protected and the line in progress."""
    protected = recent_tokens(raster, recent_lines) + anchor_tokens
    return 1 + math.ceil(protected / raster.line_width)


def pyramid(mean: int, layers: int, least: int, most: int) -> tuple[int, ...]:
    """Lines of each layer, falling from the first to the last with the given mean (PyramidKV, arXiv 2406.02069).

    The published arithmetic progression, from ``2 mean - mean / 20`` down to ``mean / 20``, cut to whole lines
    between ``least`` and ``most``. Rounding and cutting are made good so that the sum stays ``mean * layers``.

    Raises:
        GeometryError: ``mean`` is not between ``least`` and ``most``.
    """
    if not least <= mean <= most:
        raise GeometryError(f"a pyramid of mean {mean} lines does not fit between {least} and {most} lines")
    if layers == 1:
        return (mean,)
    low = mean / 20
    high = 2 * mean - low
    ideal = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    # A common shift makes up for what the cut takes away; the sum grows with it.
    shifts = [-high, float(most)]
    for _ in range(60):
        middle = sum(shifts) / 2
        total = sum(min(max(value + middle, least), most) for value in ideal)
        shifts[total > mean * layers] = middle
    cut = [min(max(value + shifts[0], least), most) for value in ideal]
    lines = [math.floor(value + 1e-9) for value in cut]
    missing = mean * layers - sum(lines)
    by_remainder = sorted(range(layers), key=lambda layer: (lines[layer] - cut[layer], layer))
    for layer in by_remainder[:missing]:
        lines[layer] += 1
    return tuple(lines)
