"""Results on disk: pictures with their recipe, contact sheets, token files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Manifest, Record
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.orders import Cells
from linert.runtime.drawing.samples import Condition, Sample, asked_for
from linert.runtime.errors import OutputError, RequestError
from linert.runtime.files.array_files import Arrays, read_arrays
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.files.records import RecordError, decode_record

SHEET_NAME = "contact_sheet.png"
METADATA_KEY = "linert"
MAP_KEY = "linert_map"

SHEET_IMAGES = 400
"""A contact sheet shows at most this many."""


class Recipe(Record, frozen=True):
    """Everything needed to make one image again; ``cache`` is None where the model has none. It stands in the PNG as text chunk ``linert``.

    ``order``: in which its tokens were drawn, if a file told that; else it is the seed's.
    """

    condition: Condition
    seed: int
    sampling: SamplingSettings
    cache: CacheSettings | None
    bundle_sha256: str
    checkpoint_sha256: str
    vq_sha256: str
    order: tuple[int, ...] = ()

    @staticmethod
    def of(
        manifest: Manifest,
        sample: Sample,
        sampling: SamplingSettings,
        cache: CacheSettings | None,
        order: Cells | None = None,
    ) -> Recipe:
        return Recipe(
            sample.condition,
            sample.seed,
            sampling,
            cache,
            manifest.sha256,
            manifest.model.source.sha256,
            manifest.image_decoder.source.sha256,
            () if order is None else tuple(order.tolist()),
        )


def encoded_png(image: PIL.Image.Image, recipe: Recipe | None = None, map_kind: str | None = None) -> bytes:
    """A PNG, with ``recipe`` as JSON in its ``linert`` text chunk, and in ``linert_map`` what kind of map of its image it is."""
    info = PIL.PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(METADATA_KEY, msgspec.json.encode(recipe).decode())
    if map_kind is not None:
        info.add_text(MAP_KEY, map_kind)
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    return encoded.getvalue()


def write_encoded(path: Path, png: bytes) -> None:
    """Write what :func:`encoded_png` made. It is whole under its name, but after a power cut may be found cut: :func:`is_whole` tells.

    Raises:
        OutputError: it cannot be written, or there is something at ``path`` that is no file: a pipe would be waited for.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is no file: move it away")
    with atomic_file(path, durable=False) as file:
        file.write(png)


def write_png(path: Path, image: PIL.Image.Image) -> None:
    """Write a picture that has no recipe. Raises what :func:`write_encoded` does."""
    write_encoded(path, encoded_png(image))


def read_picture(path: Path) -> PIL.Image.Image:
    """The RGB picture in a file that :func:`write_png` wrote."""
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG that ``linert run`` wrote.

    Raises:
        RequestError: no such picture, or it holds no recipe.
    """
    try:
        with PIL.Image.open(path) as image:
            text = image.info[METADATA_KEY]
        return decode_record(text, Recipe)
    except (OSError, KeyError, RecordError) as error:
        raise RequestError(f"{path} holds no linert recipe: {error}") from error


def is_whole(path: Path, recipe: Recipe, map_kind: str | None = None) -> bool:
    """Whether there is an undamaged picture at ``path`` that was drawn by ``recipe``, or the map of that ``map_kind`` of one."""
    # A pipe would be waited for.
    if not path.is_file():
        return False
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
    if not path.is_file():
        return False
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
    pictures: Iterable[PIL.Image.Image], captions: Sequence[str], columns: int | None = None
) -> PIL.Image.Image:
    """Lay pictures of one size out in a captioned grid, at least 96 pixels a tile.

    Args:
        pictures: one is held at a time. At least one.
        captions: as many, or :data:`SHEET_IMAGES` where there are more.
    """
    columns = columns or math.ceil(math.sqrt(len(captions)))
    rows = math.ceil(len(captions) / columns)
    font = PIL.ImageFont.load_default(size=12)
    gap, line = 6, 14
    sheet: PIL.Image.Image | None = None
    texts: list[list[str]] = []
    for index, image in zip(range(len(captions)), pictures, strict=False):
        zoom = max(1, math.ceil(96 / image.width))
        width, height = image.width * zoom, image.height * zoom
        texts = texts or [wrapped(text, width, font.getlength) for text in captions]
        cell = (width + gap, height + max(map(len, texts)) * line + 2 + gap)
        sheet = sheet or PIL.Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        for number, text in enumerate(texts[index]):
            PIL.ImageDraw.Draw(sheet).text((x, y + height + 1 + number * line), text, fill="black", font=font)
    if sheet is None:
        raise ValueError("a contact sheet of no pictures")
    return sheet


def wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """``text`` in lines of at most ``width`` by ``length``, one or more: broken between words, and within words that are too long."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def sheet_columns(conditions: int, images: int) -> int | None:
    """One column a condition while there are a few, so that rows share a seed."""
    return conditions if 1 < conditions <= 16 and images > conditions else None


def read_tokens(path: Path) -> Arrays:
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


def labels_of(samples: Sequence[Sample]) -> Arrays:
    """What was asked for, as an array of a token file."""
    asked = asked_for(samples)
    return {"classes" if asked.dtype.kind == "i" else "prompts": asked}
