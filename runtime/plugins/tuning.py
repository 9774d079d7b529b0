"""Launch parameters (warps, tiles) of the LineAttention kernels, measured on GPUs and kept in ``tuning.json`` beside this file.

The file is a list of :class:`Tuning` as JSON: ``[{"capability": 90, "head_pad": 64, "dtype": "float16", "warps": 1, "tile": 1024}]``.
A build reads it and stores the numbers in the plan, which knows nothing of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from linert.runtime.errors import ExportError
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.plugins.contracts import FLOAT_TYPES

FILE = Path(__file__).with_name("tuning.json")

WARP = 32
BYTES_OF_THREAD = 64
"""Of keys that a thread reads before it reckons where nothing was measured, and as many of values."""


class Tuning(msgspec.Struct, frozen=True, order=True):
    """What is fastest on a kind of GPU.

    ``capability``: 80 means 8.0. ``head_pad``: the head size, rounded up to a power of two. ``dtype``: of keys and values. ``warps``
    and ``tile``: see :class:`linert.runtime.plugins.line_attention.LineAttentionLaunch`.
    """

    capability: int
    head_pad: int
    dtype: str
    warps: int
    tile: int


def read_tunings(path: Path = FILE) -> tuple[Tuning, ...]:
    """What was measured.

    Raises:
        ExportError: the file cannot be read, or holds something else.
    """
    try:
        return read_record(path, tuple[Tuning, ...])
    except (FileNotFoundError, RecordError) as error:
        raise ExportError(
            f"what was measured of GPUs, {path}, cannot be read ({error}); it is a list of warps and tiles as JSON, []"
            " where nothing was measured"
        ) from error


def write_tunings(tunings: Iterable[Tuning], path: Path = FILE) -> None:
    """Put what was measured into the file, over what it says of the same GPUs, head sizes and types.

    Raises:
        ExportError: the file that is there cannot be read.
        OutputError: the file cannot be written; what is there is left.
    """
    known = read_tunings(path) if path.exists() else ()
    entries = {(entry.capability, entry.head_pad, entry.dtype): entry for entry in (*known, *tunings)}
    data = msgspec.json.format(msgspec.json.encode(sorted(entries.values())), indent=1)
    with atomic_file(path) as file:
        file.write(data + b"\n")


def tuning_of(capabilities: Sequence[int], head_pad: int, dtype: str, path: Path = FILE) -> Tuning:
    """What to use on GPUs of ``capabilities``.

    Kernels of one plan are laid out alike on all of its GPUs: the newest of them that something is known of decides. Where
    nothing is known, one warp, which waits for no other, reads as much as leaves registers for sixteen of them on a multiprocessor.

    Raises:
        ExportError: the file cannot be read.
    """
    known = [
        entry
        for entry in read_tunings(path)
        if entry.capability in capabilities and (entry.head_pad, entry.dtype) == (head_pad, dtype)
    ]
    return max(known, default=Tuning(0, head_pad, dtype, 1, WARP * BYTES_OF_THREAD // FLOAT_TYPES[dtype]))
