"""The loop: drive a backend through the stages, line by line or group by group. It knows nothing about models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Manifest, decode_stage
from linert.runtime.bundles.raster import Step
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.schedule import GroupStep
from linert.runtime.bundles.setting import stage_inputs
from linert.runtime.drawing.noise import Noise
from linert.runtime.drawing.window_choice import WindowChoice
from linert.runtime.errors import BundleError


@dataclass(frozen=True)
class Batch:
    """What one pass of the loop needs.

    ``conditions``: the model's inputs by name. ``noise``: of the images' seeds, which moves on with the images: one
    run at a time draws a batch. ``replay``: write slots ``[lines - 1, L, R, W]`` int64 to impose instead of asking the policy
    (see :mod:`linert.runtime.drawing.trace`).
    ``window``: positions of every image that a decode step takes; ``choice`` tries several and keeps to the quickest.
    ``groups``: the decode steps of images that are drawn in groups, and ``orders [I, N]`` int64 the cell of the token of every rank.
    """

    conditions: Mapping[str, NDArray[Any]]
    noise: Noise
    sampling: SamplingSettings
    cache: CacheSettings | None
    replay: NDArray[np.int64] | None = None
    window: int = 1
    choice: WindowChoice | None = None
    groups: tuple[GroupStep, ...] = ()
    orders: NDArray[np.int64] | None = None

    @cached_property
    def stages(self) -> dict[str, str]:
        """The bundle's stage for every stage of the schedule that the batch runs through."""
        if self.groups:
            names = [self.group(step) for step in self.groups]
            return {"prefill": "prefill", **dict(zip(names, names, strict=True))}
        return {
            "prefill": "prefill",
            "decode": self.decode(self.window),
            "line_end": self._line_end,
        }

    @property
    def widths(self) -> Sequence[int]:
        """The windows that its decode steps may take."""
        return (self.window,) if self.choice is None else self.choice.widths

    def decode(self, width: int) -> str:
        """The bundle's stage that decodes windows of so many positions."""
        return decode_stage(width, filtered=self.sampling.filtered)

    def group(self, step: GroupStep) -> str:
        """The bundle's stage that draws a group."""
        return step.width.stage(filtered=self.sampling.filtered)

    @property
    def _line_end(self) -> str:
        if self.cache is None:
            return "line_end"
        return f"line_end.{self.cache.policy if self.replay is None else 'replay'}"


class LineEnds(NamedTuple):
    """What a line end ended: the numbers of ``images`` in the batch, and of the ``lines`` of each that it was."""

    images: tuple[int, ...]
    lines: tuple[int, ...]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Image and line, one after the other."""
        return zip(self.images, self.lines, strict=True)


def rows_of(manifest: Manifest, images: Sequence[int], rows: int) -> NDArray[np.intp]:
    """Which of so many ``rows`` (sequences x KV heads) belong to ``images`` of the batch."""
    return np.arange(rows).reshape(manifest.branches, manifest.images, -1)[:, list(images)].ravel()


def sampling_inputs(manifest: Manifest, sampling: SamplingSettings) -> dict[str, NDArray[np.generic]]:
    """The stages' inputs ``[I, 1]`` that ``sampling`` decides, the same for every image."""
    scalars = stage_inputs(sampling, manifest.raster)
    return {name: np.full((manifest.images, 1), value) for name, value in scalars.items()}


def settings_inputs(manifest: Manifest, batch: Batch) -> dict[str, NDArray[np.generic]]:
    """The stages' inputs that sampling and cache settings decide."""
    cache = batch.cache
    inputs = sampling_inputs(manifest, batch.sampling)
    if cache is None:
        return inputs
    policy = manifest.policies.get(cache.policy)
    return (
        inputs
        | stage_inputs(cache, manifest.raster)
        | {
            "capacity": np.asarray(cache.capacity(manifest.raster), np.int64),
            "score_window": np.asarray(policy.score_window if policy else 0, np.int64),
        }
    )


def lay_out(backend: Backend, batch: Batch) -> None:
    """Load the batch's stages, write its inputs, and lay out the whole state with nothing fed.

    Raises:
        RequestError: a condition or setting does not fit the bundle.
        GeometryError: the cache settings do not fit it.
    """
    manifest = backend.bundle.manifest
    manifest.check_sampling(batch.sampling)
    manifest.check_cache(batch.cache, replayed=batch.replay is not None)
    for width in batch.widths:
        manifest.check_window(width)
    decode = [] if batch.groups else map(batch.decode, batch.widths)
    for stage in dict.fromkeys([*batch.stages.values(), *decode]):
        backend.load(stage)
    for name, values in batch.conditions.items():
        backend.write(name, values)
    batch.noise.restart()
    backend.write("noise", batch.noise.table)
    if batch.orders is not None:
        backend.write("order", batch.orders)
    for name, value in settings_inputs(manifest, batch).items():
        # A replay has no policy's inputs, and a raster none of groups.
        if name in backend.specs:
            backend.write(name, value)
    backend.run("prefill")


def begin(backend: Backend, batch: Batch) -> None:
    """Lay out the state and feed the condition: the first token is drawn. In groups, the first step feeds the condition.

    Of conditions that are shorter than the prefix, no more is fed than the longest needs.

    Raises:
        RequestError: a condition or setting does not fit the bundle.
        GeometryError: the cache settings do not fit it.
    """
    manifest = backend.bundle.manifest
    lay_out(backend, batch)
    if batch.groups:
        return
    prefix = manifest.raster.prefix_len
    fed = int(backend.read("position")[0]) if prefix > 1 else 0
    widest = max(batch.widths)
    for _ in range(fed, prefix, widest):
        backend.run(batch.decode(widest))


def run_step(backend: Backend, batch: Batch, step: Step) -> None:
    """Run one entry of the raster schedule."""
    if step.stage == "line_end" and batch.replay is not None:
        backend.write("replay_slots", batch.replay[step.line])
    backend.run(batch.stages[step.stage])
    if step.stage == "line_end":
        images = range(backend.bundle.manifest.images)
        move_noise(backend, batch.noise, ((image, step.line) for image in images))


def move_noise(backend: Backend, noise: Noise, ended: Iterable[tuple[int, int]]) -> None:
    """Let a backend draw on behind line ends, of each image and line that ``ended``."""
    if noise.move(ended, backend.bundle.manifest.raster):
        backend.write("noise", noise.table)


def run_group(backend: Backend, batch: Batch, step: GroupStep) -> None:
    """Feed the group before, or the condition, and draw the next one in every image."""
    backend.write("group_size", np.full(backend.bundle.manifest.images, step.drawn))
    backend.run(batch.group(step))


def require_finite(backend: Backend, logits_name: str = "logits") -> None:
    """Look at the logits of the last decode step: one number that is none makes all of the image arbitrary, and goes on for ever
    in the state.

    Raises:
        BundleError: they are not all finite.
    """
    logits = backend.read(logits_name)
    if not np.isfinite(logits).all():
        finite = np.isfinite(logits).reshape(len(logits), -1).all(axis=1)
        wrong = np.flatnonzero(~finite) % backend.bundle.manifest.images
        images = ", ".join(map(str, sorted(set(wrong.tolist()))))
        raise not_finite(backend.bundle.manifest, f"image {images} of the batch")


def not_finite(manifest: Manifest, where: str) -> BundleError:
    """What is said of logits that are not finite, and where."""
    return BundleError(
        f"logits that are not finite in {where}: the checkpoint holds numbers that are none, or its activations leave the range of "
        f"{manifest.precision.activations}: export with --activations fp32"
    )


def generate(
    backend: Backend,
    batch: Batch,
    on_line: Callable[[int], None] | None = None,
    on_line_end: Callable[[LineEnds], None] | None = None,
    *,
    finite: bool = True,
) -> NDArray[np.int64]:
    """Draw a batch's tokens.

    Args:
        backend: holds the stages of :attr:`Batch.stages`.
        batch: conditions, noise and settings.
        on_line: called after each line with the number of lines whose tokens are all drawn in every image; or after each group, with
            that of groups.
        on_line_end: called after every line end: write slots are chosen, nothing is overwritten yet.
        finite: False leaves it to the caller to look at the logits.

    Returns:
        ``[I, N]`` int64 tokens in raster order.

    Raises:
        BundleError: logits became infinite or no numbers; looked at once a line or group.
    """
    begin(backend, batch)

    def drawn(parts: int, logits: str = "logits") -> None:
        if finite:
            require_finite(backend, logits)
        if on_line:
            on_line(parts)

    ended = on_line_end or (lambda ends: None)
    if batch.groups:
        for number, step in enumerate(batch.groups):
            run_group(backend, batch, step)
            drawn(number + 1, step.width.logits)
    elif list(batch.widths) == [1]:
        _walk_together(backend, batch, drawn, ended)
    else:
        _walk_apart(backend, batch, drawn, ended)
    return cast("NDArray[np.int64]", backend.read("tokens"))


def _walk_together(
    backend: Backend, batch: Batch, drawn: Callable[[int], None], ended: Callable[[LineEnds], None]
) -> None:
    """All images stand at one token."""
    manifest = backend.bundle.manifest
    images = tuple(range(manifest.images))
    for step in manifest.raster.schedule():
        run_step(backend, batch, step)
        # The token drawn by a line's last but one step is the line's last.
        if step.stage == "decode" and step.column == manifest.raster.line_width - 2:
            drawn(step.line + 1)
        if step.stage == "line_end":
            ended(LineEnds(images, (step.line,) * len(images)))


def _walk_apart(
    backend: Backend, batch: Batch, drawn: Callable[[int], None], ended: Callable[[LineEnds], None]
) -> None:
    """Every image moves on by what is accepted of its window.

    Where the images are is looked at when the first of them may have reached its line's end, not after every step: a device
    need not be waited for in between. Until then no line can be due.
    """
    manifest = backend.bundle.manifest
    raster, images = manifest.raster, manifest.images
    fed = backend.read("position")[:images].astype(np.int64) - raster.prefix_len
    lines = np.zeros(images, np.int64)
    whole = 0
    while (fed < raster.image_tokens - 1).any():
        until = np.minimum((lines + 1) * raster.line_width, raster.image_tokens - 1)
        going = fed < raster.image_tokens - 1
        width = batch.window if batch.choice is None else batch.choice.next()
        begun, before = time.perf_counter(), fed
        for _ in range(-(-int((until - fed)[going].min()) // width)):
            backend.run(batch.decode(width))
        fed = backend.read("position")[:images].astype(np.int64) - raster.prefix_len
        if batch.choice is not None:
            batch.choice.note(width, int((fed - before)[going].sum()), time.perf_counter() - begun)
        # One token more is drawn than is fed.
        finished = int((np.minimum(fed + 1, raster.image_tokens) // raster.line_width).min())
        due = np.flatnonzero((fed >= (lines + 1) * raster.line_width) & (lines < raster.lines - 1))
        if finished > whole:
            whole = finished
            drawn(whole)
        if due.size:
            ends = LineEnds(tuple(due.tolist()), tuple(lines[due].tolist()))
            _end_lines(backend, batch, ends)
            ended(ends)
            lines[due] += 1


def _end_lines(backend: Backend, batch: Batch, ends: LineEnds) -> None:
    """Run the line end; what is due the state knows, but not what a replay imposes."""
    if batch.replay is not None:
        slots = np.zeros(batch.replay.shape[1:], np.int64)
        for image, line in ends.pairs():
            rows = rows_of(backend.bundle.manifest, [image], batch.replay.shape[2])
            slots[:, rows] = batch.replay[line][:, rows]
        backend.write("replay_slots", slots)
    backend.run(batch.stages["line_end"])
    move_noise(backend, batch.noise, ends.pairs())
