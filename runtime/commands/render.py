"""``linert render``: turn saved tokens into pictures."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec
import numpy as np

from linert.runtime.backends.options import BackendOptions
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.drawing.generator import PixelDecoder, Pixels, picture
from linert.runtime.drawing.output import (
    SHEET_IMAGES,
    SHEET_NAME,
    contact_sheet,
    read_picture,
    read_tokens,
    write_png,
)
from linert.runtime.drawing.samples import shortened
from linert.runtime.errors import RequestError
from linert.runtime.files.array_files import check_arrays_target, write_parts
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.files.replacement import FolderKind, claim_folder, new_folder, visible

RENDER_NAME = "render.json"


def foreign_to_pictures(folder: Path) -> list[str] | None:
    """Names in ``folder`` that ``linert render`` did not put there; None if it has put nothing there."""
    names = visible(folder)
    if RENDER_NAME not in names:
        return None
    try:
        count = read_record(folder / RENDER_NAME, dict[str, int])["images"]
    except (FileNotFoundError, RecordError, KeyError):
        return None
    own = {RENDER_NAME, SHEET_NAME}
    return [name for name in names if name not in own and not _is_picture(name, count)]


def picture_name(number: int) -> str:
    """The file of a picture."""
    return f"image_{number:06d}.png"


def _is_picture(name: str, count: int) -> bool:
    number = name.removeprefix("image_").removesuffix(".png")
    return number.isdecimal() and int(number) < count and name == picture_name(int(number))


PICTURES = FolderKind("pictures of linert render", foreign_to_pictures)


@click.command()
@bundle_argument()
@click.argument("tokens", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures.")
@click.option(
    "--save-pixels",
    type=click.Path(path_type=Path),
    help="Also write the pixels (float32 NCHW before clamping) to this npz file.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a folder of rendered pictures.")
@backend_options()
def command(
    place: BundlePlace,
    tokens: Path,
    out: Path,
    save_pixels: Path | None,
    force: bool,
    options: BackendOptions,
) -> None:
    """Turn the saved TOKENS of ``linert run --save-tokens`` into pictures again, with BUNDLE's image decoder."""
    click.get_current_context().with_resource(claim_folder(out, PICTURES, force=force))
    check_arrays_target(save_pixels)
    if save_pixels is not None and save_pixels.resolve() in {out.resolve(), tokens.resolve()}:
        raise RequestError(
            f"{save_pixels} is to be written and named as something else too: give another --save-pixels"
        )
    arrays = read_tokens(tokens)
    rows = arrays["tokens"]
    asked = {name: arrays[name] for name in ("classes", "prompts") if name in arrays}
    if not len(rows):
        raise RequestError(f"{tokens} holds no images")
    for name, values in asked.items():
        if values.shape != rows.shape[:1]:
            raise RequestError(f"{tokens}: {len(rows)} images and {values.shape} {name}")
    decoder, count = PixelDecoder(place.open(), options), len(rows)
    parts = decoder.parts(rows)
    with new_folder(out, PICTURES, force=force) as folder:
        drawn = _written(parts, folder)
        if save_pixels is None:
            collections.deque(drawn, maxlen=0)
        else:
            write_parts(save_pixels, "pixels", count, drawn)
        captions = [
            " · ".join([str(number), *(shortened(str(values[number])) for values in asked.values())])
            for number in range(min(count, SHEET_IMAGES))
        ]
        pictures = (read_picture(folder / picture_name(number)) for number in range(count))
        write_png(folder / SHEET_NAME, contact_sheet(pictures, captions))
        with atomic_file(folder / RENDER_NAME) as file:
            file.write(msgspec.json.encode({"images": count}) + b"\n")
    click.echo(f"{count} images: {out}")


def _written(parts: Iterable[Pixels], folder: Path) -> Iterator[Pixels]:
    """``parts``, each once its pictures are in ``folder``."""
    number = 0
    for part in parts:
        for image in part:
            write_png(folder / picture_name(number), picture(image))
            number += 1
        yield part.astype(np.float32, copy=False)
