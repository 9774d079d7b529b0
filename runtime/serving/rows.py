"""The rows of a batch: which images have them, and the stages that let these begin and move them on.

Where every step feeds one position, images begin so that all reach the ends of their lines at the same step: a line's end goes over all
rows, and would be run once for each of them otherwise. That takes a lone image no time, and others less than a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import decode_stage
from linert.runtime.bundles.setting import stage_inputs
from linert.runtime.drawing.conditions import Conditioner, Inputs
from linert.runtime.drawing.eviction_map import resident_shares
from linert.runtime.drawing.generator import Tokens, make_batch
from linert.runtime.drawing.loop import lay_out, not_finite, sampling_inputs
from linert.runtime.drawing.noise import noise_rows
from linert.runtime.drawing.samples import Sample
from linert.runtime.serving.handle import Admitted, Cancelled, Failed, Handle, LinesDrawn


@dataclass
class Counts:
    """What an engine has done since it was opened.

    ``admissions``: runs of the stage that lets images begin; ``steps``: of decode; ``line_ends``: of theirs. ``tokens``: drawn.
    """

    submitted: int = 0
    refused: int = 0
    admitted: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    admissions: int = 0
    steps: int = 0
    line_ends: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Beginning:
    """An image that is to have a row. ``inputs``: its condition, as of a batch of one. ``first``: the position that is fed first."""

    handle: Handle
    inputs: Inputs
    first: int


@dataclass
class Row:
    """An image in a row. ``fed``: its tokens that were fed, below 0 while its condition is. ``lines``: line ends that it had;
    ``shown``: lines that are drawn."""

    handle: Handle
    fed: int
    lines: int = 0
    shown: int = 0
    begun: float = field(default_factory=time.monotonic)


class Rows:
    """The rows of a backend's batch, in one thread; others may ask how many are :attr:`busy`.

    Args:
        images: as many as the batch has.
        counts: of what is done.
        finish: called with an image's handle and tokens when they are drawn.

    Attributes:
        taken: the image that each row has, if any.
        image_seconds: that the last image took from its beginning.
    """

    def __init__(self, images: int, counts: Counts, finish: Callable[[Handle, Tokens], None]) -> None:
        self.taken: list[Row | None] = [None] * images
        self.counts, self.finish = counts, finish
        self.image_seconds = 0.0
        self._spoiled: set[int] = set()
        self._left: set[int] = set()
        self._filtered = False

    @property
    def busy(self) -> int:
        """Rows that an image has."""
        return sum(row is not None for row in self.taken)

    def open(
        self, backend: Backend, conditioner: Conditioner, cache: CacheSettings | None, window: int
    ) -> None:
        """Lay out the state on ``backend``, and feed ``window`` positions a step from then on."""
        self.backend, self.window = backend, window
        self.manifest = manifest = backend.bundle.manifest
        self.raster = manifest.raster
        usual = [Sample(conditioner.usual()[0], 0)]
        self.batch = replace(
            make_batch(manifest, conditioner, usual, manifest.sampling, cache), window=window
        )
        self._inputs: dict[str, NDArray[np.generic]] = {
            **self.batch.conditions,
            **sampling_inputs(manifest, manifest.sampling),
            "noise": self.batch.noise,
        }
        for stage in (*(decode_stage(window, filtered=filtered) for filtered in (True, False)), "admit"):
            backend.load(stage)
        self.reset()

    def reset(self) -> None:
        """Lay out the state with every row idle: at its image's end."""
        backend, raster, manifest = self.backend, self.raster, self.manifest
        lay_out(backend, self.batch)
        sequences = manifest.images * manifest.branches
        backend.write("position", np.full(sequences, raster.prefix_len + raster.image_tokens))
        backend.write("line", np.full(sequences, raster.lines - 1))
        self._spoiled.clear()
        self._left.clear()

    def images(self) -> Iterator[tuple[int, Row]]:
        """The rows that an image has, by number."""
        for number, row in enumerate(self.taken):
            if row is not None:
                yield number, row

    def drop_cancelled(self) -> None:
        """Free the rows of images that were cancelled."""
        for number, row in list(self.images()):
            if row.handle.cancelled:
                self.taken[number] = None
                self._left.add(number)
                self.drop(row.handle)

    def drop(self, handle: Handle) -> None:
        """Tell that an image was cancelled."""
        self.counts.cancelled += 1
        handle.tell(Cancelled)

    def free(self) -> list[int]:
        """Rows that an image may have. One whose numbers are not finite is not among them before the whole state is laid out anew,
        which is done when no image has any row: what its caches hold would be no number for ever."""
        if self._left:
            # Rows of cancelled images are fed on, and nobody looked at them since.
            finite = self._finite()
            self._spoiled |= {number for number in self._left if not finite[number]}
        if self._spoiled and not self.busy:
            self.reset()
        return [n for n, row in enumerate(self.taken) if row is None and n not in self._spoiled]

    def phase(self) -> int | None:
        """Where in their lines all images are; None if there are none, or every image is where it is."""
        if self.window > 1:
            return None
        return next((row.fed % self.raster.line_width for _, row in self.images()), None)

    def begins_at(self, beginning: Beginning) -> int:
        """Where in a line an image begins, were its condition a part of it."""
        return (beginning.first - self.raster.prefix_len) % self.raster.line_width

    def begin(self, beginnings: Mapping[int, Beginning]) -> None:
        """Give rows to images, by number, and lay them out."""
        backend = self.backend
        for number, beginning in beginnings.items():
            handle = beginning.handle
            # They have their rows before anything can fail: whatever fails is told to all who have one.
            self.taken[number] = Row(handle, beginning.first - self.raster.prefix_len)
            self._left.discard(number)
            mine = {
                **{name: values[0] for name, values in beginning.inputs.items()},
                **stage_inputs(handle.sampling, self.raster),
                "noise": noise_rows(handle.sample.seed, *self.batch.noise.shape[1:]),
            }
            for name, value in mine.items():
                self._inputs[name][number] = value
        for name, array in self._inputs.items():
            backend.write(name, array)
        backend.write("admitted", np.array([n in beginnings for n in range(len(self.taken))], np.int64))
        backend.run("admit")
        self.counts.admissions += 1
        self.counts.admitted += len(beginnings)
        for beginning in beginnings.values():
            beginning.handle.tell(Admitted)
        self._filtered = any(row.handle.sampling.filtered for _, row in self.images())

    def advance(self, most: int, interrupted: Callable[[], bool]) -> None:
        """Run decode steps until an image reaches the end of its line, at most so many, and no more once ``interrupted``; then end the
        lines that are due."""
        busy = dict(self.images())
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
            self._show({number: busy[number] for number in lines})
        self._end_lines()

    def _finite(self) -> NDArray[np.bool_]:
        """Of which images ``[I]`` the last logits are finite."""
        manifest = self.manifest
        logits = self.backend.read("logits").reshape(manifest.branches, manifest.images, -1)
        return np.asarray(np.isfinite(logits).all((0, 2)))

    def _show(self, rows: Mapping[int, Row]) -> None:
        """Look at images that have drawn a line: whether their numbers are finite, and whether they are done."""
        whole = self.raster.lines
        finite = self._finite()
        told = any(row.handle.lines or row.shown == whole for row in rows.values())
        tokens = cast("Tokens", self.backend.read("tokens")).clip(min=0) if told else None
        for number, row in rows.items():
            handle = row.handle
            if not finite[number]:
                self.taken[number] = None
                self._spoiled.add(number)
                self.counts.failed += 1
                where = f"line {row.shown} of the image of {handle.sample.label}"
                handle.tell(partial(Failed, error=not_finite(self.manifest, where)))
            elif tokens is not None:
                mine = tokens[number].copy()
                if handle.lines:
                    handle.tell(partial(LinesDrawn, lines=row.shown, tokens=mine))
                if row.shown == whole:
                    self.image_seconds = time.monotonic() - row.begun
                    self.taken[number] = None
                    self.finish(handle, mine)

    def _end_lines(self) -> None:
        """End the lines of the images that have fed all of one."""
        raster = self.raster
        due = {
            number: row
            for number, row in self.images()
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
