"""``linert run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import msgspec
import numpy as np
import PIL.Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from runtime.errors import RequestError
from runtime.generator import Generator, Sample, Tokens, picture, plan
from runtime.manifest import SamplingSettings
from runtime.output import (
    PREVIEW_NAME,
    SHEET_IMAGES,
    SHEET_NAME,
    Recipe,
    RunFolder,
    RunRequest,
    check_target,
    contact_sheet,
    picture_name,
    sheet_columns,
    write_arrays,
    write_png,
)


def parse_classes(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """``3,7`` or ``0-9`` or a mixture."""
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            classes += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise click.BadParameter(f"{text!r} is no list of classes like 3,7 or 0-9") from None
    return tuple(classes)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--classes", required=True, callback=parse_classes, help="Classes, like 3,7 or 0-9; they take turns."
)
@click.option("--num-images", type=int, help="Images in all. Default: one a class.")
@click.option(
    "--seed", default=0, show_default=True, help="Seed of each class's first image; the next has one more."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures.")
@click.option("--greedy", is_flag=True, help="Take the most likely token instead of a draw.")
@click.option("--guidance", type=float, help="Guidance scale. Default: the bundle's, like the next four.")
@click.option("--guidance-interval", type=int, help="Last guided decode step; -1 guides all.")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int, help="0 keeps all tokens.")
@click.option("--top-p", type=float, help="1 keeps all tokens.")
@click.option(
    "--save-tokens", type=click.Path(path_type=Path), help="Also write the tokens to this npz file."
)
@click.option("--preview", is_flag=True, help=f"Refresh OUT/{PREVIEW_NAME} as lines finish.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run in OUT.")
@click.option("--force", is_flag=True, help="Write into OUT though it exists.")
@click.option("--threads", default=0, help="CPU threads. Default: one a core.")
def command(
    bundle: Path,
    classes: tuple[int, ...],
    num_images: int | None,
    seed: int,
    out: Path,
    greedy: bool,
    guidance: float | None,
    guidance_interval: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    save_tokens: Path | None,
    preview: bool,
    resume: bool,
    force: bool,
    threads: int,
) -> None:
    """Draw images from BUNDLE, one PNG an image and a contact sheet.

    One seed gives the same images every time, whatever the batch.
    """
    check_target(save_tokens)
    generator = Generator(bundle, threads=threads)
    manifest = generator.manifest
    samples = plan(manifest, classes, num_images, seed)
    given = {
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "greedy": greedy or None,
    }
    sampling = msgspec.structs.replace(
        manifest.sampling, **{name: value for name, value in given.items() if value is not None}
    )
    if faults := sampling.faults(guided=manifest.guided):
        raise RequestError("; ".join(faults))
    request = RunRequest(classes, len(samples), seed, sampling, manifest.sha256)
    folder = RunFolder(out, request, resume=resume, force=force)
    _draw(generator, samples, sampling, folder, preview=preview)
    _finish(folder, samples, save_tokens)


def _draw(
    generator: Generator,
    samples: list[Sample],
    sampling: SamplingSettings,
    folder: RunFolder,
    *,
    preview: bool,
) -> None:
    """Draw, batch by batch, what the folder does not hold yet."""
    manifest = generator.manifest
    lines = manifest.raster.lines
    groups = list(generator.batches(samples))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lines"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    preview_path = folder.path / PREVIEW_NAME
    try:
        with progress:
            task = progress.add_task("drawing", total=lines * len(groups))
            first = 0
            for number, group in enumerate(groups):
                indices = range(first, first + len(group))
                first += len(group)
                if all(index in folder.done for index in indices):
                    tokens = np.stack([folder.done[index] for index in indices])
                    _write_pictures(generator, group, tokens, sampling, folder.path, missing=True)
                else:
                    advance = partial(_advance, progress, task, number * lines)
                    on_line = _line_report(generator, preview_path if preview else None, advance)
                    tokens = generator.draw(group, sampling, on_line)
                    _write_pictures(generator, group, tokens, sampling, folder.path)
                    folder.record(indices[0], tokens, [s.class_id for s in samples])
                progress.update(task, completed=(number + 1) * lines)
    finally:
        preview_path.unlink(missing_ok=True)


def _advance(progress: Progress, task: TaskID, before: int, lines: int) -> None:
    progress.update(task, completed=before + lines)


def _line_report(
    generator: Generator, preview_path: Path | None, advance: Callable[[int], object]
) -> Callable[[int, Tokens], None]:
    def report(lines: int, tokens: Tokens) -> None:
        advance(lines)
        if preview_path is not None:
            write_png(preview_path, _preview(generator, tokens, lines))

    return report


def _preview(generator: Generator, tokens: Tokens, lines: int) -> PIL.Image.Image:
    """The finished lines of the batch's images; what is still to come is grey."""
    pixels = generator.decoder(tokens)
    pixels[:, :, lines * generator.manifest.image_decoder.patch :] = 0
    return contact_sheet([picture(image) for image in pixels], [""] * len(pixels))


def _write_pictures(
    generator: Generator,
    group: Sequence[Sample],
    tokens: Tokens,
    sampling: SamplingSettings,
    folder: Path,
    *,
    missing: bool = False,
) -> None:
    """Write a group's pictures, or only those that are missing."""
    for sample, row in zip(group, tokens, strict=True):
        path = folder / picture_name(sample.class_id, sample.seed)
        if missing and path.exists():
            continue
        recipe = Recipe.of(generator.manifest, sample.class_id, sample.seed, sampling)
        write_png(path, picture(generator.decoder(row[None])[0]), recipe)


def _finish(folder: RunFolder, samples: list[Sample], save_tokens: Path | None) -> None:
    classes = [sample.class_id for sample in samples]
    names = [picture_name(sample.class_id, sample.seed) for sample in samples]
    shown = []
    for name in names[:SHEET_IMAGES]:
        with PIL.Image.open(folder.path / name) as image:
            shown.append(image.convert("RGB"))
    captions = [f"{sample.class_id} · {sample.seed}" for sample in samples]
    columns = sheet_columns(len(set(classes)), len(samples))
    write_png(folder.path / SHEET_NAME, contact_sheet(shown, captions[: len(shown)], columns))
    if save_tokens is not None:
        write_arrays(save_tokens, folder.arrays(classes))
    click.echo(f"{len(samples)} images: {folder.path}")
    click.echo(f"contact sheet: {folder.path / SHEET_NAME}")
