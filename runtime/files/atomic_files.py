"""Files that appear under their names whole or not at all.

What is new is made beside its name, reaches the disk, and takes its name in one step. What a dead process left unfinished is
removed when the same name is written again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linert.runtime.errors import OutputError
from linert.runtime.files.locks import (
    Leftover,
    LockOwner,
    is_at,
    leftovers,
    lock_descriptor,
    new_token,
    partial_path,
)

_WINDOWS = sys.platform == "win32"


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that becomes ``path`` when the block succeeds and vanishes when not.

    A link stays a link to what is replaced. Devices and pipes are written to as they are.

    Args:
        durable: whether it must outlast a power cut from now on. Without, it may be found cut afterwards.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                yield file
            return
        target = path.resolve() if path.is_symlink() else path
        partial = partial_path(target, new_token())
        try:
            with _locked_file(partial) as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                if _WINDOWS:
                    file.close()
                partial.replace(target)
            if durable:
                sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked for as long as it is open, so that nobody takes it for abandoned."""
    while True:
        with path.open("xb") as file:
            lock_descriptor(file.fileno())
            if _WINDOWS or is_at(file.fileno(), path):
                yield file
                return


def check_target(path: Path | None) -> None:
    """Prepare for a file that is to be written at the end: remove what dead processes left of it.

    Raises:
        OutputError: it will not be possible to write it.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file; give another name")
    target = path.resolve() if path.is_symlink() else path
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {target.parent}")
    if path.exists() and not path.is_file():
        return
    check_writable(path, target.parent)
    for left in leftovers(target.parent, target.name):
        if left.path.is_file():
            remove_unfinished(left)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path, error: OSError) -> OutputError:
    """What to tell people when the file system refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {path} was not written")
    named = error.filename
    elsewhere = isinstance(named, str) and not Path(named).absolute().is_relative_to(path.absolute().parent)
    return OutputError(f"cannot write {path}: {f'{named}: ' if elsewhere else ''}{error.strerror or error}")


def check_writable(out: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error} in {folder}; give a place that can be written to"
        ) from error


def remove_unfinished(left: Leftover) -> None:
    """Remove an unfinished file whose owner is dead, if it is."""
    with contextlib.suppress(OSError), left.path.open("r+b") as file:
        owner = lock_descriptor(file.fileno())
        if owner is not LockOwner.ANOTHERS and left.abandoned(sure=owner is LockOwner.OURS):
            left.path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Let every file of a folder reach the disk, and their names."""
    for place, _, names in os.walk(folder):
        if not _WINDOWS:
            # Windows syncs only what is open for writing.
            for name in names:
                _sync(Path(place) / name)
        sync_folder(Path(place))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can do that."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.EACCES,
            errno.EPERM,
            errno.EISDIR,
            errno.ENOTSUP,
        ):
            raise
