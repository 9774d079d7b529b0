"""Text files as people bring them: UTF-8 with or without a byte-order mark, lines that end in any of the three usual ways."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from linert.runtime.errors import LinertError

MOST_BYTES = 64 << 20
"""Longest text file that is read: a hundred times the longest ``config.json`` that is published."""

OTHER_ENCODINGS = {
    # The marks of UTF-32 begin like those of UTF-16.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
"""What git-lfs leaves in the place of a file that was not fetched begins with this."""


def is_utf8(name: str) -> bool:
    """Whether the bytes of a file's name are UTF-8, as most libraries need them. Python stands surrogates in the place of others."""
    return not re.search("[\ud800-\udfff]", name)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves in the place of one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_HEAD)) == LFS_HEAD


def lfs_remedy(path: Path) -> str:
    """A sentence for messages about a git-lfs pointer."""
    return f"{path} is a git-lfs pointer, not the file that it stands for: fetch that with git lfs pull, or download it"


def read_content(path: Path, most: int, error: type[LinertError]) -> bytes:
    """The bytes of a file.

    Args:
        error: what to raise.

    Raises:
        LinertError: ``error``: it cannot be read, or is longer than ``most`` bytes.
    """
    try:
        # A pipe has no size before it is read.
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror or fault}") from fault
    if len(content) > most:
        raise error(f"{path} is longer than {most >> 20} MiB: that is no text for this")
    return content


def read_text(path: Path, error: type[LinertError]) -> str:
    """The text of a file, without its byte-order mark.

    Args:
        error: what to raise.

    Raises:
        LinertError: ``error``: it cannot be read, is longer than :data:`MOST_BYTES`, is no UTF-8, or holds zero bytes.
    """
    content = read_content(path, MOST_BYTES, error)
    if content.startswith(LFS_HEAD):
        raise error(lfs_remedy(path))
    for mark, encoding in OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise error(f"{path} is text in {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(
            f"{path} is no text in UTF-8 (byte {fault.start} cannot be read so): save it as UTF-8"
        ) from fault
    if "\0" in text:
        raise error(f"{path} is no text: it holds zero bytes; if it is text in UTF-16, save it as UTF-8")
    return text


def read_lines(path: Path, error: type[LinertError]) -> list[str]:
    """The lines of a text file: what stands between line feeds, carriage returns, or both in a row. No other character ends a line.

    Raises:
        LinertError: as :func:`read_text` does.
    """
    return re.split(r"\r\n|\r|\n", read_text(path, error))


def read_json_object(path: Path, error: type[LinertError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        LinertError: as :func:`read_text` does; it is no JSON, is nested too deeply, or holds something else than an object.
    """
    text = read_text(path, error)
    try:
        content = json.loads(text)
    except RecursionError as fault:
        raise error(f"{path} is damaged: its JSON is nested too deeply") from fault
    except ValueError as fault:
        raise error(f"{path} is damaged: {fault}") from fault
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object")
    return content
