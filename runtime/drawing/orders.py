"""The orders in which images that are drawn in groups come to be, made as LPD's authors make theirs (arXiv 2507.01957).

A group is drawn at once, so its tokens should know much of what is there and little of one another: they are taken close to what is finished
and apart from each other. An order belongs to a seed, like the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from linert.runtime.errors import RequestError
from linert.runtime.files.text_files import read_content
from linert.runtime.text import brief

Cells = NDArray[np.int64]

PROXIMITY = 1.0
"""Score from which on a cell is close to what is finished: one cell straight beside it is enough."""

STREAM = 1
"""Second word of the key of the random numbers that orders are made of; the noise has 0 there."""

NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column]


MOST_BYTES = 1 << 30
"""Of a file of orders; the largest that are published have 300 MB."""


def read_orders(path: Path, images: int, cells: int) -> NDArray[np.int64]:
    """The first orders of a file, a JSON list of lists of cells: ``[images, cells]`` int64.

    Raises:
        RequestError: it cannot be read, is something else, holds fewer, or an order of another image than one of so many ``cells``.
    """
    content = read_content(path, MOST_BYTES, RequestError)
    try:
        # Those that are not needed stay text.
        listed = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no list of orders: {brief(str(error))}") from error
    if len(listed) < images:
        raise RequestError(f"{path} holds {len(listed)} orders, for {images} images")
    orders = np.empty((images, cells), np.int64)
    for number, text in enumerate(listed[:images]):
        try:
            order = msgspec.json.decode(text, type=list[int])
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: order {number} is no list of cells: {brief(str(error))}") from error
        orders[number] = checked_order(order, cells, f"{path}: order {number}")
    return orders


def checked_order(order: Sequence[int] | Cells, cells: int, name: str) -> Cells:
    """``order`` as ``[cells]`` int64.

    Args:
        name: what an error calls it.

    Raises:
        RequestError: it does not hold each of so many ``cells`` once.
    """
    values = np.asarray(order)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RequestError(f"{name} is no list of cells: they are numbered from 0 to {cells - 1}")
    if len(values) != cells:
        raise RequestError(f"{name} has {len(values)} cells; images have {cells}")
    if sorted(values.tolist()) != list(range(cells)):
        raise RequestError(f"{name} does not hold every cell from 0 to {cells - 1} once")
    return values.astype(np.int64)


class Randomness(NamedTuple):
    """What an order leaves to chance: a ``first`` cell, and how the free cells are ``shuffled`` before each further group."""

    first: int
    shuffled: Callable[[Cells], Cells]


def order_of(seed: int, grid: int, sizes: Sequence[int], repulsion: float) -> Cells:
    """The order of the image with this ``seed``: the cell of the token of every rank, ``[grid x grid]`` int64.

    Args:
        grid: cells of a line.
        sizes: of the groups; they sum to grid x grid.
        repulsion: as in :func:`generation_order`.
    """
    stream = np.random.Philox(key=np.array([seed, STREAM], np.uint64))

    def shuffled(cells: Cells) -> Cells:
        return cells[np.argsort(stream.random_raw(len(cells)), kind="stable")]

    every = np.arange(grid * grid)
    return generation_order(grid, sizes, repulsion, Randomness(int(shuffled(every)[0]), shuffled))


def generation_order(grid: int, sizes: Sequence[int], repulsion: float, randomness: Randomness) -> Cells:
    """Make an order.

    The free cells are ranked by how close they are to finished ones: 1 for each straight beside, and 0.71 for each across a corner.
    From the best down a cell is taken that has a score of at least :data:`PROXIMITY` and lies farther than ``repulsion``, in rows or
    columns, from all of the group; a group that is still short takes of the others, each time the one whose nearest of the
    group is farthest.
    """
    scores = np.zeros((grid + 2, grid + 2))
    order: list[int] = []
    for number, size in enumerate(sizes):
        if number == 0:
            group = [randomness.first]
            if size > 1:
                free = np.setdiff1d(np.arange(grid * grid), group)
                group += _farthest(randomness.shuffled(free), group, size - 1, grid)
        else:
            free = randomness.shuffled(np.setdiff1d(np.arange(grid * grid), order))
            closeness = scores[1 + free // grid, 1 + free % grid]
            ranked = np.argsort(-closeness, kind="stable")
            group = _next_group(free[ranked], closeness[ranked] >= PROXIMITY, size, grid, repulsion)
        for cell in group:
            for row, column in NEIGHBOURS:
                # Added up one by one: sums that differ in their last digit decide between cells.
                scores[1 + cell // grid + row, 1 + cell % grid + column] += 1.0 / np.hypot(row, column)
        order += group
    return np.array(order, np.int64)


def _next_group(ranked: Cells, close: NDArray[np.bool_], size: int, grid: int, repulsion: float) -> list[int]:
    """``size`` of the free cells ``ranked``, of which ``close`` ones come first."""
    group: list[int] = []
    avoided = np.zeros((grid, grid), bool)
    rejected: list[int] = []
    reach = int(repulsion)
    for cell in ranked[close].tolist():
        if len(group) == size:
            break
        row, column = divmod(cell, grid)
        if avoided[row, column]:
            rejected.append(cell)
            continue
        group.append(cell)
        avoided[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = True
    if len(group) < size:
        pool = np.array([*ranked[~close].tolist(), *rejected], np.int64)
        group += _farthest(pool, group, size - len(group), grid)
    return group


def _farthest(pool: Cells, group: Sequence[int], wanted: int, grid: int) -> list[int]:
    """``wanted`` cells of ``pool``, one after the other that whose nearest of ``group`` and of those before is farthest; of equals the first."""
    if len(pool) <= wanted:
        return [int(cell) for cell in pool]
    places = np.stack([pool // grid, pool % grid], axis=1)

    def distances(cell: int) -> NDArray[np.int64]:
        return np.asarray(((places - divmod(cell, grid)) ** 2).sum(1))

    nearest = np.full(len(pool), np.iinfo(np.int64).max)
    for cell in group:
        nearest = np.minimum(nearest, distances(cell))
    taken: list[int] = []
    for _ in range(wanted):
        best = int(nearest.argmax())
        taken.append(int(pool[best]))
        nearest = np.minimum(nearest, distances(taken[-1]))
        # It is 0 from itself, as no other is.
        nearest[best] = -1
    return taken
