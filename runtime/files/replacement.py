"""Folders that appear under their names whole or not at all; :mod:`linert.runtime.files.atomic_files` does the same for files.

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

from linert.runtime.errors import OutputError
from linert.runtime.files.atomic_files import (
    check_writable,
    output_error,
    remove_unfinished,
    sync_folder,
    sync_tree,
)
from linert.runtime.files.locks import (
    Lock,
    LockOwner,
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
def claim_folder(out: Path, kind: FolderKind, *, force: bool) -> Iterator[None]:
    """Hold the name ``out`` from now on, for a :func:`new_folder` that comes after long work; say now what would keep it from being made.

    Raises:
        OutputError: see :func:`new_folder`.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as claims:
            try:
                target = _target_of(out)
                _check_replaceable(out, target, kind, force=force)
                made += _make_parents(target)
                check_writable(out, target.parent)
                claims.enter_context(_claimed(out, target))
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
                sync_tree(partial)
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
                    remove_unfinished(left)
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
        with _locked_folder(left.path) as owner:
            if owner is LockOwner.OURS:
                shutil.rmtree(left.path, ignore_errors=True)
    while True:
        folder = partial_path(wanted, new_token())
        try:
            folder.mkdir(mode=0o700)
            with _locked_folder(folder) as owner:
                if owner is not LockOwner.ANOTHERS:
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
                remove_unfinished(item)
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
    sync_folder(target.parent)


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


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[LockOwner]:
    """Lock a folder itself; another's where it is not this user's, or is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        yield LockOwner.ANOTHERS
        return
    try:
        mine = os.fstat(descriptor).st_uid == os.geteuid()
        owner = lock_descriptor(descriptor) if mine else LockOwner.ANOTHERS
        yield owner if is_at(descriptor, path) else LockOwner.ANOTHERS
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
