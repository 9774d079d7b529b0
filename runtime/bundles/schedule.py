"""The order in which the tokens of an image are drawn: line by line, or in groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from linert.runtime.errors import RequestError


class GroupWidth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a decode stage of groups takes: ``fed`` tokens of the group before, and ``drawn`` tokens of its own, at most."""

    fed: int
    drawn: int

    def stage(self, *, filtered: bool) -> str:
        """The name of the stage, with or without top-k and top-p."""
        name = f"decode.g{self.fed}x{self.drawn}"
        return name if filtered else f"{name}.unfiltered"

    @property
    def logits(self) -> str:
        """The output of the stage that holds the logits of the group, ``[B, drawn, V]``."""
        return f"logits.{self.drawn}"

    def fits(self, fed: int, drawn: int) -> bool:
        return fed <= self.fed and drawn <= self.drawn


class Lines(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="lines"):
    """An image is drawn in raster order. ``windows``: positions that a decode step may take, 1 among them."""

    windows: tuple[int, ...] = (1,)


class GroupStep(NamedTuple):
    """One decode step: ``fed`` tokens, ``drawn`` tokens, by a stage of that ``width``."""

    fed: int
    drawn: int
    width: GroupWidth


class Groups(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="groups"):
    """An image is drawn in groups of tokens, in an order of its own.

    ``sizes``: of the groups, a list for every number of steps that images may be drawn in, the usual first. ``widths``: of the decode
    stages. ``repulsion``: tokens of a group that lie no farther apart are avoided where orders are made
    (:mod:`linert.runtime.drawing.orders`).
    """

    sizes: tuple[tuple[int, ...], ...]
    widths: tuple[GroupWidth, ...]
    repulsion: float

    @property
    def slots(self) -> int:
        """Slots of a layer's cache: of the condition, and of every token that is ever fed, in steps of whatever width."""
        # The condition is fed first; what is fed last follows all tokens but those of the last two groups.
        last = max(1 + sum(sizes[:-2]) if len(sizes) > 1 else 0 for sizes in self.sizes)
        return last + max(width.fed for width in self.widths)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps that images may be drawn in."""
        return tuple(map(len, self.sizes))

    def sizes_in(self, steps: int) -> tuple[int, ...]:
        """Sizes of the groups of an image that is drawn in so many steps; 0 is the usual number.

        Raises:
            RequestError: there is no list of so many.
        """
        found = [sizes for sizes in self.sizes if steps in (0, len(sizes))]
        if not found:
            counts = ", ".join(map(str, self.counts))
            raise RequestError(
                f"the bundle draws no image in {steps} steps, only in {counts}: export it with a "
                "list of so many groups too, by --steps or --group-sizes"
            )
        return found[0]

    def steps(self, sizes: Sequence[int]) -> Iterator[GroupStep]:
        """The decode steps of an image whose groups have these sizes."""
        for fed, drawn in pairs(sizes):
            yield GroupStep(fed, drawn, self.width(fed, drawn))

    def width(self, fed: int, drawn: int) -> GroupWidth:
        """The narrowest that takes so many.

        Raises:
            LookupError: none does.
        """
        fitting = [width for width in self.widths if width.fits(fed, drawn)]
        if not fitting:
            raise LookupError(f"no decode stage takes {fed} tokens and draws {drawn}")
        return min(fitting, key=lambda width: width.fed + width.drawn)


def pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Of every group the tokens that are fed before, which are the group before or the condition, and its own."""
    return list(zip((1, *sizes), sizes, strict=False))


def mixed_pairs(lists: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    """What steps take of images that begin together, each in groups of any of the ``lists``: the tokens that are fed may be most in one image,
    and those that are drawn in another."""
    together = itertools.zip_longest(*map(pairs, lists), fillvalue=(0, 0))
    return {(fed, drawn) for step in together for fed, _ in step for _, drawn in step if fed and drawn}


Schedule = Lines | Groups
