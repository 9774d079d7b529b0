"""Generate images: plan samples, run them in batches, decode their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, RLock
from typing import cast

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from linert.runtime.backends.base import Array, Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.schedule import GroupStep
from linert.runtime.closing import Closing
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.conditions import conditions_of
from linert.runtime.drawing.loop import Batch, LineEnds, generate
from linert.runtime.drawing.noise import Noise
from linert.runtime.drawing.orders import Cells, checked_order, order_of
from linert.runtime.drawing.samples import Condition, Sample, list_samples
from linert.runtime.drawing.trace import Trace
from linert.runtime.drawing.window_choice import WindowChoice
from linert.runtime.errors import BundleError, RequestError

Tokens = NDArray[np.int64]
Pixels = NDArray[np.float32]

LineEndWatcher = Callable[[Backend, LineEnds], None]
"""Called with the backend and a line's number after its end."""


@dataclass(frozen=True)
class Replay:
    """Recorded evictions for a batch of samples: sample k is image ``images[k]`` of ``trace``."""

    trace: Trace
    images: Sequence[int]


@dataclass(frozen=True)
class Image:
    """A drawn image: ``tokens [N]`` int64 and ``pixels [3, H, W]`` float32, about [-1, 1] and not clamped."""

    sample: Sample
    tokens: Tokens
    pixels: Pixels

    def picture(self) -> PIL.Image.Image:
        """The image as 8-bit RGB."""
        return picture(self.pixels)


def picture(pixels: Pixels) -> PIL.Image.Image:
    """8-bit RGB of ``pixels [3, H, W]``: clamped to [-1, 1], scaled to 0..255 and rounded (torchvision's ``save_image``)."""
    scaled = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    levels = (scaled + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def make_batch(
    manifest: Manifest,
    conditioner: Conditioner,
    samples: Sequence[Sample],
    sampling: SamplingSettings,
    cache: CacheSettings | None,
    orders: Sequence[Cells] | None = None,
) -> Batch:
    """The batch that draws ``samples`` from a bundle; a short one is filled up with its last sample (rows do not see each other).

    Args:
        orders: of every sample, where images are drawn in groups; None makes them of the seeds.

    Raises:
        RequestError: no sample, more than the bundle's batch, what the bundle cannot draw, or an order that does not hold every cell once.
    """
    count, size = len(samples), manifest.images
    if not 1 <= count <= size:
        raise RequestError(f"{count} samples do not fit a batch of {size}")
    filled = [*samples, *[samples[-1]] * (size - count)]
    seeds = [sample.seed for sample in filled]
    groups = manifest.groups
    if groups is None:
        if orders is not None:
            raise RequestError("orders: the bundle draws line by line; leave them out")
        steps: tuple[GroupStep, ...] = ()
    else:
        steps = tuple(groups.steps(groups.sizes_in(sampling.steps)))
        if orders is None:
            own = [seeded_order(manifest, sample.seed, sampling) for sample in samples]
        elif len(orders) == count:
            cells = manifest.raster.image_tokens
            own = [checked_order(order, cells, f"order {number}") for number, order in enumerate(orders)]
        else:
            raise RequestError(f"{len(orders)} orders for {count} images: each has one of its own")
        orders = [*own, *[own[-1]] * (size - count)]
    return Batch(
        conditions=conditioner.inputs([sample.condition for sample in filled]),
        noise=Noise(seeds, *manifest.noise_shape),
        sampling=sampling,
        cache=cache,
        groups=steps,
        orders=None if orders is None else np.stack(orders),
    )


def seeded_order(manifest: Manifest, seed: int, sampling: SamplingSettings) -> Cells:
    """The order in which the image with this ``seed`` is drawn, ``[N]`` int64.

    Raises:
        RequestError: the bundle draws line by line, or not in so many steps.
    """
    groups = manifest.groups
    if groups is None:
        raise RequestError("an order: the bundle draws line by line")
    return order_of(seed, manifest.raster.line_width, groups.sizes_in(sampling.steps), groups.repulsion)


class Generator(Closing):
    """Draws images from a bundle, in a ``with`` block or until it is closed.

    Threads may share one: what they ask for is drawn one after another.

    Args:
        bundle: its folder, or an opened bundle.
        options: where its stages run; on the CPU if None.
        conditioner: one that knows features of captions already, to share; one of its own if None.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        options: BackendOptions | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.options = options or BackendOptions()
        self._lock = RLock()
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.manifest = self.bundle.manifest
        drawing = [name for name in self.manifest.stages if name not in ("vq_decoder", "text_encoder")]
        self.backend = self.options.open(self.bundle, drawing)
        try:
            self.decoder = PixelDecoder(self.bundle, self.options)
        except BaseException:
            self.backend.close()
            raise
        self._own_conditioner = conditioner is None
        self.conditioner = conditioner or open_conditioner(self.bundle, self.options)

    def close(self) -> None:
        """Give back all memory and devices, once what is being drawn is done; nothing can be drawn any more."""
        with self._lock:
            self.backend.close()
            self.decoder.close()
            if self._own_conditioner:
                self.conditioner.close()

    def generate(
        self,
        conditions: Sequence[Condition | int | str],
        num_images: int | None = None,
        seed: int = 0,
        sampling: SamplingSettings | None = None,
        cache: CacheSettings | None = None,
    ) -> list[Image]:
        """Draw images; see :func:`linert.runtime.drawing.samples.list_samples` for the order of conditions and seeds.

        Args:
            conditions: classes (numbers), prompts (texts), or conditions of :mod:`linert.runtime.drawing.samples`.
            sampling: how tokens are drawn; the bundle's defaults if None.
            cache: policy, budget and the rest; the bundle's defaults if None.

        Raises:
            RequestError: the request does not fit the bundle.
        """
        samples = list_samples(conditions_of(conditions), num_images, seed)
        images = []
        for group in self.batches(samples):
            tokens = self.draw(group, sampling, cache)
            images += [
                Image(sample, row, self.decoder(row[None])[0])
                for sample, row in zip(group, tokens, strict=True)
            ]
        return images

    def batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """Cut ``samples`` into groups of at most the bundle's batch."""
        size = self.manifest.images
        for start in range(0, len(samples), size):
            yield samples[start : start + size]

    def draw(
        self,
        samples: Sequence[Sample],
        sampling: SamplingSettings | None = None,
        cache: CacheSettings | None = None,
        *,
        replay: Replay | None = None,
        watcher: LineEndWatcher | None = None,
        on_line: Callable[[int], None] | None = None,
        window: int | WindowChoice = 1,
        orders: Sequence[Cells] | None = None,
    ) -> Tokens:
        """Draw the tokens ``[len(samples), N]`` int64 of at most one batch of samples.

        Args:
            replay: a trace and which of its images these samples are; its evictions are imposed.
            watcher: sees the state after every line end.
            on_line: called after each line, or group, with the number of those that are drawn (:meth:`tokens` has them).
            window: positions of every image that a decode step takes, of those that the bundle has, or what chooses among them. The
                tokens are the same.
            orders: as in :func:`make_batch`.
        """
        count = len(samples)
        manifest = self.manifest
        batch = make_batch(
            manifest,
            self.conditioner,
            samples,
            sampling or manifest.sampling,
            cache or manifest.cache,
            orders,
        )
        batch = (
            replace(batch, choice=window)
            if isinstance(window, WindowChoice)
            else replace(batch, window=window)
        )
        if replay is not None:
            filled = [*replay.images, *[replay.images[-1]] * (self.manifest.images - count)]
            batch = replace(batch, replay=replay.trace.batch(filled))

        def watch(ends: LineEnds) -> None:
            if watcher:
                watcher(self.backend, ends)

        # The state belongs to one batch at a time.
        with self._lock:
            tokens = generate(self.backend, batch, on_line, watch)[:count]
        self.bundle.require_not_overwritten()
        return tokens

    def tokens(self, count: int) -> Tokens:
        """A copy of the tokens ``[count, N]`` int64 of the batch's first images, as far as they are drawn.

        For whoever is called back by :meth:`draw`; another thread waits until the batch is done.
        """
        with self._lock:
            # Of tokens that are not drawn yet there is none.
            return cast("Tokens", self.backend.read("tokens"))[:count].clip(min=0)

    def undrawn(self, count: int) -> NDArray[np.bool_]:
        """Which tokens ``[count, N]`` of the batch's first images no step has drawn yet; likewise for whoever is called back."""
        with self._lock:
            return cast("Tokens", self.backend.read("tokens"))[:count] < 0


def drawn_pixels(manifest: Manifest, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pixels ``[..., 1, H, W]`` belong to tokens that are ``drawn [..., N]``."""
    raster, patch = manifest.raster, manifest.image_decoder.patch
    cells = drawn.reshape(*drawn.shape[:-1], 1, raster.lines, raster.line_width)[..., : raster.columns]
    return cells.repeat(patch, axis=-2).repeat(patch, axis=-1)


class PixelDecoder(Closing):
    """Turns tokens into pixels with a bundle's vq_decoder stage alone. Threads may share one: they take turns."""

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._lock = Lock()
        self.backend = (options or BackendOptions()).open(bundle, ["vq_decoder"])
        self.size = self.backend.specs["grid_tokens"].shape[0]

    def close(self) -> None:
        """Give back all memory and devices; nothing can be decoded any more."""
        with self._lock:
            self.backend.close()

    def __call__(self, tokens: Array, *, finite: bool = True) -> Pixels:
        """Pixels ``[I, 3, H, W]`` float32 of integer ``tokens [I, N]``.

        Args:
            finite: False leaves it to the caller to look at them.

        Raises:
            RequestError: wrong shape, or a token outside the codebook.
            BundleError: pixels that are not finite.
        """
        parts = list(self.parts(tokens, finite=finite))
        return np.concatenate(parts) if parts else np.empty((0, 3, 0, 0), np.float32)

    def parts(self, tokens: Array, *, finite: bool = True) -> Iterator[Pixels]:
        """The same a few images at a time, for more than memory holds. Raises what it raises, for tokens before any is decoded."""
        self._check(tokens)
        return self._parts(tokens, finite=finite)

    def _check(self, tokens: Array) -> None:
        raster = self.manifest.raster
        wanted = raster.image_tokens
        size = self.manifest.image_decoder.codebook_size
        if tokens.ndim != 2 or tokens.shape[1] != wanted or tokens.dtype.kind not in "iu":
            raise RequestError(
                f"tokens must be integers of shape [images, {wanted}], not {tokens.dtype} {tokens.shape}"
            )
        drawn = tokens.reshape(len(tokens), raster.lines, raster.line_width)[:, :, : raster.columns]
        if drawn.size and not (drawn.min() >= 0 and drawn.max() < size):
            raise RequestError(
                f"tokens range from {drawn.min()} to {drawn.max()}; the codebook holds 0 to {size - 1}"
            )

    def _parts(self, tokens: Array, *, finite: bool) -> Iterator[Pixels]:
        for start in range(0, len(tokens), self.size):
            part = tokens[start : start + self.size]
            missing = self.size - len(part)
            filled = np.pad(part, ((0, missing), (0, 0)), mode="edge")
            with self._lock:
                self.backend.write("grid_tokens", filled)
                self.backend.run("vq_decoder")
                pixels = cast("Pixels", self.backend.read("pixels"))[: len(part)]
            self.bundle.require_not_overwritten()
            if finite and not np.isfinite(pixels).all():
                raise BundleError(
                    "pixels that are not finite: the image decoder's checkpoint holds numbers that are none, or leaves the range of "
                    f"{self.manifest.precision.image_decoder}: export with --image-decoder-precision fp32"
                )
            yield pixels
