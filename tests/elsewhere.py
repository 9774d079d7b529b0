"""Processes that write folders and files beside a test, and what tests of them share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from linert.runtime.files.replacement import claim_folder, new_folder
from tests.things import THING, wait_for

Elsewhere = Callable[..., subprocess.Popen[str]]


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from linert.runtime.files import replacement
from linert.runtime.errors import LinertError
from linert.runtime.files.atomic_files import *
from linert.runtime.files.replacement import *
from tests.things import THING, wait_for
out = Path(sys.argv[1])

def claimed(out, *, force=False):
    with claim_folder(out, THING, force=force): pass

def make(text, *, force=False, before=lambda: None):
    with new_folder(out, THING, force=force) as folder:
        (folder / "thing").write_text(text)
        before()
"""

NAMESPACES = ("unshare", "--user", "--map-root-user")
namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        [*NAMESPACES, "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="needs user namespaces",
)


def thing(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "thing").write_text(text)
    return path


def made(out: Path, text: str = "new", *, force: bool = False) -> None:
    with new_folder(out, THING, force=force) as folder:
        (folder / "thing").write_text(text)


def claimed(out: Path, *, force: bool = False) -> None:
    """Claim a name, and let it go."""
    with claim_folder(out, THING, force=force):
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BUSY = "make('live', force=len(sys.argv) > 3, before=lambda: (Path(sys.argv[2]).touch(), time.sleep(60)))"


def busy(elsewhere: Elsewhere, out: Path, begun: Path, *more: str) -> subprocess.Popen[str]:
    """A process that is making ``out`` and will not come to an end."""
    process = elsewhere(BUSY, out, begun, *more)
    wait_for(begun)
    return process
