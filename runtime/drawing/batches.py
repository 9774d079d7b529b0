"""The batches of a run: what each draws, and the files that come of it, wherever it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.eviction_map import MapKind, Residency, draw_map
from linert.runtime.drawing.generator import Generator, Replay, Tokens, picture
from linert.runtime.drawing.loop import LineEnds
from linert.runtime.drawing.orders import Cells
from linert.runtime.drawing.output import Recipe, encoded_png
from linert.runtime.drawing.samples import Sample
from linert.runtime.drawing.trace import SlotRecorder, Trace
from linert.runtime.drawing.window_choice import WindowChoice

OnLines = Callable[[int, int], None]
"""Called with a batch's number and how many of its lines, or groups, are drawn."""


@dataclass(frozen=True)
class BatchSettings:
    """What all batches of a run have in common.

    ``window``: positions of a decode step, None to measure which are quickest. ``map_kind``: of the eviction maps, None draws none.
    ``recording``: whether the slots that lines are written to are wanted.
    """

    sampling: SamplingSettings
    cache: CacheSettings | None
    window: int | None = 1
    map_kind: MapKind | None = None
    recording: bool = False


@dataclass(frozen=True)
class BatchTask:
    """One batch of a run.

    ``number``: of the batch. ``samples``: its images. ``first``: the number of the first of them in the run. ``replay``: the trace of
    these images, to be imposed. ``tokens``: ``[n, N]`` int64, if these are drawn already and only pictures are missing. ``orders``: ``[n, N]``
    int64, in which these images are drawn, if a file tells that.
    """

    number: int
    first: int
    samples: tuple[Sample, ...]
    replay: Trace | None = None
    tokens: Tokens | None = None
    orders: NDArray[np.int64] | None = None

    def order(self, number: int) -> Cells | None:
        """Of image ``number`` of the batch."""
        return None if self.orders is None else self.orders[number]


@dataclass(frozen=True)
class DrawnBatch:
    """What came of a task.

    ``tokens [n, N]`` int64. ``pictures`` and ``maps``: PNG files, one an image; no maps where none were wanted.
    ``slots [n, lines - 1, layers, branches, heads, W]`` int32, if they were.
    """

    tokens: Tokens
    pictures: Sequence[bytes]
    maps: Sequence[bytes] = ()
    slots: NDArray[np.int32] | None = None


Finished = tuple[BatchTask, DrawnBatch]


class Drawing(Protocol):
    """Where the batches of a run are drawn."""

    def draw(self, tasks: Iterable[BatchTask], on_lines: OnLines) -> Iterator[Sequence[Finished]]:
        """Draw all tasks; yields those that are finished, as they are, in whatever order."""
        ...

    def notes(self) -> list[str]:
        """What is to be told for people of how they were drawn, once they are."""
        ...

    def counts(self) -> dict[str, int]:
        """What is to be counted of who drew them."""
        ...


class BatchDrawer:
    """Draws the batches of a run with a generator of its own."""

    def __init__(self, generator: Generator, settings: BatchSettings) -> None:
        self.generator, self.settings = generator, settings
        self.window = WindowChoice(generator.manifest.windows) if settings.window is None else settings.window

    @property
    def window_text(self) -> str | None:
        """Which window was quickest, for people, if that was measured."""
        return self.window.text if isinstance(self.window, WindowChoice) else None

    def __call__(self, task: BatchTask, on_line: Callable[[int], None] | None = None) -> DrawnBatch:
        """Draw a batch, or only the pictures of tokens that are known.

        Args:
            on_line: called after each line, or group, with the number of those that are drawn.
        """
        if task.tokens is not None:
            return DrawnBatch(task.tokens, [self._picture(task, k, row) for k, row in enumerate(task.tokens)])
        manifest, settings, count = self.generator.manifest, self.settings, len(task.samples)
        residency = Residency(manifest) if settings.map_kind else None
        recorder = SlotRecorder(manifest) if settings.recording else None

        def watch(backend: Backend, ends: LineEnds) -> None:
            for watcher in (recorder, residency):
                if watcher is not None:
                    watcher(backend, ends)

        tokens = self.generator.draw(
            task.samples,
            settings.sampling,
            settings.cache,
            replay=Replay(task.replay, range(count)) if task.replay else None,
            watcher=watch,
            on_line=on_line,
            window=self.window,
            orders=None if task.orders is None else list(task.orders),
        )
        pictures, maps = [], []
        for number, row in enumerate(tokens):
            drawn, recipe = picture(self.generator.decoder(row[None])[0]), self._recipe(task, number)
            pictures.append(encoded_png(drawn, recipe))
            if settings.map_kind is not None and residency is not None:
                kept = draw_map(drawn, residency.image(number), manifest, settings.map_kind)
                maps.append(encoded_png(kept, recipe, settings.map_kind))
        slots = None if recorder is None else recorder.by_image()[:count]
        return DrawnBatch(tokens, pictures, maps, slots)

    def _picture(self, task: BatchTask, number: int, row: NDArray[np.int64]) -> bytes:
        return encoded_png(picture(self.generator.decoder(row[None])[0]), self._recipe(task, number))

    def _recipe(self, task: BatchTask, number: int) -> Recipe:
        settings, order = self.settings, task.order(number)
        return Recipe.of(
            self.generator.manifest, task.samples[number], settings.sampling, settings.cache, order
        )


class LocalDrawing:
    """Draws batches one after another, in this process.

    ``preview``: called after each line of a batch with how many images it has and how many lines are drawn.
    """

    def __init__(self, drawer: BatchDrawer, preview: Callable[[int, int], None] | None = None) -> None:
        self.drawer, self.preview = drawer, preview

    def draw(self, tasks: Iterable[BatchTask], on_lines: OnLines) -> Iterator[Sequence[Finished]]:
        for task in tasks:
            yield [(task, self.drawer(task, partial(self._line, task, on_lines)))]

    def _line(self, task: BatchTask, on_lines: OnLines, lines: int) -> None:
        on_lines(task.number, lines)
        if self.preview is not None:
            self.preview(len(task.samples), lines)

    def notes(self) -> list[str]:
        text = self.drawer.window_text
        return [] if text is None else [f"window: {text}"]

    def counts(self) -> dict[str, int]:
        return {}
