"""Files of torch.save: memory-mapped, checked against their directory, and never running code from the file."""

from __future__ import annotations

import argparse
import mmap
import pickle
import struct
import types
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from linert.runtime.errors import CheckpointError

ZIP_HEAD = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip entry: its signature, and the lengths of its name and of what follows that, before its data."""


class Inert:
    """Stands for an object of a training file that is no weight: it takes whatever makes one, and keeps nothing of it."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def plain_dict(*arguments: object) -> dict[Any, Any]:
    """An empty dictionary in the place of one with a factory of its own."""
    return {}


INERT = (
    *(
        f"{module}.{name}"
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    ),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer", "numpy.ndarray", "numpy.dtype"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "bool", "tuple", "frozenset")),
)
"""What training files hold beside weights, by the names under which pickles call it: numbers of numpy, paths, times."""

ALLOWED: list[tuple[Any, str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
    (plain_dict, "collections.defaultdict"),
    *((Inert, name) for name in INERT),
]
"""What may stand in a file beside tensors and containers, and what is made of it. Nothing else is looked up, and nothing is run."""


class Entry(NamedTuple):
    """A zip entry that holds a storage: its name, and where its data begin and how long they are, in bytes."""

    name: str
    offset: int
    length: int


class Storage(NamedTuple):
    """Memory of a loaded storage: its address and bytes."""

    address: int
    nbytes: int


def is_zip(path: Path) -> bool:
    """Whether torch takes a file for a zip, as torch.save has written them since 2020."""
    with path.open("rb") as file:
        return file.read(len(ZIP_HEAD)) == ZIP_HEAD


def load_torch(path: Path) -> Any:
    """What a file of torch.save holds, memory-mapped if it is a zip.

    Raises:
        CheckpointError: truncated, corrupt, compressed, no such file, or holding code; a storage is not as long as its entry.
    """
    zipped = is_zip(path)
    storages: list[Storage] = []

    def note(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        storages.append(Storage(storage.data_ptr(), storage.nbytes()))
        return storage

    where: str | Callable[..., Any] = note if zipped else "cpu"
    try:
        entries = checked_entries(path) if zipped else []
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            # Of pickle protocols, which say nothing to people.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=where, mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged pickle stream fails in whatever way its bytes lead to.
        raise _refused(path, error) from error
    if zipped:
        check_storages(path, storages, entries)
    return content


def checked_entries(path: Path) -> list[Entry]:
    """The entries that hold storages, in the order in which they lie in the file; all that a mapping relies on is checked.

    Raises:
        CheckpointError: entries are compressed, encrypted, named twice, overlap or lie outside of the file, or a checksum does
            not match.
        zipfile.BadZipFile: it is no zip.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        listed = archive.infolist()
        for entry in listed:
            # Before anything is inflated: a few kilobytes may promise gigabytes.
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise CheckpointError(
                    f"{path} is compressed ({entry.filename}), as torch.save never writes it: unpack it and put the checkpoint into a "
                    "file again with torch.save"
                )
        names = [entry.filename for entry in listed]
        if len(set(names)) != len(names):
            raise CheckpointError(f"{path} is corrupt: it has two entries of one name")
        entries = [_located(path, file, entry) for entry in listed]
        entries.sort(key=lambda entry: entry.offset)
        ends = [entry.offset + entry.length for entry in entries]
        starts = sorted(entry.header_offset for entry in listed)
        if any(end > start for end, start in zip(ends, [*starts[1:], archive.start_dir], strict=True)):
            raise CheckpointError(f"{path} is corrupt: its entries overlap")
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is corrupt: the checksum of {damaged} does not match")
    return [entry for entry in entries if "/data/" in entry.name]


def _located(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> Entry:
    """Where the data of an entry begin, by its own header."""
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) != LOCAL_HEADER.size or not header.startswith(ZIP_HEAD):
        raise CheckpointError(f"{path} is corrupt: {entry.filename} is not where its directory says")
    _, name_length, extra_length = LOCAL_HEADER.unpack(header)
    offset = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
    return Entry(entry.filename, offset, entry.file_size)


def check_storages(path: Path, storages: Sequence[Storage], entries: Sequence[Entry]) -> None:
    """Hold what was mapped to the entries of the file: a storage is one whole entry.

    A pickle says how long its storages are, and a mapping believes it: where an entry is shorter, the rest would be its neighbour's
    bytes.

    Raises:
        CheckpointError: a storage is longer or shorter than its entry, or no entry is where it lies.
    """
    lengths = {entry.offset: entry for entry in entries if entry.length}
    mapped = [storage for storage in storages if storage.nbytes]
    if not mapped:
        return
    # The file is mapped as a whole, from the beginning of a page.
    for first in lengths:
        base = mapped[0].address - first
        if base % mmap.PAGESIZE == 0 and all(s.address - base in lengths for s in mapped):
            break
    else:
        raise CheckpointError(f"{path} is corrupt: its entries are not where its weights are")
    for storage in mapped:
        entry = lengths[storage.address - base]
        if entry.length != storage.nbytes:
            raise CheckpointError(
                f"{path} is corrupt: {entry.name} has {entry.length} bytes, and the tensors that it is for take {storage.nbytes}"
            )


def _refused(path: Path, error: Exception) -> CheckpointError:
    """Why a file was not loaded."""
    message = str(error).strip()
    reason = message.split("\n")[0][:200] or type(error).__name__
    with path.open("rb") as file:
        pickled = file.read(1) == pickle.PROTO or is_zip(path)
    if (
        pickled
        and isinstance(error, pickle.UnpicklingError)
        and ("Unsupported global" in message or "WeightsUnpickler error" in message)
    ):
        return CheckpointError(
            f"{path} holds Python code or objects that are not weights; refused, nothing of it was run. "
            "Save the plain tensors (torch.save of the state dict, or safetensors) and try again. "
            f"({_named_global(message) or reason})"
        )
    return CheckpointError(f"{path} is truncated, corrupt or no checkpoint: {reason}")


def _named_global(message: str) -> str:
    """The sentence of torch's message that names what it refused."""
    for line in message.splitlines():
        if "Unsupported global" in line or "Unsupported operand" in line:
            return line.strip().removeprefix("WeightsUnpickler error: ").split(". Please")[0][:200]
    return ""
