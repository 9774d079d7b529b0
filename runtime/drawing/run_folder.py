"""The folder of a run: its pictures, what was asked for, and the tokens drawn so far.

A finished batch is recorded before the next begins, so that a run can go on where it stopped. One process at a time
writes into a folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Record
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.output import SHEET_NAME, is_foreign, labels_of, read_tokens
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import OutputError, RequestError
from linert.runtime.files.array_files import write_arrays
from linert.runtime.files.atomic_files import atomic_file, output_error
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.files.replacement import some_names, visible, working_folder

RUN_NAME = "run.json"
TOKENS_NAME = "tokens.npz"
PREVIEW_NAME = "preview.png"


class RunRequest(Record, frozen=True):
    """What a run folder holds the images of. ``trace_sha256``: of the trace replayed, empty if none; ``orders_sha256``: likewise of the
    orders that images are drawn in, if a file tells them."""

    samples: tuple[Sample, ...]
    sampling: SamplingSettings
    cache: CacheSettings | None
    bundle_sha256: str
    trace_sha256: str = ""
    orders_sha256: str = ""


@dataclass(frozen=True)
class RunFolder:
    """An open run folder. ``done``: tokens ``[N]`` int64 of the images that are finished, by their number in the request."""

    path: Path
    request: RunRequest
    done: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def picture(self, sample: Sample) -> Path:
        """Where a sample's picture lies."""
        return self.path / sample.file_name

    def eviction_map(self, sample: Sample) -> Path:
        """Where the map of what its cache kept lies."""
        return self.picture(sample).with_suffix(".evictions.png")

    def record(self, tokens: Mapping[int, NDArray[np.int64]]) -> None:
        """Record the tokens ``[N]`` of images, by their number in the request. Which are finished first does not matter."""
        self.done.update(tokens)
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


def check_run_folder(path: Path, *, resume: bool, force: bool) -> None:
    """Say before any work what would keep :func:`run_folder` from opening ``path``.

    Raises:
        OutputError: see :func:`run_folder`.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder; give another --out")
    try:
        names = visible(path) if path.exists() else None
    except OSError as error:
        raise output_error(path, error) from error
    if resume:
        if names is None:
            raise OutputError(f"{path} holds no run to resume: there is no such folder")
        if names and RUN_NAME not in names:
            raise OutputError(f"{path} holds no run to resume: there is no {RUN_NAME}")
    elif names and RUN_NAME not in names:
        raise OutputError(f"{path} exists and is not the folder of a run; give another --out")
    elif names and not force:
        raise OutputError(
            f"{path} exists; give another --out, --resume to continue the run in it, or --force to begin anew in its place"
        )


@contextlib.contextmanager
def run_folder(path: Path, request: RunRequest, *, resume: bool, force: bool) -> Iterator[RunFolder]:
    """Open ``path`` for ``request``, for this process alone.

    A folder without a run must be empty. Files in it that no run made stay as they are.

    Args:
        resume: go on with a run of the same request; begin it where the folder is empty.
        force: begin anew in the folder of a run; what that run drew is removed.

    Raises:
        OutputError: the folder exists, holds another run or what is none, cannot be written, or another process holds it.
    """
    check_run_folder(path, resume=resume, force=force)
    with working_folder(path) as empty:
        check_run_folder(path, resume=resume, force=force)
        record = path / RUN_NAME
        folder = RunFolder(path, request)
        if resume and not empty:
            known = _read_request(record)
            _check_same(path, known, request)
            folder.done.update(_read_done(path / TOKENS_NAME, request))
        else:
            if not empty:
                _remove_run(folder, _read_request(record))
            with atomic_file(record) as file:
                file.write(msgspec.json.format(msgspec.json.encode(request), indent=1) + b"\n")
        # A run that was killed leaves its last one.
        (path / PREVIEW_NAME).unlink(missing_ok=True)
        yield folder


def _read_request(record: Path) -> RunRequest:
    try:
        return read_record(record, RunRequest)
    except (FileNotFoundError, RecordError) as error:
        raise OutputError(f"{record} cannot be read ({error}); give another --out") from error


def _check_same(path: Path, known: RunRequest, request: RunRequest) -> None:
    names = [name for name in known.__struct_fields__ if getattr(known, name) != getattr(request, name)]
    if names:
        raise OutputError(
            f"{path} holds a run with other {', '.join(names)}; resume it with the same request, or give another --out"
        )


def _read_done(path: Path, request: RunRequest) -> dict[int, NDArray[np.int64]]:
    """The recorded tokens that belong to ``request``. None where the file is not there or was damaged: they are drawn again."""
    try:
        arrays = read_tokens(path)
    except RequestError:
        return {}
    tokens, numbers = arrays["tokens"], arrays.get("image", np.arange(0))
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or numbers.shape != tokens.shape[:1]:
        return {}
    if numbers.dtype.kind not in "iu" or not all(
        0 <= number < len(request.samples) for number in numbers.tolist()
    ):
        return {}
    seeds = [request.samples[number].seed for number in numbers.tolist()]
    if not np.array_equal(arrays.get("seeds", np.arange(0)), seeds):
        return {}
    return {number: row.astype(np.int64) for number, row in zip(numbers.tolist(), tokens, strict=True)}


def _remove_run(folder: RunFolder, known: RunRequest) -> None:
    """Remove what the run ``known`` in a folder made. Its record stays, so that it can be resumed, until it is replaced.

    Raises:
        OutputError: a picture that linert did not write has the name of one of the old or the new run.
    """
    samples = dict.fromkeys([*known.samples, *folder.request.samples])
    there = [path for path in map(folder.picture, samples) if path.exists()]
    if foreign := [path.name for path in there if is_foreign(path)]:
        raise OutputError(
            f"{folder.path} holds pictures that linert did not write: {some_names(foreign)}; move them, or give another --out"
        )
    try:
        for name in (TOKENS_NAME, SHEET_NAME):
            (folder.path / name).unlink(missing_ok=True)
        for sample in samples:
            folder.picture(sample).unlink(missing_ok=True)
            folder.eviction_map(sample).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(folder.path, error) from error
