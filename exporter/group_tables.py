"""How many tokens each decode step of an LPD draws: the published tables, and the few widths of stages that serve them.

The tables are data; no rule that is known makes all of them. They are those of LPD's repository, for images of 16 x 16 and 32 x 32 tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from linert.runtime.bundles.schedule import GroupWidth, mixed_pairs, pairs

TABLES = {
    16: """
        1 15 24 32 40 45 49 50
        1 7 11 15 19 22 25 28 30 32 33*2
        1 4 6 8 11 13 15 17 19 20 22 23 24*3 25
        1 2 4 5 7 8 10 11 12 14 15 16 17 18*2 19*2 20*3
        1 2 3 4 5 6 7 8 9 10 11*2 12 13 14*3 15*2 16*3 17*2
        1*2 2*2 3*2 4 5*2 6*2 7*2 8*2 9*2 10*3 11*4 12*8
        1*10 2*7 3*7 4*9 5*11 6*20
        1*41 2*46 3*41
        1*256
    """,
    32: """
        1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48*2 49*2 50*3
        1 2 4 6 7 9 10 12 13 15 16 18 19 20 22 23 24 26 27 28 29 30 31 32 33 34 35*2 36 37*2 38*2 39*3 40*4
        1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23*2 24 25 26*2 27 28*2 29*2 30*2 31*2 32*3 \
        33*7 34
        1*2 2 3 4*2 5 6 7 8*2 9 10 11*2 12 13 14*2 15 16*2 17 18*2 19*2 20 21*2 22*2 23*2 24*2 25*3 26*3 \
        27*5 28*6 29*3
        1*2 2*2 3*2 4 5*2 6*2 7 8*2 9*2 10*2 11 12*2 13*2 14*2 15*2 16*2 17*2 18*3 19*2 20*3 21*3 22*3 23*5 \
        24*6 25*8
        1*4 2*2 3*3 4*2 5*3 6*3 7*2 8*3 9*3 10*3 11*3 12*3 13*3 14*4 15*4 16*4 17*6 18*6 19*7 20*12
        1*5 2*4 3*4 4*4 5*3 6*4 7*4 8*5 9*4 10*4 11*6 12*5 13*6 14*7 15*8 16*13 17*10
        1*10 2*6 3*7 4*7 5*7 6*7 7*8 8*9 9*9 10*11 11*14 12*26 13*7
        1*15 2*11 3*10 4*12 5*12 6*13 7*14 8*17 9*23 10*33
        1*22 2*15 3*16 4*16 5*19 6*21 7*27 8*55 10
        1*32 2*21 3*21 4*24 5*27 6*37 7*62
        1*39 2*28 3*31 4*34 5*44 6*80
        1*162 2*188 3*162
        1*1024
    """,
}
"""By the tokens of a line: a list of group sizes a line, ``size*times`` of sizes that follow each other."""

USUAL_STEPS = {16: 20, 32: 48}
"""Steps of the published results, by the tokens of a line."""

USUAL_REPULSION = {16: 2.0, 32: 4.0}
"""Distance within which tokens of a group are avoided in the published orders, likewise."""

MOST_PADDING = 0.15
"""Share of rows that are filled up, for which one more width is not worth its stages: ONNX Runtime holds the weights once for each of these
on the CPU, in the order in which products of several rows read them."""

MOST_WIDTHS = 8


def group_sizes(grid: int) -> dict[int, tuple[int, ...]]:
    """The published lists of group sizes for images of ``grid`` x ``grid`` tokens, by their number of steps."""
    tables = {}
    for line in TABLES.get(grid, "").strip().splitlines():
        runs = [part.split("*") for part in line.split()]
        sizes = [int(size) for size, *times in runs for _ in range(int(times[0]) if times else 1)]
        tables[len(sizes)] = tuple(sizes)
    return tables


def stage_widths(lists: Sequence[Sequence[int]], most: int = MOST_WIDTHS) -> tuple[GroupWidth, ...]:
    """At most so many widths of the decode stages for images whose groups have the sizes of any of ``lists``.

    As few as leave at most :data:`MOST_PADDING` of the rows to be filled up, where all lists are drawn equally often; with
    the ``most`` whatever is left. Images of several lists may share a batch: where no width takes what a step of them needs, the last
    is made to take everything.
    """
    steps = Counter(pair for sizes in lists for pair in pairs(sizes))
    kinds = sorted(steps, key=lambda pair: (max(pair), pair))
    rows = sum(sum(pair) * count for pair, count in steps.items())

    def cover(first: int, end: int) -> tuple[int, GroupWidth]:
        """The rows that one stage computes for ``kinds[first:end]``, and its width."""
        covered = kinds[first:end]
        width = GroupWidth(max(fed for fed, _ in covered), max(drawn for _, drawn in covered))
        return (width.fed + width.drawn) * sum(steps[pair] for pair in covered), width

    # best[end]: the fewest rows for kinds[:end] with as many widths as rounds were done.
    best: list[tuple[int, tuple[GroupWidth, ...]] | None] = [(0, ()), *([None] * len(kinds))]
    for _ in range(min(most, len(kinds))):
        following: list[tuple[int, tuple[GroupWidth, ...]] | None] = [None] * (len(kinds) + 1)
        for first, end in itertools.combinations(range(len(kinds) + 1), 2):
            if (before := best[first]) is not None:
                more, width = cover(first, end)
                now = (before[0] + more, (*before[1], width))
                if following[end] is None or now[0] < following[end][0]:
                    following[end] = now
        best = following
        found = best[-1]
        if found is not None and found[0] <= rows * (1 + MOST_PADDING):
            break
    if (found := best[-1]) is None:
        raise ValueError("no groups")
    *narrow, last = found[1]
    mixed = mixed_pairs(lists)
    if not all(any(width.fits(*pair) for width in found[1]) for pair in mixed):
        last = GroupWidth(max(fed for fed, _ in mixed), max(drawn for _, drawn in mixed))
    return (*narrow, last)
