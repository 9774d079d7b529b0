"""What tests of replacement write, for processes that must start quickly: it imports neither torch nor pytest."""

from __future__ import annotations

import time
from pathlib import Path

from linert.runtime.files.replacement import FolderKind


def foreign(folder: Path) -> list[str] | None:
    """A thing is a folder with a file ``thing``, and nothing else belongs to one."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != "thing"] if "thing" in names else None


THING = FolderKind("a thing", foreign)


def wait_for(path: Path) -> None:
    """Until there is a file."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)
