"""Results on disk: pictures with their recipe, contact sheets, token files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.geometry import CacheSettings
from runtime.manifest import Manifest, Record, SamplingSettings
from runtime.replacement import atomic_file
from runtime.samples import Condition, Sample, asked_for

SHEET_NAME = "contact_sheet.png"
METADATA_KEY = "linert"
MAP_KEY = "linert_map"

SHEET_IMAGES = 400
"""A contact sheet shows at most this many."""


class Recipe(Record, frozen=True):
    """Everything needed to make one image again; ``cache`` is None where the model has none. It stands in the PNG as text chunk ``linert``."""

    condition: Condition
    seed: int
    sampling: SamplingSettings
    cache: CacheSettings | None
    bundle_sha256: str
    checkpoint_sha256: str
    vq_sha256: str

    @staticmethod
    def of(
        manifest: Manifest, sample: Sample, sampling: SamplingSettings, cache: CacheSettings | None
    ) -> Recipe:
        return Recipe(
            sample.condition,
            sample.seed,
            sampling,
            cache,
            manifest.sha256,
            manifest.model.source.sha256,
            manifest.image_decoder.source.sha256,
        )


def write_png(
    path: Path, image: PIL.Image.Image, recipe: Recipe | None = None, map_kind: str | None = None
) -> None:
    """Write a PNG, with ``recipe`` as JSON in its ``linert`` text chunk, and in ``linert_map`` what kind of map of its image it is.

    It is whole under its name, but after a power cut may be found cut: :func:`is_whole` tells.
    """
    info = PIL.PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(METADATA_KEY, msgspec.json.encode(recipe).decode())
    if map_kind is not None:
        info.add_text(MAP_KEY, map_kind)
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    with atomic_file(path, durable=False) as file:
        file.write(encoded.getbuffer())


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG that ``linert run`` wrote.

    Raises:
        RequestError: no such picture, or it holds no recipe.
    """
    try:
        with PIL.Image.open(path) as image:
            text = image.info[METADATA_KEY]
        return msgspec.json.decode(text, type=Recipe)
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise RequestError(f"{path} holds no linert recipe: {error}") from error


def is_whole(path: Path, recipe: Recipe, map_kind: str | None = None) -> bool:
    """Whether there is an undamaged picture at ``path`` that was drawn by ``recipe``, or the map of that ``map_kind`` of one."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as image:
            known = msgspec.json.decode(image.info[METADATA_KEY], type=Recipe)
            kind = image.info.get(MAP_KEY)
            image.verify()
    except Exception:
        # Pillow raises errors of many types for damaged files.
        return False
    return known == recipe and kind == map_kind


def is_foreign(path: Path) -> bool:
    """Whether a file is a picture, and one that linert did not write."""
    try:
        with PIL.Image.open(path) as image:
            if METADATA_KEY in image.info:
                return False
            image.verify()
    except PIL.Image.DecompressionBombError:
        return True
    except Exception:
        # Pillow raises errors of many types for damaged files.
        return False
    return True


def contact_sheet(
    pictures: Sequence[PIL.Image.Image], captions: Sequence[str], columns: int | None = None
) -> PIL.Image.Image:
    """Lay pictures of one size out in a captioned grid, at least 96 pixels a tile."""
    pictures, captions = pictures[:SHEET_IMAGES], captions[:SHEET_IMAGES]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    zoom = max(1, math.ceil(96 / width))
    width, height = width * zoom, height * zoom
    font = PIL.ImageFont.load_default(size=12)
    gap, caption = 6, 16
    cell = (width + gap, height + caption + gap)
    sheet = PIL.Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    drawing = PIL.ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        drawing.text((x, y + height + 1), text, fill="black", font=font)
    return sheet


def sheet_columns(conditions: int, images: int) -> int | None:
    """One column a condition while there are a few, so that rows share a seed."""
    return conditions if 1 < conditions <= 16 and images > conditions else None


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write an npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()}
    )
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of an npz file; nothing in it is run.

    Raises:
        RequestError: no such file, or not an npz file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise RequestError(f"{path} is no npz file: {error}") from error
    except Exception as error:
        # zipfile and zlib raise types of their own for damaged archives.
        raise RequestError(f"{path} is damaged: {error}") from error
    if strange := sorted(name for name, values in arrays.items() if not isinstance(values, np.ndarray)):
        raise RequestError(f"{path} is damaged: {', '.join(strange)} is no array")
    return arrays


def read_tokens(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a token file; ``tokens`` is among them.

    Raises:
        RequestError: no such file, not an npz file, without ``tokens``, or with others than ``[images, N]``.
    """
    arrays = read_arrays(path)
    if "tokens" not in arrays:
        raise RequestError(f"{path} has no array 'tokens'; it has {', '.join(sorted(arrays)) or 'none'}")
    if arrays["tokens"].ndim != 2:
        raise RequestError(
            f"{path}: tokens must have two dimensions, images and tokens, not the shape {arrays['tokens'].shape}"
        )
    return arrays


def labels_of(samples: Sequence[Sample]) -> dict[str, NDArray[np.generic]]:
    """What was asked for, as an array of a token file."""
    asked = asked_for(samples)
    return {"classes" if asked.dtype.kind == "i" else "prompts": asked}
