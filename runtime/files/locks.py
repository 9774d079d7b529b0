"""Locks that die with their owner, and names by which unfinished files are known.

A lock is a file that the kernel holds for a process (``flock``): however the process ends, by ``kill -9`` or by a power
cut, nobody holds it afterwards. What is unfinished has a name of random digits, never a process's number, which two
containers may share.

What a free lock proves depends on the file system. On one of this machine alone it holds for all processes, in
whatever container. On a network file system it holds for all machines where that passes locks on (NFS 4, NFS 3 with
its lock daemon, CephFS, Lustre) and for the processes of one machine where it does not. So the digits also name the
kernel that made them, and what another kernel left on such a file system counts as abandoned only after a day.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from linert.runtime.files.mounts import is_local

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

DAY = 24 * 3600.0
LONGEST_NAME = 200
"""Bytes of a name that fit beside the digits in the 255 that file systems allow; longer ones are digested."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)
_TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_NAME = re.compile(r"\.(?P<stem>.+)\.(?P<token>[0-9a-f]{16})\.(?P<state>partial|replaced)", re.DOTALL)


class LockOwner(Enum):
    """Whose a lock is; UNKNOWN where the file system has no locks."""

    OURS = "ours"
    ANOTHERS = "another's"
    UNKNOWN = "unknown"


def lock_descriptor(descriptor: int) -> LockOwner:
    """Lock an open file if nobody else has, without waiting; closing it unlocks it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return LockOwner.UNKNOWN
        if error.errno in _TAKEN:
            return LockOwner.ANOTHERS
        raise
    return LockOwner.OURS


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that has the name ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Lock:
    """A lock file that this process holds. ``sure``: whether the file system has locks at all."""

    path: Path
    descriptor: int
    sure: bool

    @staticmethod
    def take(path: Path) -> Lock | None:
        """Make the file ``path`` if need be and lock it; None if another process has.

        Raises:
            OSError: the file cannot be made.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            owner = lock_descriptor(descriptor)
            if owner is LockOwner.ANOTHERS:
                os.close(descriptor)
                return None
            # Its last owner may have taken the file away between the two calls.
            if is_at(descriptor, path):
                return Lock(path, descriptor, owner is LockOwner.OURS)
            os.close(descriptor)

    def release(self) -> None:
        """Take the file away and unlock it."""
        windows = sys.platform == "win32"
        if windows:
            os.close(self.descriptor)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        if not windows:
            os.close(self.descriptor)


def new_token() -> str:
    """Sixteen hexadecimal digits: eight of this kernel, eight at random."""
    return f"{_kernel()}{secrets.token_hex(4)}"


def partial_path(path: Path, token: str) -> Path:
    """Where what will be ``path`` is made."""
    return path.with_name(f".{_stem(path.name)}.{token}.partial")


def replaced_path(path: Path, token: str) -> Path:
    """Where what was ``path`` waits for its replacement, on systems that cannot exchange two folders."""
    return path.with_name(f".{_stem(path.name)}.{token}.replaced")


def lock_path(path: Path) -> Path:
    """The lock file of whoever replaces the folder ``path``."""
    return path.with_name(f".{_stem(path.name)}.linert-lock")


@dataclass(frozen=True)
class Leftover:
    """Something unfinished. ``state``: ``partial`` or ``replaced``."""

    path: Path
    token: str
    state: str

    def abandoned(self, *, sure: bool) -> bool:
        """Whether nobody can be at work on it, given that its lock is free (``sure``) or that there are no locks."""
        known = self.token.startswith(_kernel()) or is_local(self.path.parent.resolve())
        return (sure and known) or time.time() - self.path.lstat().st_mtime > DAY


def leftovers(folder: Path, name: str | None = None) -> Iterator[Leftover]:
    """What is unfinished in ``folder``; only what would become ``name``, if given. Nothing where there is no such folder."""
    try:
        entries = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        match = _NAME.fullmatch(entry)
        if match and (name is None or match["stem"] == _stem(name)):
            yield Leftover(folder / entry, match["token"], match["state"])


def is_hidden_name(name: str) -> bool:
    """Whether a file of this name is a lock or a leftover of linert's."""
    return _NAME.fullmatch(name) is not None or (name.startswith(".") and name.endswith("linert-lock"))


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()


@functools.cache
def _kernel() -> str:
    """Eight digits that the processes of one running kernel share, in whatever container."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
