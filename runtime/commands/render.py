"""``linert render``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from runtime.backends import BackendOptions
from runtime.commands.backend_options import backend_options
from runtime.commands.bundle_argument import BundlePlace, bundle_argument
from runtime.errors import OutputError, RequestError
from runtime.generator import PixelDecoder, picture
from runtime.output import (
    SHEET_NAME,
    check_target,
    contact_sheet,
    make_folder,
    read_tokens,
    write_arrays,
    write_png,
)
from runtime.samples import shortened


@click.command()
@bundle_argument()
@click.argument("tokens", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures.")
@click.option(
    "--save-pixels",
    type=click.Path(path_type=Path),
    help="Also write the pixels (float32 NCHW before clamping) to this npz file.",
)
@click.option("--force", is_flag=True, help="Write into OUT though it exists.")
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
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder; give another --out")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; give another --out, or --force to write into it")
    check_target(save_pixels)
    arrays = read_tokens(tokens)
    rows = arrays["tokens"]
    asked = {name: arrays[name] for name in ("classes", "prompts") if name in arrays}
    if not len(rows):
        raise RequestError(f"{tokens} holds no images")
    for name, values in asked.items():
        if values.shape != rows.shape[:1]:
            raise RequestError(f"{tokens}: {len(rows)} images and {values.shape} {name}")
    pixels = PixelDecoder(place.open(), options)(rows)
    make_folder(out)
    shown = [picture(image) for image in pixels]
    captions = []
    for number, image in enumerate(shown):
        write_png(out / f"image_{number:06d}.png", image)
        label = "".join(f" · {shortened(str(values[number]))}" for values in asked.values())
        captions.append(f"{number}{label}")
    write_png(out / SHEET_NAME, contact_sheet(shown, captions))
    if save_pixels is not None:
        write_arrays(save_pixels, {"pixels": pixels.astype(np.float32, copy=False)})
    click.echo(f"{len(shown)} images: {out}")
