"""What the system tells of file systems: where they are mounted, and which belong to this machine alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

LOCAL = frozenset(
    [
        "bcachefs",
        "btrfs",
        "exfat",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "jfs",
        "msdos",
        "ntfs3",
        "overlay",
        "ramfs",
        "reiserfs",
        "tmpfs",
        "vfat",
        "xfs",
        "zfs",
    ]
)
"""File systems that no other machine writes to, so that a lock here excludes everybody."""


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted at ``path`` (resolved), bind mounts included."""
    return os.path.ismount(path) or any(path == point for point, _ in _mounts())


def is_local(path: Path) -> bool:
    """Whether ``path`` (resolved) is known to lie on a file system of this machine alone."""
    holding = [(point, kind) for point, kind in _mounts() if path.is_relative_to(point)]
    if not holding:
        return False
    # Of mounts at one point the last hides the others.
    _, kind = max(reversed(holding), key=lambda mount: len(mount[0].parts))
    return kind in LOCAL


def _mounts() -> list[tuple[Path, str]]:
    """Mount points and the types of their file systems, in the order of mounting; empty where the system has no such list."""
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        place, _, what = line.partition(b" - ")
        point = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), place.split()[4])
        mounts.append((Path(os.fsdecode(point)), what.split()[0].decode()))
    return mounts
