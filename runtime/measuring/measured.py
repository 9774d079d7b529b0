"""A bundle under measurement: one batch that can be stepped, and drawn as a whole, by the clock."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import SLOT_POSITIONS, Manifest
from linert.runtime.bundles.raster import Step
from linert.runtime.bundles.schedule import GroupStep
from linert.runtime.drawing.generator import Generator, Pixels, make_batch, picture
from linert.runtime.drawing.loop import Batch, begin, run_group, run_step
from linert.runtime.drawing.output import write_png
from linert.runtime.drawing.samples import Sample, list_samples
from linert.runtime.files.replacement import scratch_folder
from linert.runtime.machine import resident_bytes


@dataclass(frozen=True)
class Image:
    """Seconds of a whole batch of images, from the condition to PNG files, by where they went."""

    prefill: float
    decode: float
    line_ends: float
    vq_decoder: float
    png: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.line_ends + self.vq_decoder + self.png


@dataclass(frozen=True)
class Start:
    """Seconds from nothing to the first token: verifying the bundle's digests, then loading and the first step."""

    verify: float
    first_token: float


class Passes(NamedTuple):
    """How a whole batch's tokens were drawn: decode steps, the condition's among them, line ends that ran, and seconds."""

    steps: int
    line_ends: int
    seconds: float


class Measured:
    """A bundle under measurement: one batch that can be stepped, and drawn as a whole.

    Args:
        path: the bundle's folder.
        cache: policy, budget and the rest; the bundle's defaults if None.
        options: where stages run.
        size: of the images, of those that the bundle draws.
    """

    def __init__(
        self, path: Path, cache: CacheSettings | None, options: BackendOptions, size: str | None = None
    ) -> None:
        begun = time.perf_counter()
        bundle = open_bundle(path, size)
        if cache is not None:
            bundle = bundle.fitting(cache)
        verified = time.perf_counter()
        self.generator = Generator(bundle, options)
        try:
            self.samples, self.batch = self._begun(cache)
        except BaseException:
            # Gigabytes of a device would stay taken as long as somebody holds the error.
            self.generator.close()
            raise
        self.start = Start(verified - begun, time.perf_counter() - verified)
        self.resident = resident_bytes()
        self._line = 0
        self._loaded = {self.batch.decode(1)}
        self.group_ms: list[list[float]] = []
        """Milliseconds of every group of the images that :meth:`line` drew, of a bundle that draws in groups."""

    def _begun(self, cache: CacheSettings | None) -> tuple[Sequence[Sample], Batch]:
        """Samples and their batch, whose first token is drawn."""
        manifest, conditioner = self.manifest, self.generator.conditioner
        samples = list_samples(conditioner.usual(), manifest.images, seed=0)
        batch = make_batch(manifest, conditioner, samples, manifest.sampling, cache or manifest.cache)
        manifest.check_cache(batch.cache)
        begin(self.backend, batch)
        if batch.groups:
            run_group(self.backend, batch, batch.groups[0])
        self.backend.synchronize()
        return samples, batch

    @property
    def manifest(self) -> Manifest:
        return self.generator.manifest

    @property
    def backend(self) -> Backend:
        return self.generator.backend

    def line(self, window: int = 1) -> list[float]:
        """Milliseconds of the decode steps of one line, with the buffer as full as it gets.

        Args:
            window: positions of every image that a step takes; a line's worth of steps is as many as fit it if all are accepted.

        Of a bundle that draws in groups it is the mean of a whole image's steps.
        """
        if self.batch.groups:
            begin(self.backend, self.batch)
            times = [self._timed_group(step) for step in self.batch.groups]
            self.group_ms.append(times)
            return [sum(times) / len(times)]
        stage = self.batch.decode(window)
        if stage not in self._loaded:
            # What the state holds afterwards is undefined.
            self.backend.load(stage)
            self._loaded.add(stage)
            self._line = 0
        raster = self.manifest.raster
        if self._line == 0:
            self._fill()
        self._line += 1
        first = raster.prefix_len + (raster.lines - 1) * raster.line_width
        position = self.backend.specs["position"]
        self.backend.write("position", np.full(position.shape, first, np.int64))
        steps = max(1, (raster.line_width - 1) // window)
        run = partial(self.backend.run, stage)
        if not self.backend.asynchronous:
            return [milliseconds(run) for _ in range(steps)]

        def all_steps() -> None:
            for _ in range(steps):
                run()
            self.backend.synchronize()

        self.backend.synchronize()
        return [milliseconds(all_steps) / steps] * steps

    def _timed_group(self, step: GroupStep) -> float:
        self.backend.synchronize()
        return milliseconds(lambda: self._finished(lambda: run_group(self.backend, self.batch, step)))

    def line_end(self) -> float:
        """Milliseconds of one line end, which is due in every image."""
        raster = self.manifest.raster
        line = max(0, raster.lines - 2)
        for name, number in (
            ("line", line),
            ("position", raster.prefix_len + (line + 1) * raster.line_width),
        ):
            self.backend.write(name, np.full(self.backend.specs[name].shape, number, np.int64))
        self.backend.synchronize()
        return milliseconds(lambda: self._finished(lambda: self.backend.run(self.batch.stages["line_end"])))

    def vq_decode(self) -> float:
        """Milliseconds of decoding one image's pixels."""
        tokens = np.zeros((1, self.manifest.raster.image_tokens), np.int64)
        return milliseconds(lambda: self.generator.decoder(tokens))

    def image(self) -> Image:
        """Draw the whole batch."""
        spent: defaultdict[str, float] = defaultdict(float)

        def timed(name: str, action: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = self._finished(action)
            spent[name] += time.perf_counter() - start
            return result

        timed("prefill", lambda: begin(self.backend, self.batch))
        if self.batch.groups:
            timed("decode", self._run_groups)
        else:
            for stage, steps in itertools.groupby(self.manifest.raster.schedule(), lambda step: step.stage):
                timed(stage, partial(self._run_steps, list(steps)))
        tokens = self.backend.read("tokens")
        with scratch_folder() as folder:
            for index, row in enumerate(tokens):
                pixels = timed("vq_decoder", partial(self.generator.decoder, row[None]))[0]
                timed("png", partial(_write, folder / f"{index}.png", pixels))
        self._line = 0
        return Image(spent["prefill"], spent["decode"], spent["line_end"], spent["vq_decoder"], spent["png"])

    def passes(self, window: int) -> Passes:
        """Draw the whole batch by windows of so many positions."""
        stages = self.batch.decode(window), self.batch.stages["line_end"]
        before, begun = [self.backend.runs[stage] for stage in stages], time.perf_counter()
        self.generator.draw(self.samples, cache=self.batch.cache, window=window)
        seconds = time.perf_counter() - begun
        self._line = 0
        steps, line_ends = (self.backend.runs[stage] - ran for stage, ran in zip(stages, before, strict=True))
        return Passes(steps, line_ends, seconds)

    def _run_steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            run_step(self.backend, self.batch, step)

    def _run_groups(self) -> None:
        for step in self.batch.groups:
            run_group(self.backend, self.batch, step)

    def _finished(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, once everything that it asked of the backend is done."""
        result = action()
        self.backend.synchronize()
        return result

    def _fill(self) -> None:
        """Let every slot hold a position."""
        begin(self.backend, self.batch)
        fill_slots(self.backend)


def fill_slots(backend: Backend) -> None:
    """Let every slot of the line buffer hold a position, so that attention reads all of it."""
    for spec in backend.bundle.manifest.states_of(SLOT_POSITIONS):
        shape = backend.specs[spec.name].shape
        backend.write(spec.name, np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape))


def _write(path: Path, pixels: Pixels) -> None:
    write_png(path, picture(pixels))


def milliseconds(action: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3
