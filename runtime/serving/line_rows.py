"""The rows of a batch whose images are drawn line by line.

Where every step feeds one position, images begin so that all reach the ends of their lines at the same step: a line's end goes over all
rows, and would be run once for each of them otherwise. That takes a lone image no time, and others less than a line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.manifest import decode_stage
from linert.runtime.drawing.eviction_map import resident_shares
from linert.runtime.drawing.generator import Tokens
from linert.runtime.drawing.loop import move_noise
from linert.runtime.serving.rows import Beginning, Row, Rows


@dataclass
class LineRow(Row):
    """``fed``: tokens of the image that were fed, below 0 while its condition is. ``lines``: line ends that it had."""

    fed: int = 0
    lines: int = 0


class LineRows(Rows):
    """Rows of images that are drawn line by line."""

    def reset(self) -> None:
        """Lay out the state with every row idle: at its image's end."""
        super().reset()
        backend, raster, manifest = self.backend, self.raster, self.manifest
        sequences = manifest.images * manifest.branches
        backend.write("position", np.full(sequences, raster.prefix_len + raster.image_tokens))
        backend.write("line", np.full(sequences, raster.lines - 1))

    def stages(self) -> Iterator[str]:
        yield from (decode_stage(self.window, filtered=filtered) for filtered in (True, False))

    def row_of(self, beginning: Beginning) -> Row:
        return LineRow(beginning.handle, fed=beginning.first - self.raster.prefix_len)

    def wait(self, beginning: Beginning, chosen: Collection[Beginning]) -> int:
        if self.window > 1:
            return 0
        firsts = (each.first - self.raster.prefix_len for each in chosen)
        places = (*(row.fed for _, row in self.line_rows()), *firsts)
        # All are at one place in their lines.
        here = beginning.first - self.raster.prefix_len
        return (here - places[0]) % self.raster.line_width if places else 0

    def line_rows(self) -> Iterator[tuple[int, LineRow]]:
        """:meth:`images`."""
        return cast("Iterator[tuple[int, LineRow]]", self.images())

    def logits(self) -> NDArray[np.float32] | None:
        return cast("NDArray[np.float32]", self.backend.read("logits"))

    def drawn(self, row: Row, tokens: Tokens) -> NDArray[np.bool_]:
        return np.arange(len(tokens)) < row.shown * self.raster.line_width

    def part(self, row: Row) -> str:
        return f"line {row.shown}"

    def advance(self, most: int, interrupted: Callable[[], bool]) -> None:
        """Run decode steps until an image reaches the end of its line, at most so many, and no more once ``interrupted``; then end the
        lines that are due."""
        busy = dict(self.line_rows())
        if not busy:
            return
        raster, window = self.raster, self.window
        end = raster.image_tokens - 1
        stage = decode_stage(window, filtered=self._filtered)
        left = (min((row.lines + 1) * raster.line_width, end) - row.fed for row in busy.values())
        steps = min(-(-min(left) // window), most)
        run = 0
        while run < steps and not (run and interrupted()):
            self.backend.run(stage)
            run += 1
        self.counts.steps += run
        position = self.backend.read("position") if window > 1 else None
        lines: dict[int, int] = {}
        for number, row in busy.items():
            fed = row.fed + run if position is None else int(position[number]) - raster.prefix_len
            before, row.fed = row.fed, min(fed, end)
            # One token more is drawn than is fed.
            self.counts.tokens += max(0, row.fed + 1) - max(0, before + 1)
            drawn = max(0, row.fed + 1) // raster.line_width
            if drawn > row.shown:
                row.shown = lines[number] = drawn
        if lines:
            self.show({number: busy[number] for number in lines})
        self._end_lines()

    def _end_lines(self) -> None:
        """End the lines of the images that have fed all of one."""
        raster = self.raster
        due = {
            number: row
            for number, row in self.line_rows()
            if row.fed >= (row.lines + 1) * raster.line_width and row.lines < raster.lines - 1
        }
        if not due:
            return
        self.backend.run(self.batch.stages["line_end"])
        self.counts.line_ends += 1
        watched = any(row.handle.kept is not None for row in due.values())
        shares = resident_shares(self.backend, self.manifest) if watched else None
        for number, row in due.items():
            if row.handle.kept is not None and shares is not None:
                row.handle.kept[row.lines] = shares[number]
            row.lines += 1
        move_noise(self.backend, self.batch.noise, ((number, row.lines - 1) for number, row in due.items()))
