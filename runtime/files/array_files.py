"""Files of arrays (npz). What one holds is known before any of it is inflated: a small file may claim to be a large one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from linert.runtime.errors import OutputError, RequestError
from linert.runtime.files.atomic_files import atomic_file, check_target

Arrays = dict[str, NDArray[np.generic]]

MEMBER = ".npy"
USUAL_BYTES = 256 << 20
USUAL_RATIO = 64
"""Tokens and probabilities take at most a few times their compressed size; zeros, a thousand times."""


def check_arrays_target(path: Path | None) -> None:
    """Prepare for an npz file that is to be written at the end: one that is there is replaced, and nothing else is.

    Raises:
        OutputError: it will not be possible to write it, or another kind of file is there.
    """
    if path is not None and path.is_file() and path.stat().st_size and not _is_arrays(path):
        raise OutputError(f"{path} exists and is no npz file: give another name, or remove it")
    check_target(path)


def _is_arrays(path: Path) -> bool:
    """Whether a file is a zip of nothing but arrays: checkpoints are zips too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        # The last: a zip of a version that Python does not read.
        return False
    return bool(names) and all(name.endswith(MEMBER) for name in names)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write an npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()}
    )
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def write_parts(path: Path, name: str, count: int, parts: Iterable[NDArray[np.generic]]) -> None:
    """Write an npz file with one array, ``parts`` after each other along their first dimension: one is held at a time.

    Args:
        count: how many entries all parts have together, at least one.

    Raises:
        ValueError: they have another number, or differ in shape or dtype.
    """
    written, kind = 0, None
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name + MEMBER, "w", force_zip64=True) as member,
    ):
        for part in parts:
            if kind is None:
                kind = part.shape[1:], part.dtype
                header = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False}
                np.lib.format.write_array_header_2_0(member, {**header, "shape": (count, *part.shape[1:])})
            if (part.shape[1:], part.dtype) != kind:
                raise ValueError(f"parts of {name} differ: {kind} and {(part.shape[1:], part.dtype)}")
            written += len(part)
            member.write(np.ascontiguousarray(part).data)
        if written != count:
            raise ValueError(f"{written} entries of {name}, not {count}")


def read_arrays(path: Path, names: Collection[str] | None = None, most_bytes: int | None = None) -> Arrays:
    """Arrays of an npz file; nothing in it is run.

    Args:
        names: which of those that are there; None for all.
        most_bytes: what they may take in memory; None for what such a file usually does.

    Raises:
        RequestError: no such file, not an npz file, or larger in memory.
    """
    try:
        usual = USUAL_BYTES + USUAL_RATIO * path.stat().st_size
        if not path.is_file() or not zipfile.is_zipfile(path):
            raise RequestError(f"{path} is no npz file")
        with np.load(path, allow_pickle=False) as archive:
            chosen = [name for name in archive.files if names is None or name in names]
            members = {info.filename.removesuffix(MEMBER): info.file_size for info in archive.zip.infolist()}
            inflated = sum(members[name.removesuffix(MEMBER)] for name in chosen)
            if inflated > (usual if most_bytes is None else most_bytes):
                raise RequestError(
                    f"{path} would take {inflated / 1e9:.1f} GB in memory, far more than what it should hold"
                )
            arrays = {name: archive[name] for name in chosen}
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except RequestError:
        raise
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise RequestError(f"{path} is no npz file: {error}") from error
    except Exception as error:
        # zipfile and zlib raise types of their own for damaged archives.
        raise RequestError(f"{path} is damaged: {error}") from error
    if strange := sorted(name for name, values in arrays.items() if not isinstance(values, np.ndarray)):
        raise RequestError(f"{path} is damaged: {', '.join(strange)} is no array")
    return arrays
