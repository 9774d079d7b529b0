"""The engine: one thread that keeps the rows of a bundle's batch busy.

An image begins as soon as a row is free, whatever the other rows are at: the stage ``admit`` lays out its rows anew and leaves all others
as they are, bit by bit. So it is the image that ``linert run`` draws with the same seed, whatever its company and moment of arrival.

Where every step feeds one position, images begin so that all reach the ends of their lines at the same step: a line's end goes over all
rows, and would be run once for each of them otherwise. That takes a lone image no time, and others less than a line.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import decode_stage
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.setting import stage_inputs
from linert.runtime.closing import Closing
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.conditions import Inputs
from linert.runtime.drawing.eviction_map import resident_shares
from linert.runtime.drawing.generator import Image, PixelDecoder, Pixels, Tokens, make_batch
from linert.runtime.drawing.loop import Batch, lay_out
from linert.runtime.drawing.noise import noise_rows
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import BundleError, DeviceError, LinertError, RequestError
from linert.runtime.serving.handle import Admitted, Cancelled, Done, Failed, Handle, LinesDrawn

WAITING = 64
"""Images that may wait for a row, unless told otherwise."""


class QueueFullError(LinertError):
    """As many images wait for a row as may."""


class EngineClosedError(LinertError):
    """The engine takes no images: it is closed, or its backend has failed."""


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


@dataclass
class _Row:
    """An image in a row. ``fed``: its tokens that were fed, below 0 while its condition is. ``lines``: line ends that it had."""

    handle: Handle
    fed: int
    lines: int = 0
    shown: int = 0
    begun: float = field(default_factory=time.monotonic)


@dataclass
class _Waiting:
    """An image that waits for a row. ``inputs``: its condition, as of a batch of one. ``first``: the position that is fed first."""

    handle: Handle
    inputs: Inputs
    first: int


class Engine(Closing):
    """Draws images of one bundle and size as they are asked for, in a ``with`` block or until it is closed.

    Args:
        bundle: whose rows are kept busy.
        options: where its stages run; on the CPU if None.
        cache: what all images keep; the bundle's defaults if None.
        window: positions of every image that a decode step takes, of those that the bundle has.
        waiting: images that may wait for a row.

    Raises:
        RequestError: the bundle does not have the window, or the cache settings do not fit it.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BackendOptions | None = None,
        cache: CacheSettings | None = None,
        *,
        window: int = 1,
        waiting: int = WAITING,
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.options = options or BackendOptions()
        self.cache = cache or self.manifest.cache
        self.manifest.check_cache(self.cache)
        self.manifest.check_window(window)
        self.window, self.limit = window, waiting
        self.counts = Counts()
        self.conditioner = open_conditioner(bundle, self.options)
        self._rows: list[_Row | None] = [None] * self.manifest.images
        self._spoiled: set[int] = set()
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Condition()
        self._awake = threading.Event()
        self._closing = False
        self._error: LinertError | None = None
        self._image_seconds = 0.0
        self._ready = threading.Event()
        self._pixels = ThreadPoolExecutor(1, "linert-pixels")
        self._decoder = PixelDecoder(bundle, self.options)
        self._thread = threading.Thread(target=self._work, name="linert-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether images are drawn: the stages are loaded, and nothing has failed."""
        return self._ready.is_set() and self._error is None and not self._closing

    @property
    def error(self) -> LinertError | None:
        """Why the backend failed."""
        return self._error

    @property
    def busy(self) -> int:
        """Rows that an image has."""
        return sum(row is not None for row in self._rows)

    @property
    def seconds_until_free(self) -> int:
        """About how long it takes until all that wait have a row: whole seconds, at least 1."""
        rounds = (len(self._waiting) + 1) / len(self._rows)
        return max(1, math.ceil(self._image_seconds * rounds))

    @property
    def queued(self) -> int:
        """Images that wait for a row."""
        return len(self._waiting)

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until the stages are loaded, or the backend has failed; whether they are."""
        self._ready.wait(timeout)
        return self.ready

    def submit(
        self,
        sample: Sample,
        sampling: SamplingSettings | None = None,
        *,
        lines: bool = False,
        kept: bool = False,
    ) -> Handle:
        """Ask for an image.

        Args:
            sample: what it shows, and its seed.
            sampling: how its tokens are drawn; the bundle's defaults if None.
            lines: whether the handle tells what is drawn line by line.
            kept: whether it tells in the end what the cache kept.

        Raises:
            RequestError: the bundle cannot draw it.
            QueueFullError: as many as may are waiting.
            EngineClosedError: the engine takes no images.
        """
        sampling = sampling or self.manifest.sampling
        if faults := sampling.faults(guided=self.manifest.guided):
            raise RequestError("; ".join(faults))
        self.conditioner.check([sample.condition])
        inputs = self.conditioner.inputs([sample.condition])
        first = int(self.conditioner.begins(inputs)[0])
        if kept:
            self.manifest.require_cache("what the cache kept")
        raster, layers = self.manifest.raster, self.manifest.model.layers
        shares = np.zeros((raster.lines - 1, layers, raster.image_tokens), np.float32) if kept else None
        handle = Handle(sample, sampling, lines, shares, self._wake)
        with self._lock:
            if self._closing or self._error is not None:
                raise EngineClosedError(
                    f"no images are drawn any more: {self._error or 'the engine is closed'}"
                )
            if len(self._waiting) >= self.limit:
                self.counts.refused += 1
                raise QueueFullError(f"{self.limit} images are waiting already")
            self.counts.submitted += 1
            self._waiting.append(_Waiting(handle, inputs, first))
        self._wake()
        return handle

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more images, and finish those that there are.

        Returns:
            Whether they were finished within so many seconds.
        """
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._pixels.shutdown(wait=True)
        return True

    def close(self) -> None:
        """Cancel what is not drawn yet, and give back the backend."""
        with self._lock:
            self._closing = True
            handles = [waiting.handle for waiting in self._waiting]
        handles += [row.handle for row in self._rows if row is not None]
        for handle in handles:
            handle.cancel()
        self._wake()
        self._thread.join()
        self._pixels.shutdown(wait=True)
        self._decoder.close()
        self.conditioner.close()

    def _wake(self) -> None:
        self._awake.set()
        with self._lock:
            self._lock.notify_all()

    # What follows runs in the engine's own thread.

    def _work(self) -> None:
        backend: Backend | None = None
        try:
            stages = [name for name in self.manifest.stages if name not in ("vq_decoder", "text_encoder")]
            backend = self.options.open(self.bundle, stages)
            loop = _Loop(self, backend)
            loop.reset()
            self._ready.set()
            while self._anything_to_do():
                self._awake.clear()
                loop.admit()
                loop.advance()
        except Exception as error:
            self._fail(error)
        finally:
            self._ready.set()
            if backend is not None:
                backend.close()

    def _anything_to_do(self) -> bool:
        """Wait until there is; no once the engine is closing and there is not."""
        with self._lock:
            self._lock.wait_for(lambda: self._closing or self._waiting or self.busy)
            return bool(self._waiting or self.busy)

    def _fail(self, error: Exception) -> None:
        """Tell all who wait what has failed."""
        reason = as_linert_error(error)
        with self._lock:
            self._error = reason
            handles = [waiting.handle for waiting in self._waiting]
            handles += [row.handle for row in self._rows if row is not None]
            self._waiting.clear()
            self._rows = [None] * len(self._rows)
        for handle in handles:
            self.counts.failed += 1
            handle.tell(partial(Failed, error=reason))

    def pixels(self, tokens: Tokens) -> Pixels:
        """Pixels ``[3, H, W]`` of ``tokens [N]``, once the images before are decoded."""
        pixels: Pixels = self._pixels.submit(lambda: self._decoder(tokens[None])[0]).result()
        return pixels

    def _finish(self, handle: Handle, tokens: Tokens) -> None:
        """Decode an image's pixels, in a thread of its own."""

        def decode() -> None:
            try:
                pixels = self._decoder(tokens[None])[0]
            except Exception as error:
                reason = as_linert_error(error)
                self.counts.failed += 1
                handle.tell(partial(Failed, error=reason))
            else:
                self.counts.done += 1
                handle.tell(partial(Done, image=Image(handle.sample, tokens, pixels), kept=handle.kept))

        self._pixels.submit(decode)


@dataclass
class _Loop:
    """The rows of a backend, and the stages that move them on. ``pause``: steps until one of those that wait may begin, or more."""

    engine: Engine
    backend: Backend
    batch: Batch = field(init=False)
    filtered: bool = False
    pause: int = 1

    def __post_init__(self) -> None:
        engine = self.engine
        self.manifest = engine.manifest
        self.raster = self.manifest.raster
        usual = [Sample(engine.conditioner.usual()[0], 0)]
        batch = make_batch(self.manifest, engine.conditioner, usual, self.manifest.sampling, engine.cache)
        self.batch = replace(batch, window=engine.window)
        self.noise = self.batch.noise
        self.conditions = dict(self.batch.conditions)
        self.sampling = {
            name: np.full((self.manifest.images, 1), value)
            for name, value in stage_inputs(self.manifest.sampling, self.raster).items()
        }

    def reset(self) -> None:
        """Load all stages and lay out the state, with every row idle: at its image's end."""
        backend, raster, manifest = self.backend, self.raster, self.manifest
        for stage in (*(decode_stage(self.engine.window, filtered=f) for f in (True, False)), "admit"):
            backend.load(stage)
        lay_out(backend, self.batch)
        sequences = manifest.images * manifest.branches
        backend.write("position", np.full(sequences, raster.prefix_len + raster.image_tokens))
        backend.write("line", np.full(sequences, raster.lines - 1))
        self.engine._spoiled.clear()

    def rows(self) -> Iterator[tuple[int, _Row]]:
        for number, row in enumerate(self.engine._rows):
            if row is not None:
                yield number, row

    def admit(self) -> None:
        """Let images that wait take rows that are free, and drop those that are cancelled."""
        engine = self.engine
        for number, row in list(self.rows()):
            if row.handle.cancelled:
                engine._rows[number] = None
                self._drop(row.handle)
        if engine._spoiled and not engine.busy:
            self.reset()
        free = [
            number for number, row in enumerate(engine._rows) if row is None and number not in engine._spoiled
        ]
        width = self.raster.line_width
        phase = next((row.fed % width for _, row in self.rows()), None)
        self.pause = width
        taken: dict[int, _Waiting] = {}
        with engine._lock:
            kept: deque[_Waiting] = deque()
            dropped = []
            for waiting in engine._waiting:
                if waiting.handle.cancelled:
                    dropped.append(waiting.handle)
                    continue
                aligned = (waiting.first - self.raster.prefix_len) % width
                if len(taken) < len(free) and (engine.window > 1 or phase in (None, aligned)):
                    taken[free[len(taken)]] = waiting
                    phase = aligned
                    continue
                kept.append(waiting)
                if len(taken) < len(free) and phase is not None:
                    self.pause = min(self.pause, (aligned - phase) % width or width)
            engine._waiting = kept
        for handle in dropped:
            self._drop(handle)
        if taken:
            self._begin(taken)

    def _drop(self, handle: Handle) -> None:
        self.engine.counts.cancelled += 1
        handle.tell(Cancelled)

    def _begin(self, taken: dict[int, _Waiting]) -> None:
        """Lay out the rows of the images of ``taken``, by number."""
        engine, backend = self.engine, self.backend
        for number, waiting in taken.items():
            handle = waiting.handle
            # They have their rows before anything can fail: whatever fails is told to all who have one.
            engine._rows[number] = _Row(handle, waiting.first - self.raster.prefix_len)
            self.noise[number] = noise_rows(handle.sample.seed, *self.noise.shape[1:])
            for name, value in stage_inputs(handle.sampling, self.raster).items():
                self.sampling[name][number] = value
            for name, values in waiting.inputs.items():
                self.conditions[name][number] = values[0]
        for name, array in {**self.conditions, **self.sampling, "noise": self.noise}.items():
            backend.write(name, array)
        backend.write("admitted", np.array([n in taken for n in range(self.manifest.images)], np.int64))
        backend.run("admit")
        engine.counts.admissions += 1
        engine.counts.admitted += len(taken)
        for waiting in taken.values():
            waiting.handle.tell(Admitted)
        self.filtered = any(row.handle.sampling.filtered for _, row in self.rows())

    def advance(self) -> None:
        """Run decode steps until an image reaches the end of its line, or something is to be done before; end lines that are due."""
        busy = dict(self.rows())
        if not busy:
            return
        engine, backend, raster, window = self.engine, self.backend, self.raster, self.engine.window
        end = raster.image_tokens - 1
        stage = decode_stage(window, filtered=self.filtered)
        # To the first end of a line, or of an image, or to where one that waits may begin.
        ends = (min((row.lines + 1) * raster.line_width, end) - row.fed for row in busy.values())
        steps = min(-(-min(ends) // window), self.pause)
        run = 0
        while run < steps and not (run and engine._awake.is_set()):
            backend.run(stage)
            run += 1
        engine.counts.steps += run
        if window > 1:
            position = backend.read("position")
        lines: dict[int, int] = {}
        for number, row in busy.items():
            before = row.fed
            row.fed = int(position[number]) - raster.prefix_len if window > 1 else min(row.fed + run, end)
            engine.counts.tokens += max(0, row.fed + 1) - max(0, before + 1)
            # One token more is drawn than is fed.
            drawn = min(max(0, row.fed + 1), raster.image_tokens) // raster.line_width
            if drawn > row.shown:
                row.shown = lines[number] = drawn
        if lines:
            self._show(lines)
        self._end_lines()

    def _show(self, lines: dict[int, int]) -> None:
        """Look at the images that have drawn a line: whether their numbers are finite, and whether they are done."""
        engine, manifest = self.engine, self.manifest
        logits = self.backend.read("logits").reshape(manifest.branches, manifest.images, -1)
        finite = np.asarray(np.isfinite(logits).all((0, 2)))
        told = [n for n in lines if self._row(n).handle.lines or lines[n] == self.raster.lines]
        tokens = cast("Tokens", self.backend.read("tokens")).clip(min=0) if told else None
        for number, drawn in lines.items():
            handle = self._row(number).handle
            if not finite[number]:
                engine._rows[number] = None
                # What its caches hold would be no number for ever.
                engine._spoiled.add(number)
                engine.counts.failed += 1
                error = BundleError(
                    f"logits that are not finite in line {drawn} of the image of {handle.sample.label}: the checkpoint holds numbers "
                    "that are none, or its activations leave the range of "
                    f"{manifest.precision.activations}: export with --activations fp32"
                )
                handle.tell(partial(Failed, error=error))
                continue
            if tokens is None:
                continue
            mine = tokens[number].copy()
            if handle.lines:
                handle.tell(partial(LinesDrawn, lines=drawn, tokens=mine))
            if drawn == self.raster.lines:
                engine._image_seconds = time.monotonic() - self._row(number).begun
                engine._rows[number] = None
                engine._finish(handle, mine)

    def _row(self, number: int) -> _Row:
        row = self.engine._rows[number]
        assert row is not None
        return row

    def _end_lines(self) -> None:
        raster = self.raster
        due = {
            number: row
            for number, row in self.rows()
            if row.fed >= (row.lines + 1) * raster.line_width and row.lines < raster.lines - 1
        }
        if due:
            self.backend.run(self.batch.stages["line_end"])
            self.engine.counts.line_ends += 1
            watched = any(row.handle.kept is not None for row in due.values())
            shares = resident_shares(self.backend, self.manifest) if watched else None
            for number, row in due.items():
                if row.handle.kept is not None and shares is not None:
                    row.handle.kept[row.lines] = shares[number]
                row.lines += 1


def as_linert_error(error: Exception) -> LinertError:
    """``error``, or what says it of a device, for whoever waits in another thread."""
    return error if isinstance(error, LinertError) else DeviceError(f"{type(error).__name__}: {error}")
