"""Files and folders that appear under their names whole or not at all: everything that linert keeps is written here.

What is new is made beside its name, reaches the disk, and takes its name in one step. A folder that is replaced changes
places with the new one in one step where the system can do that (Linux); elsewhere there are two steps, and whoever
opens or writes the folder next finishes what was cut between them. What a dead process left unfinished is removed when
the same name is written again; what a live one has under way stays, and its name is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from linert.runtime.errors import OutputError
from linert.runtime.files.locks import (
    Held,
    Leftover,
    Lock,
    is_at,
    is_hidden_name,
    leftovers,
    lock_descriptor,
    lock_path,
    new_token,
    partial_path,
    replaced_path,
)
from linert.runtime.files.mounts import is_mount_point

FOLDER_LOCK = ".linert-lock"
"""The lock file of whoever writes into a folder."""

SCRATCH = "linert-scratch"

_IGNORED = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"})
"""What systems put into folders by themselves: it counts as nothing."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_WINDOWS = sys.platform == "win32"


class _Claims(threading.local):
    """The names that this thread holds."""

    def __init__(self) -> None:
        self.targets: set[Path] = set()


_claims = _Claims()


@dataclass(frozen=True)
class FolderKind:
    """What a command may replace.

    ``title``: for people, like ``a bundle``. ``foreign``: names in a folder that do not belong to one; None if the folder is
    none at all.
    """

    title: str
    foreign: Callable[[Path], list[str] | None]


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
                _sync_folder(target.parent)
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
    _check_writable(path, target.parent)
    for left in leftovers(target.parent, target.name):
        if left.path.is_file():
            _remove_file(left)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        OutputError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error


@contextlib.contextmanager
def claim_folder(out: Path, kind: FolderKind, *, force: bool) -> Iterator[None]:
    """Hold the name ``out`` from now on, for a :func:`new_folder` that comes after long work; say now what would keep it from being made.

    Raises:
        OutputError: see :func:`new_folder`.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as held:
            try:
                target = _target_of(out)
                _check_replaceable(out, target, kind, force=force)
                made += _make_parents(target)
                _check_writable(out, target.parent)
                held.enter_context(_claimed(out, target))
                _check_replaceable(out, target, kind, force=force)
            except OSError as error:
                raise output_error(out, error) from error
            yield
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def new_folder(out: Path, kind: FolderKind, *, force: bool) -> Iterator[Path]:
    """Yield a temporary neighbour of ``out`` that becomes ``out`` when the block succeeds and is removed when not.

    What is in it is on the disk before it takes the name. A link to a folder stays one. If ``out`` cannot be had in the
    end, because somebody else has written it meanwhile, what was made is kept under another name.

    Args:
        force: replace ``out`` if it is of this ``kind`` and holds nothing else. An empty folder is replaced in any case.

    Raises:
        OutputError: ``out`` exists and may not be replaced, another process is writing it, or the file system refuses.
    """
    target = _target_of(out)
    partial = partial_path(target, new_token())
    try:
        _check_replaceable(out, target, kind, force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(out, target):
            _check_replaceable(out, target, kind, force=force)
            try:
                partial.mkdir()
                yield partial
                _sync_tree(partial)
                _publish(out, target, partial, kind, force=force)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BrokenPipeError:
        # Whoever reads what is printed has left.
        raise
    except OSError as error:
        raise output_error(out, error) from error


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[bool]:
    """Hold a folder for writing, alone; yields whether it was empty. It is created if it is not there.

    What dead processes left unfinished in it is removed. If it was created and the block leaves it empty, so is it.

    Raises:
        OutputError: another process holds it, or the file system refuses.
    """
    made: list[Path] = []
    lock = None
    try:
        try:
            target = _target_of(path)
            made += _make_parents(target / FOLDER_LOCK)
            lock = _take(path, target / FOLDER_LOCK)
            for left in leftovers(target):
                if left.path.is_file():
                    _remove_file(left)
            empty = is_empty(target)
        except OSError as error:
            raise output_error(path, error) from error
        yield empty
    finally:
        if lock is not None:
            lock.release()
        _remove_empty(made)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for what nobody keeps, in the system's temporary folder; those of dead processes are removed first."""
    if _WINDOWS:
        # Folders cannot be locked there.
        with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    wanted = Path(tempfile.gettempdir()) / SCRATCH
    for left in leftovers(wanted.parent, wanted.name):
        with _locked_folder(left.path) as held:
            if held is Held.OURS:
                shutil.rmtree(left.path, ignore_errors=True)
    while True:
        folder = partial_path(wanted, new_token())
        try:
            folder.mkdir(mode=0o700)
            with _locked_folder(folder) as held:
                if held is not Held.ANOTHERS:
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def recover(path: Path) -> bool:
    """Finish a replacement of the folder ``path`` that was cut between its two steps; whether the folder is there now."""
    if not path.exists() and any(left.state == "replaced" for left in leftovers(path.parent, path.name)):
        with contextlib.suppress(OutputError, OSError), _claimed(path, path):
            pass
    return path.exists()


def is_empty(path: Path) -> bool:
    """Whether a folder holds nothing but what systems and unfinished work put there."""
    return not visible(path)


def visible(path: Path) -> list[str]:
    """What a folder holds, without what systems and unfinished work put there."""
    return sorted(name for name in os.listdir(path) if name not in _IGNORED and not is_hidden_name(name))


def output_error(path: Path, error: OSError) -> OutputError:
    """What to tell people when the file system refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {path} was not written")
    named = error.filename
    elsewhere = isinstance(named, str) and not Path(named).absolute().is_relative_to(path.absolute().parent)
    return OutputError(f"cannot write {path}: {f'{named}: ' if elsewhere else ''}{error.strerror or error}")


def some_names(names: list[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _target_of(out: Path) -> Path:
    """The path that ``out`` stands for, without links.

    Raises:
        OutputError: it is a link to nothing.
    """
    if out.is_symlink() and not out.exists():
        raise OutputError(f"{out} is a link to nothing; give another --out")
    return out.resolve()


def _check_replaceable(out: Path, target: Path, kind: FolderKind, *, force: bool) -> None:
    """Raise :class:`OutputError` if there is something at ``target`` that may not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"{out} is a file, not a folder; give another --out")
    if is_mount_point(target):
        raise OutputError(
            f"{out} is a mount point, which nothing can replace in one step; give a folder in it, like {out / 'new'}"
        )
    if is_empty(target):
        return
    foreign = kind.foreign(target)
    if foreign is None:
        raise OutputError(f"{out} exists and is not {kind.title}; give another --out")
    if not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    if foreign:
        raise OutputError(
            f"{out} holds more than {kind.title} and is not replaced: {some_names(foreign)}; move what is yours, or give "
            "another --out"
        )


def _check_writable(out: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error} in {folder}; give a place that can be written to"
        ) from error


def _take(out: Path, path: Path) -> Lock:
    lock = Lock.take(path)
    if lock is None:
        raise OutputError(f"another linert is writing {out} now; wait for it, or give another --out")
    return lock


@contextlib.contextmanager
def _claimed(out: Path, target: Path) -> Iterator[None]:
    """Hold the name ``target``, after finishing, undoing or removing what dead processes left of it.

    Where this thread holds it already, nothing is done.

    Raises:
        OutputError: another process, or another thread, holds it.
        OSError: the file system refuses.
    """
    if target in _claims.targets:
        yield
        return
    lock = _take(out, lock_path(target))
    _claims.targets.add(target)
    try:
        left = [left for left in leftovers(target.parent, target.name) if left.abandoned(sure=lock.sure)]
        for replaced in (item for item in left if item.state == "replaced"):
            made = partial_path(target, replaced.token)
            if not target.exists():
                # The new one was complete before the old one moved.
                (made if made.is_dir() else replaced.path).rename(target)
        for item in left:
            if item.path.is_dir():
                shutil.rmtree(item.path, ignore_errors=True)
            elif item.path.exists():
                _remove_file(item)
        yield
    finally:
        _claims.targets.discard(target)
        lock.release()


def _publish(out: Path, target: Path, partial: Path, kind: FolderKind, *, force: bool) -> None:
    """Give ``partial`` the name ``target``; what was there is in its place, or nowhere, afterwards."""
    try:
        if target.is_dir():
            shutil.copymode(target, partial)
        if not _renamed(partial, target):
            _check_replaceable(out, target, kind, force=force)
            if not exchange(partial, target):
                _replace_in_two_steps(partial, target)
    except (OSError, OutputError) as error:
        kept = target.with_name(f"{target.name}.{new_token()}")
        partial.rename(kept)
        reason = error if isinstance(error, OutputError) else output_error(out, error)
        raise OutputError(f"{reason}. What was made is in {kept}") from error
    _sync_folder(target.parent)


def _renamed(partial: Path, target: Path) -> bool:
    """Rename a folder to a name where there is nothing, or an empty folder; False if there is more."""
    if _WINDOWS and target.is_dir() and is_empty(target):
        target.rmdir()
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, and refuses.
    """
    sys.audit("linert.exchange", str(one), str(other))
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _replace_in_two_steps(partial: Path, target: Path) -> None:
    replaced = replaced_path(target, partial.name.split(".")[-2])
    try:
        target.rename(replaced)
        partial.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Let every file of a folder reach the disk, and their names."""
    for place, _, names in os.walk(folder):
        if not _WINDOWS:
            # Windows syncs only what is open for writing.
            for name in names:
                _sync(Path(place) / name)
        _sync_folder(Path(place))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
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


def _remove_file(left: Leftover) -> None:
    """Remove an unfinished file whose owner is dead, if it is."""
    with contextlib.suppress(OSError), left.path.open("r+b") as file:
        held = lock_descriptor(file.fileno())
        if held is not Held.ANOTHERS and left.abandoned(sure=held is Held.OURS):
            left.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Held]:
    """Lock a folder itself; another's where it is not this user's, or is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        yield Held.ANOTHERS
        return
    try:
        mine = os.fstat(descriptor).st_uid == os.geteuid()
        held = lock_descriptor(descriptor) if mine else Held.ANOTHERS
        yield held if is_at(descriptor, path) else Held.ANOTHERS
    finally:
        os.close(descriptor)


def _make_parents(path: Path) -> list[Path]:
    """Create the folders above ``path``; those that were not there, the innermost first."""
    missing = []
    for parent in path.parents:
        if parent.is_dir():
            break
        missing.append(parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
