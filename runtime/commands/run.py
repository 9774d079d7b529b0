"""``linert run``: draw images from a bundle."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import click
import msgspec
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.cache_settings import CacheSettings, cache_text
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.condition_options import ConditionRequest, condition_options
from linert.runtime.commands.output_options import Output, output_options
from linert.runtime.commands.run_options import RunFiles, run_options
from linert.runtime.commands.settings_options import SamplingRequest, cache_options, sampling_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.eviction_map import MapKind, Residency, draw_map
from linert.runtime.drawing.generator import Generator, Replay, Tokens, picture
from linert.runtime.drawing.loop import LineEnds
from linert.runtime.drawing.output import (
    SHEET_IMAGES,
    SHEET_NAME,
    Recipe,
    contact_sheet,
    is_whole,
    read_picture,
    sheet_columns,
    write_png,
)
from linert.runtime.drawing.run_folder import (
    PREVIEW_NAME,
    RunFolder,
    RunRequest,
    run_folder,
)
from linert.runtime.drawing.samples import Sample, list_samples, shortened
from linert.runtime.drawing.trace import SlotRecorder, Trace, TraceHeader, read_trace
from linert.runtime.drawing.window_choice import WindowChoice
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
    output: Output,
) -> None:
    """Draw images from BUNDLE, one PNG an image and a contact sheet.

    One seed gives the same images every time, whatever the batch. The cache options choose among the policies that
    the bundle holds, and any budget that its buffer has room for.
    """
    files.check()
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
    generator = Generator(opened, options, conditioner)
    request = RunRequest(tuple(samples), drawn_by, settings, manifest.sha256, trace.digest if trace else "")
    console = output.notes()
    with run_folder(files.out, request, resume=files.resume, force=files.force) as folder:
        console.print(f"cache: {cache_text(settings)}")
        run = _Run(
            generator,
            request,
            folder,
            trace,
            files.eviction_map,
            files.record_trace is not None,
            files.preview,
            WindowChoice(manifest.windows) if window is None else window,
        )
        run.draw(console)
        if isinstance(run.window, WindowChoice):
            console.print(f"window: {run.window.text}")
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
    }
    lines = [f"{len(samples)} images: {folder.path}", f"contact sheet: {written['contact_sheet']}"]
    output.result(values, [f"trace: {files.record_trace}"] * (files.record_trace is not None) + lines)


def parse_window(text: str) -> int | None:
    """A width, or None for ``auto``."""
    if text == "auto":
        return None
    if not re.fullmatch("-?[0-9]{1,6}", text):
        raise click.BadParameter(f"{shortened(text, 60)!r} is neither a width nor auto")
    return int(text)


@dataclass
class _Run:
    """One invocation: draws, batch by batch, what its folder does not hold yet."""

    generator: Generator
    request: RunRequest
    folder: RunFolder
    replay: Trace | None
    map_kind: MapKind | None
    recording: bool
    preview: bool
    window: int | WindowChoice
    recorded: list[NDArray[np.int32]] = field(default_factory=list)

    def trace(self) -> Trace:
        """The write slots recorded."""
        request = self.request
        cache = self.request.cache or self.generator.manifest.require_cache("a trace")
        header = TraceHeader(request.bundle_sha256, request.sampling, cache, request.samples)
        tokens = self.folder.arrays()["tokens"].astype(np.int64)
        return Trace(header, np.concatenate(self.recorded), tokens)

    def draw(self, console: Console) -> None:
        generator, folder = self.generator, self.folder
        lines = generator.manifest.raster.lines
        groups = list(generator.batches(self.request.samples))
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("lines"),
            TimeRemainingColumn(),
            console=console,
        )
        preview_path = folder.path / PREVIEW_NAME
        try:
            with progress:
                task = progress.add_task("drawing", total=lines * len(groups))
                first = 0
                for number, group in enumerate(groups):
                    indices = range(first, first + len(group))
                    first += len(group)
                    if self._is_finished(group, indices):
                        tokens = np.stack([folder.done[index] for index in indices])
                        self._write_pictures(group, tokens, missing=True)
                    else:
                        advance = partial(_advance, progress, task, number * lines)
                        shown = preview_path if self.preview else None
                        on_line = _line_report(generator, len(group), shown, advance)
                        self._draw_batch(group, indices, on_line)
                    progress.update(task, completed=(number + 1) * lines)
        finally:
            preview_path.unlink(missing_ok=True)

    def _is_finished(self, group: Sequence[Sample], indices: Sequence[int]) -> bool:
        """Whether a group's tokens are recorded and its maps drawn; maps need the cache, which is not recorded."""
        if any(index not in self.folder.done for index in indices):
            return False
        return self.map_kind is None or all(
            is_whole(self.folder.eviction_map(sample), self._recipe(sample), self.map_kind)
            for sample in group
        )

    def _recipe(self, sample: Sample) -> Recipe:
        return Recipe.of(self.generator.manifest, sample, self.request.sampling, self.request.cache)

    def _draw_batch(
        self, group: Sequence[Sample], indices: Sequence[int], on_line: Callable[[int], None]
    ) -> None:
        manifest = self.generator.manifest
        residency = Residency(manifest) if self.map_kind else None
        recorder = SlotRecorder(manifest) if self.recording else None

        def watch(backend: Backend, ends: LineEnds) -> None:
            for watcher in (recorder, residency):
                if watcher is not None:
                    watcher(backend, ends)

        tokens = self.generator.draw(
            group,
            self.request.sampling,
            self.request.cache,
            replay=Replay(self.replay, indices) if self.replay else None,
            watcher=watch,
            on_line=on_line,
            window=self.window,
        )
        if recorder is not None:
            self.recorded.append(recorder.by_image()[: len(group)])
        self._write_pictures(group, tokens)
        if self.map_kind is not None and residency is not None:
            for number, sample in enumerate(group):
                with PIL.Image.open(self.folder.picture(sample)) as finished:
                    drawn = draw_map(finished, residency.image(number), manifest, self.map_kind)
                write_png(self.folder.eviction_map(sample), drawn, self._recipe(sample), self.map_kind)
        self.folder.record(indices[0], tokens)

    def _write_pictures(self, group: Sequence[Sample], tokens: Tokens, *, missing: bool = False) -> None:
        """Write a group's pictures, or only those that are missing, damaged or of other settings."""
        for sample, row in zip(group, tokens, strict=True):
            path, recipe = self.folder.picture(sample), self._recipe(sample)
            if not (missing and is_whole(path, recipe)):
                write_png(path, picture(self.generator.decoder(row[None])[0]), recipe)


def _advance(progress: Progress, task: TaskID, before: int, lines: int) -> None:
    progress.update(task, completed=before + lines)


PREVIEW_SHARE = 0.1
"""Of a run's time that goes into previews at the most: decoding a batch's pixels can take longer than drawing a line of tokens."""


def _line_report(
    generator: Generator, count: int, preview_path: Path | None, advance: Callable[[int], object]
) -> Callable[[int], None]:
    due = time.monotonic()

    def report(lines: int) -> None:
        nonlocal due
        advance(lines)
        begun = time.monotonic()
        if preview_path is not None and begun >= due:
            write_png(preview_path, _preview(generator, generator.tokens(count), lines))
            ended = time.monotonic()
            due = ended + (ended - begun) * (1 / PREVIEW_SHARE - 1)

    return report


def _preview(generator: Generator, tokens: Tokens, lines: int) -> PIL.Image.Image:
    """The finished lines of the batch's images; what is still to come is grey."""
    pixels = generator.decoder(tokens)
    pixels[:, :, lines * generator.manifest.image_decoder.patch :] = 0
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
