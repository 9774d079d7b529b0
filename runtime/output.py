"""Results on disk: pictures with their recipe, contact sheets, token files, and resumable run folders.

Every file is written beside its name and renamed, so that it exists whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin
from numpy.typing import NDArray

from runtime.errors import OutputError, RequestError
from runtime.geometry import CacheSettings
from runtime.manifest import Manifest, Record, SamplingSettings
from runtime.samples import Condition, Sample, asked_for

RUN_NAME = "run.json"
TOKENS_NAME = "tokens.npz"
SHEET_NAME = "contact_sheet.png"
PREVIEW_NAME = "preview.png"
METADATA_KEY = "linert"

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


class RunRequest(Record, frozen=True):
    """What a run folder holds the images of. ``trace_sha256``: of the trace replayed, empty if none."""

    samples: tuple[Sample, ...]
    sampling: SamplingSettings
    cache: CacheSettings | None
    bundle_sha256: str
    trace_sha256: str = ""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes ``path`` when the block succeeds and vanishes when not.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(path, error) from error


def check_target(path: Path | None) -> None:
    """Raise :class:`OutputError` now if the folder of a file to be written at the end is not there."""
    if path is not None and not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")


def write_png(path: Path, image: PIL.Image.Image, recipe: Recipe | None = None) -> None:
    """Write a PNG, with ``recipe`` as JSON in its ``linert`` text chunk."""
    info = PIL.PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(METADATA_KEY, msgspec.json.encode(recipe).decode())
    with atomic_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


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
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise RequestError(f"{path} is no npz file: {error}") from error
    except Exception as error:
        # zipfile and zlib raise types of their own for damaged archives.
        raise RequestError(f"{path} is damaged: {error}") from error


def read_tokens(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a token file; ``tokens`` is among them.

    Raises:
        RequestError: no such file, not an npz file, or without ``tokens``.
    """
    arrays = read_arrays(path)
    if "tokens" not in arrays:
        raise RequestError(f"{path} has no array 'tokens'; it has {', '.join(sorted(arrays)) or 'none'}")
    return arrays


def labels_of(samples: Sequence[Sample]) -> dict[str, NDArray[np.generic]]:
    """What was asked for, as an array of a token file."""
    asked = asked_for(samples)
    return {"classes" if asked.dtype.kind == "i" else "prompts": asked}


class RunFolder:
    """The folder of a run: pictures, the request, and the tokens drawn so far.

    A finished batch is recorded before the next begins, so that a run can go on where it stopped.
    """

    def __init__(self, path: Path, request: RunRequest, *, resume: bool, force: bool) -> None:
        """Open ``path`` for ``request``.

        Args:
            resume: go on with a run of the same request.
            force: write into a folder that exists; pictures of the same name are replaced.

        Raises:
            OutputError: the folder exists, cannot be written, or (resuming) holds another run or none.
        """
        self.path = path
        self.request = request
        self.done: dict[int, NDArray[np.int64]] = {}
        record = path / RUN_NAME
        if resume:
            self._check_same(record)
            if (path / TOKENS_NAME).exists():
                arrays = read_tokens(path / TOKENS_NAME)
                numbers = arrays.get("image", np.arange(0))
                self.done = {
                    int(n): row.astype(np.int64) for n, row in zip(numbers, arrays["tokens"], strict=True)
                }
            return
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file, not a folder; give another --out")
        if path.exists() and not force:
            raise OutputError(
                f"{path} exists; give another --out, --resume to continue the run in it, or --force"
            )
        make_folder(path)
        (path / TOKENS_NAME).unlink(missing_ok=True)
        with atomic_file(record) as file:
            file.write(msgspec.json.format(msgspec.json.encode(request), indent=1) + b"\n")

    def _check_same(self, record: Path) -> None:
        try:
            known = msgspec.json.decode(record.read_bytes(), type=RunRequest)
        except FileNotFoundError:
            raise OutputError(f"{self.path} holds no run to resume: there is no {record.name}") from None
        except (OSError, msgspec.DecodeError) as error:
            raise OutputError(f"{record} cannot be read: {error}") from error
        if known != self.request:
            names = [f for f in known.__struct_fields__ if getattr(known, f) != getattr(self.request, f)]
            raise OutputError(
                f"{self.path} holds a run with other {', '.join(names)}; "
                "resume it with the same request, or give another --out"
            )

    def record(self, first: int, tokens: NDArray[np.int64]) -> None:
        """Record the tokens ``[n, N]`` of images ``first`` .. ``first + n - 1``."""
        self.done |= {first + offset: row for offset, row in enumerate(tokens)}
        write_arrays(self.path / TOKENS_NAME, self.arrays())

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a token file holds: ``tokens [images, N]``, and each image's ``seeds`` and number ``image``, all int64; and its
        ``classes`` int64, or its ``prompts``."""
        numbers = sorted(self.done)
        samples = [self.request.samples[n] for n in numbers]
        return {
            "tokens": np.stack([self.done[n] for n in numbers]),
            **labels_of(samples),
            "seeds": np.array([sample.seed for sample in samples], np.int64),
            "image": np.array(numbers, np.int64),
        }


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {path} was not written")
    return OutputError(f"cannot write {path}: {error.strerror or error}")
