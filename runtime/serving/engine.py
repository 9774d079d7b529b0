"""The engine: one thread that keeps the rows of a bundle's batch busy.

An image begins as soon as a row is free, whatever the other rows are at: the stage ``admit`` lays out its rows anew and leaves all others
as they are, bit by bit. So it is the image that ``linert run`` draws with the same seed, whatever its company and moment of arrival.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.closing import Closing
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import Image, PixelDecoder, Pixels, Tokens, seeded_order
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import DeviceError, LinertError
from linert.runtime.serving.group_rows import GroupRows
from linert.runtime.serving.handle import Done, Failed, Handle
from linert.runtime.serving.line_rows import LineRows
from linert.runtime.serving.rows import Beginning, Counts, Rows

WAITING = 64
"""Images that may wait for a row, unless told otherwise."""


class QueueFullError(LinertError):
    """As many images wait for a row as may."""


class EngineClosedError(LinertError):
    """The engine takes no images: it is closed, or its backend has failed."""


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
        kind = LineRows if self.manifest.groups is None else GroupRows
        self._rows: Rows = kind(self.manifest, self.counts, self._finish)
        self._waiting: deque[Beginning] = deque()
        self._lock = threading.Condition()
        self._awake = threading.Event()
        self._closing = False
        self._error: LinertError | None = None
        self._ready = threading.Event()
        self._pixels = ThreadPoolExecutor(1, "linert-pixels")
        self._decoder = PixelDecoder(bundle, self.options)
        # Where pixels are decoded by the cores that draw, both at once take longer than one after the other.
        self._turns = self.options.name is BackendName.CPU
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
        return self._rows.busy

    @property
    def seconds_until_free(self) -> int:
        """About how long it takes until all that wait have a row: whole seconds, at least 1."""
        rounds = (len(self._waiting) + 1) / self.manifest.images
        return max(1, math.ceil(self._rows.image_seconds * rounds))

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
        parts: bool = False,
        kept: bool = False,
    ) -> Handle:
        """Ask for an image.

        Args:
            sample: what it shows, and its seed.
            sampling: how its tokens are drawn; the bundle's defaults if None.
            parts: whether the handle tells what is drawn line by line, or group by group.
            kept: whether it tells in the end what the cache kept.

        Raises:
            RequestError: the bundle cannot draw it.
            QueueFullError: as many as may are waiting.
            EngineClosedError: the engine takes no images.
        """
        sampling = sampling or self.manifest.sampling
        self.manifest.check_sampling(sampling)
        self.conditioner.check([sample.condition])
        inputs = self.conditioner.inputs([sample.condition])
        first = int(self.conditioner.begins(inputs)[0])
        if kept:
            self.manifest.require_cache("what the cache kept")
        raster, layers = self.manifest.raster, self.manifest.model.layers
        order = seeded_order(self.manifest, sample.seed, sampling) if self.manifest.groups else None
        shares = np.zeros((raster.lines - 1, layers, raster.image_tokens), np.float32) if kept else None
        handle = Handle(sample, sampling, parts, shares, self._wake)
        with self._lock:
            if self._closing or self._error is not None:
                raise EngineClosedError(
                    f"no images are drawn any more: {self._error or 'the engine is closed'}"
                )
            if len(self._waiting) >= self.limit:
                self.counts.refused += 1
                raise QueueFullError(f"{self.limit} images are waiting already")
            self.counts.submitted += 1
            self._waiting.append(Beginning(handle, inputs, first, order))
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
        for handle in self._handles():
            handle.cancel()
        self._wake()
        self._thread.join()
        self._pixels.shutdown(wait=True)
        self._decoder.close()
        self.conditioner.close()

    def _handles(self) -> list[Handle]:
        """Those of all images that wait or have a row."""
        with self._lock:
            handles = [beginning.handle for beginning in self._waiting]
        # What begins meanwhile is among those that waited.
        return handles + [row.handle for _, row in self._rows.images()]

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
            self._rows.open(backend, self.conditioner, self.cache, self.window)
            self._ready.set()
            while self._anything_to_do():
                self._awake.clear()
                self._rows.advance(self._admit(), self._awake.is_set)
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

    def _admit(self) -> int:
        """Let images that wait begin in rows that are free, and drop those that are cancelled.

        Returns:
            Steps until one of those that still wait may begin, if a row is free then.
        """
        rows, pause = self._rows, self.manifest.raster.image_tokens
        rows.drop_cancelled()
        free = rows.free() if self._waiting else []
        beginnings: dict[int, Beginning] = {}
        dropped = []
        with self._lock:
            for _ in range(len(self._waiting)):
                beginning = self._waiting.popleft()
                if beginning.handle.cancelled:
                    dropped.append(beginning.handle)
                elif len(beginnings) == len(free):
                    self._waiting.append(beginning)
                elif steps := rows.wait(beginning, beginnings.values()):
                    pause = min(pause, steps)
                    self._waiting.append(beginning)
                else:
                    beginnings[free[len(beginnings)]] = beginning
        for handle in dropped:
            rows.drop(handle)
        if beginnings:
            rows.begin(beginnings)
        return pause

    def _fail(self, error: Exception) -> None:
        """Tell all who wait what has failed."""
        reason = as_linert_error(error)
        with self._lock:
            self._error = reason
        handles = self._handles()
        self._waiting.clear()
        self._rows.taken = [None] * self.manifest.images
        for handle in handles:
            self.counts.failed += 1
            handle.tell(partial(Failed, error=reason))

    def pixels(self, tokens: Tokens) -> Pixels:
        """Pixels ``[3, H, W]`` of ``tokens [N]``, once the images before are decoded."""
        pixels: Pixels = self._pixels.submit(lambda: self._decoder(tokens[None])[0]).result()
        return pixels

    def _finish(self, handle: Handle, tokens: Tokens) -> None:
        """Decode an image's pixels: on the CPU now, else in a thread of its own while others are drawn."""

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

        if self._turns:
            decode()
        else:
            self._pixels.submit(decode)


def as_linert_error(error: Exception) -> LinertError:
    """``error``, or what says it of a device, for whoever waits in another thread."""
    return error if isinstance(error, LinertError) else DeviceError(f"{type(error).__name__}: {error}")
