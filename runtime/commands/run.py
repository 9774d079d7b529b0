"""``linert run``: draw images from a bundle."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import msgspec
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import NOTHING_EVICTED, CacheSettings, cache_text
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.condition_options import ConditionRequest, condition_options
from linert.runtime.commands.output_options import Output, output_options
from linert.runtime.commands.ray_options import WorkersRequest, workers_options
from linert.runtime.commands.run_options import RunFiles, run_options
from linert.runtime.commands.settings_options import SamplingRequest, cache_options, sampling_options
from linert.runtime.drawing.batches import (
    BatchDrawer,
    BatchSettings,
    BatchTask,
    Drawing,
    DrawnBatch,
    Finished,
    LocalDrawing,
)
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import Generator, drawn_pixels, picture
from linert.runtime.drawing.orders import read_orders
from linert.runtime.drawing.output import (
    SHEET_IMAGES,
    SHEET_NAME,
    Recipe,
    contact_sheet,
    is_whole,
    read_picture,
    sheet_columns,
    write_encoded,
    write_png,
)
from linert.runtime.drawing.run_folder import (
    PREVIEW_NAME,
    RunFolder,
    RunRequest,
    run_folder,
)
from linert.runtime.drawing.samples import Sample, list_samples, shortened
from linert.runtime.drawing.trace import Trace, TraceHeader, read_trace
from linert.runtime.errors import RequestError
from linert.runtime.files.array_files import write_arrays


@click.command()
@bundle_argument()
@condition_options()
@click.option("--num-images", type=int, help="Images in all. Default: one a class or prompt.")
@click.option("--seed", type=int, help="Seed of each one's first image; the next has one more. Default: 0.")
@sampling_options("Default: the bundle's.")
@cache_options()
@click.option(
    "--window",
    default="1",
    show_default=True,
    callback=lambda c, p, text: parse_window(text),
    help="Positions of every image that a decode step takes, of those that the bundle has, or auto: the quickest of them, measured "
    "while drawing. The images are the same.",
)
@run_options()
@backend_options()
@workers_options()
@output_options()
def command(
    place: BundlePlace,
    conditions: ConditionRequest,
    num_images: int | None,
    seed: int | None,
    sampling: SamplingRequest,
    cache: CacheRequest,
    window: int | None,
    files: RunFiles,
    options: BackendOptions,
    ray: WorkersRequest,
    output: Output,
) -> None:
    """Draw images from BUNDLE, one PNG an image and a contact sheet.

    One seed gives the same images every time, whatever the batch. The cache options choose among the policies that
    the bundle holds, and any budget that its buffer has room for.
    """
    files.check()
    ray.check()
    if ray.wanted and files.preview:
        raise RequestError(
            "--preview shows the one batch that is being drawn, and with --ray several are: leave it out"
        )
    settings: CacheSettings | None
    if files.replay_trace is not None:
        asked = not replace(conditions, captions=None).empty or num_images is not None or seed is not None
        if not (sampling.empty and cache.empty) or asked:
            raise RequestError(
                "--replay-trace draws the recorded images with the recorded settings: leave classes, prompts, seeds, sampling "
                "and cache options out"
            )
    elif conditions.empty:
        raise RequestError("say what to draw with --classes, --prompt or --captions, or with --replay-trace")
    opened = place.open()
    manifest = opened.manifest
    if manifest.groups is None and files.orders is not None:
        raise RequestError("--orders: the bundle draws line by line; leave --orders out")
    if manifest.groups is not None and window is None:
        raise RequestError("--window auto: the bundle draws in groups of its own; leave --window out")
    for option, value in (("--eviction-map", files.eviction_map), ("--record-trace", files.record_trace)):
        if value is not None:
            manifest.require_cache(option)
    conditioner = open_conditioner(opened, options)
    asked_conditions = conditions.settle(conditioner)
    trace = None
    if files.replay_trace is not None:
        trace = read_trace(files.replay_trace, opened.widest)
        samples = list(trace.header.samples)
        conditioner.check(sample.condition for sample in samples)
        drawn_by, settings = trace.header.sampling, trace.header.cache
        opened = opened.fitting(settings, replayed=True)
    else:
        samples = list_samples(asked_conditions, num_images, seed or 0)
        drawn_by = sampling.settle(manifest.sampling)
        opened, settings = cache.settle_for(opened)
    manifest = opened.manifest
    if window is not None:
        manifest.check_window(window)
    manifest.check_sampling(drawn_by)
    manifest.check_cache(settings, replayed=trace is not None)
    orders = None
    if files.orders is not None:
        orders = read_orders(files.orders, len(samples), manifest.raster.image_tokens)
    request = RunRequest(
        tuple(samples),
        drawn_by,
        settings,
        manifest.sha256,
        trace.digest if trace else "",
        "" if orders is None else hashlib.sha256(orders.tobytes()).hexdigest(),
    )
    batches = BatchSettings(drawn_by, settings, window, files.eviction_map, files.record_trace is not None)
    console = output.notes()
    with (
        _drawing(opened, options, conditioner, batches, ray, files, console) as drawing,
        run_folder(files.out, request, resume=files.resume, force=files.force) as folder,
    ):
        console.print(f"cache: {cache_text(settings) if manifest.groups is None else NOTHING_EVICTED}")
        run = _Run(manifest, request, folder, trace, batches, orders)
        run.draw(drawing, console)
        for note in drawing.notes():
            console.print(note)
        if trace is not None:
            drawn = folder.arrays()["tokens"]
            console.print(f"tokens equal to the trace's: {np.mean(drawn == trace.tokens):.2%}")
        if files.record_trace is not None:
            run.trace().write(files.record_trace)
        _finish(folder, files.save_tokens)
    written = {
        "trace": files.record_trace,
        "tokens": files.save_tokens,
        "contact_sheet": folder.path / SHEET_NAME,
    }
    values = {
        "folder": str(folder.path),
        "bundle_sha256": manifest.sha256,
        "images": [
            {
                "file": folder.picture(sample).name,
                "seed": sample.seed,
                "condition": msgspec.to_builtins(sample.condition),
            }
            for sample in samples
        ],
        **{name: str(path) for name, path in written.items() if path is not None},
        **drawing.counts(),
    }
    lines = [f"{len(samples)} images: {folder.path}", f"contact sheet: {written['contact_sheet']}"]
    output.result(values, [f"trace: {files.record_trace}"] * (files.record_trace is not None) + lines)


@contextlib.contextmanager
def _drawing(
    bundle: Bundle,
    options: BackendOptions,
    conditioner: Conditioner,
    settings: BatchSettings,
    ray: WorkersRequest,
    files: RunFiles,
    console: Console,
) -> Iterator[Drawing]:
    """Where the batches are drawn: here, or by workers of a Ray cluster."""
    if ray.wanted:
        from linert.runtime.cluster.pool import worker_pool

        with worker_pool(
            ray.address, ray.workers, bundle, options, settings, conditioner, console.print
        ) as pool:
            yield pool
    else:
        with Generator(bundle, options, conditioner) as generator:
            preview = _previewed(generator, files.out / PREVIEW_NAME) if files.preview else None
            yield LocalDrawing(BatchDrawer(generator, settings), preview)


def parse_window(text: str) -> int | None:
    """A width, or None for ``auto``."""
    if text == "auto":
        return None
    if not re.fullmatch("-?[0-9]{1,6}", text):
        raise click.BadParameter(f"{shortened(text, 60)!r} is neither a width nor auto")
    return int(text)


@dataclass
class _Run:
    """One invocation: has drawn, batch by batch, what its folder does not hold yet, and writes the files."""

    manifest: Manifest
    request: RunRequest
    folder: RunFolder
    replay: Trace | None
    settings: BatchSettings
    orders: NDArray[np.int64] | None = None
    recorded: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def trace(self) -> Trace:
        """The write slots recorded."""
        request = self.request
        cache = self.request.cache or self.manifest.require_cache("a trace")
        header = TraceHeader(request.bundle_sha256, request.sampling, cache, request.samples)
        tokens = self.folder.arrays()["tokens"].astype(np.int64)
        slots = [self.recorded[number] for number in sorted(self.recorded)]
        return Trace(header, np.concatenate(slots), tokens)

    def draw(self, drawing: Drawing, console: Console) -> None:
        manifest = self.manifest
        size, parts = manifest.images, manifest.parts(self.request.sampling)
        count = -(-len(self.request.samples) // size)
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("lines" if manifest.groups is None else "groups"),
            TimeRemainingColumn(),
            console=console,
        )
        try:
            with progress:
                bar = PartBar(progress, progress.add_task("drawing", total=parts * count), parts)
                for finished in drawing.draw(self._tasks(count, bar), bar.reach):
                    for task, drawn in finished:
                        self._write_files(task, drawn)
                    self._record(finished)
                    for task, _ in finished:
                        bar.finish(task.number)
        finally:
            (self.folder.path / PREVIEW_NAME).unlink(missing_ok=True)

    def _tasks(self, count: int, bar: PartBar) -> Iterator[BatchTask]:
        """What is still to be drawn, or to be turned into pictures."""
        size, samples = self.manifest.images, self.request.samples
        for number in range(count):
            indices = range(number * size, min(len(samples), (number + 1) * size))
            group = samples[indices.start : indices.stop]
            if not self._is_finished(group, indices):
                replayed = None if self.replay is None else self.replay.of(indices)
                yield BatchTask(number, indices.start, group, replayed, orders=self._orders(indices))
            elif missing := [k for k in indices if not self._has_picture(k)]:
                tokens = np.stack([self.folder.done[k] for k in missing])
                group, orders = tuple(samples[k] for k in missing), self._orders(missing)
                yield BatchTask(number, indices.start, group, tokens=tokens, orders=orders)
            else:
                bar.finish(number)

    def _orders(self, indices: Sequence[int]) -> NDArray[np.int64] | None:
        """Those that a file tells, of some images of the run."""
        return None if self.orders is None else self.orders[list(indices)]

    def _is_finished(self, group: Sequence[Sample], indices: Sequence[int]) -> bool:
        """Whether a group's tokens are recorded and its maps drawn; maps need the cache, which is not recorded."""
        if any(index not in self.folder.done for index in indices):
            return False
        kind = self.settings.map_kind
        return kind is None or all(
            is_whole(self.folder.eviction_map(sample), self._recipe(index), kind)
            for index, sample in zip(indices, group, strict=True)
        )

    def _has_picture(self, index: int) -> bool:
        """Whether an image's picture is there, undamaged and of these settings."""
        return is_whole(self.folder.picture(self.request.samples[index]), self._recipe(index))

    def _recipe(self, index: int) -> Recipe:
        request, order = self.request, None if self.orders is None else self.orders[index]
        return Recipe.of(self.manifest, request.samples[index], request.sampling, request.cache, order)

    def _write_files(self, task: BatchTask, drawn: DrawnBatch) -> None:
        for sample, png in zip(task.samples, drawn.pictures, strict=True):
            write_encoded(self.folder.picture(sample), png)
        for sample, png in zip(task.samples, drawn.maps, strict=bool(drawn.maps)):
            write_encoded(self.folder.eviction_map(sample), png)
        if drawn.slots is not None:
            self.recorded[task.number] = drawn.slots

    def _record(self, finished: Sequence[Finished]) -> None:
        """Record the tokens of batches whose files are written."""
        rows = {
            task.first + offset: row
            for task, drawn in finished
            if task.tokens is None
            for offset, row in enumerate(drawn.tokens)
        }
        if rows:
            self.folder.record(rows)


@dataclass
class PartBar:
    """A bar of the parts, lines or groups, of all batches, whichever are drawn at a time."""

    progress: Progress
    task: TaskID
    parts: int
    finished: int = 0
    reached: dict[int, int] = field(default_factory=dict)

    def reach(self, number: int, parts: int) -> None:
        """So many parts of a batch are drawn."""
        self.reached[number] = parts
        self._show()

    def finish(self, number: int) -> None:
        """A batch is finished."""
        self.reached.pop(number, None)
        self.finished += 1
        self._show()

    def _show(self) -> None:
        self.progress.update(self.task, completed=self.finished * self.parts + sum(self.reached.values()))


PREVIEW_SHARE = 0.1
"""Of a run's time that goes into previews at the most: decoding a batch's pixels can take longer than drawing a line of tokens."""


def _previewed(generator: Generator, path: Path) -> Callable[[int, int], None]:
    """What refreshes the preview at ``path`` after a line, or a group, of a batch of so many images."""
    due = time.monotonic()

    def refresh(count: int, parts: int) -> None:
        nonlocal due
        begun = time.monotonic()
        if begun >= due:
            write_png(path, _preview(generator, count, parts))
            ended = time.monotonic()
            due = ended + (ended - begun) * (1 / PREVIEW_SHARE - 1)

    return refresh


def _preview(generator: Generator, count: int, parts: int) -> PIL.Image.Image:
    """What is drawn of the batch's images, so many lines or groups; what is still to come is grey."""
    manifest = generator.manifest
    pixels = generator.decoder(generator.tokens(count))
    if manifest.groups is None:
        drawn = np.arange(manifest.raster.image_tokens)[None] < parts * manifest.raster.line_width
    else:
        drawn = ~generator.undrawn(count)
    pixels *= drawn_pixels(manifest, drawn)
    return contact_sheet([picture(image) for image in pixels], [""] * len(pixels))


def _finish(folder: RunFolder, save_tokens: Path | None) -> None:
    samples = folder.request.samples
    shown = samples[:SHEET_IMAGES]
    columns = sheet_columns(len({sample.condition for sample in samples}), len(samples))
    sheet = contact_sheet(
        (read_picture(folder.picture(sample)) for sample in shown),
        [sample.label for sample in shown],
        columns,
    )
    write_png(folder.path / SHEET_NAME, sheet)
    if save_tokens is not None:
        write_arrays(save_tokens, folder.arrays())
