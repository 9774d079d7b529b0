"""The rows of a batch whose images are drawn in groups.

A step computes as many tokens of every row as the widest group in it has, whose groups are narrow at first. So images begin together, when
no row has one: those that begin in between would take, and cost the others, the time of the widest groups from the first on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.schedule import Groups, GroupStep
from linert.runtime.drawing.generator import Tokens
from linert.runtime.serving.rows import Beginning, Row, Rows


@dataclass
class GroupRow(Row):
    """``steps``: of the image."""

    steps: tuple[GroupStep, ...] = ()

    @property
    def step(self) -> GroupStep:
        """The next one."""
        return self.steps[self.shown]


class GroupRows(Rows):
    """Rows of images that are drawn in groups."""

    _logits: str | None = None

    @property
    def groups(self) -> Groups:
        return cast("Groups", self.manifest.groups)

    def reset(self) -> None:
        super().reset()
        self._logits = None

    def stages(self) -> Iterator[str]:
        for width in self.groups.widths:
            yield from (width.stage(filtered=filtered) for filtered in (True, False))

    def row_of(self, beginning: Beginning) -> Row:
        groups, sampling = self.groups, beginning.handle.sampling
        return GroupRow(beginning.handle, steps=tuple(groups.steps(groups.sizes_in(sampling.steps))))

    def wait(self, beginning: Beginning, chosen: Collection[Beginning]) -> int:
        return max((len(row.steps) - row.shown for _, row in self.group_rows()), default=0)

    def group_rows(self) -> Iterator[tuple[int, GroupRow]]:
        """:meth:`images`."""
        return cast("Iterator[tuple[int, GroupRow]]", self.images())

    def logits(self) -> NDArray[np.float32] | None:
        return None if self._logits is None else cast("NDArray[np.float32]", self.backend.read(self._logits))

    def drawn(self, row: Row, tokens: Tokens) -> NDArray[np.bool_]:
        return tokens >= 0

    def part(self, row: Row) -> str:
        return f"group {row.shown}"

    def advance(self, most: int, interrupted: Callable[[], bool]) -> None:
        """Draw the next groups of all images, at most so many, and no more once ``interrupted``."""
        for number in range(most):
            busy = dict(self.group_rows())
            if not busy or (number and interrupted()):
                return
            steps = {row: each.step for row, each in busy.items()}
            sizes = [steps[row].drawn if row in steps else 0 for row in range(len(self.taken))]
            width = self.groups.width(max(step.fed for step in steps.values()), max(sizes))
            self.backend.write("group_size", np.array(sizes))
            self.backend.run(width.stage(filtered=self._filtered))
            self._logits = width.logits
            self.counts.steps += 1
            self.counts.tokens += sum(sizes)
            for row in busy.values():
                row.shown += 1
            self.show(busy)
