"""Read the typed JSON files that linert writes, within bounds: of runs, of plans, of traces, of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from linert.runtime.text import brief

MOST_BYTES = 256 << 20
"""Longest record that is read; that of a run of a million images is shorter."""

T = TypeVar("T")


class RecordError(Exception):
    """A record cannot be read. The message is the reason, to be told with the name of the file and a remedy."""


def decode_record(data: bytes | str, kind: type[T]) -> T:
    """The record that ``data`` holds as JSON.

    Raises:
        RecordError: no JSON, or of another ``kind``.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise RecordError(brief(str(error))) from error


def read_record(path: Path, kind: type[T]) -> T:
    """The record in a file.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it cannot be read, is no regular file (to read a pipe may take for ever), or holds no such record.
    """
    try:
        if path.exists() and not path.is_file():
            raise RecordError("it is no regular file")
        if path.stat().st_size > MOST_BYTES:
            raise RecordError(f"it is longer than {MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from error
    return decode_record(data, kind)
