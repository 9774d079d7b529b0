"""Processes below a test's own, and what is done while something else runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60
"""Longer than anything takes that is waited for."""


def descendants(name: str, ancestor: int = os.getpid()) -> list[int]:
    """Processes below another, by default this one, whose command begins with ``name``."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int(stat_of(path)[1])
            if (path / "cmdline").read_bytes().startswith(name.encode()):
                found.append(int(path.name))
        except OSError:
            continue

    def below(process: int) -> bool:
        while process > 1 and process != ancestor:
            process = parents.get(process, 0)
        return process == ancestor

    return [process for process in found if below(process)]


def stat_of(process: Path) -> list[str]:
    """State, parent and more of a process."""
    return (process / "stat").read_text().rsplit(")", 1)[1].split()


def lives(process: int) -> bool:
    try:
        return stat_of(Path("/proc") / str(process))[0] != "Z"
    except OSError:
        return False


@contextmanager
def meanwhile(act: Callable[[threading.Event], object]) -> Iterator[None]:
    """Have a thread ``act`` until the block ends."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_until(condition: Callable[[], object], over: threading.Event | None = None) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        if over is not None and over.is_set():
            return
        assert time.monotonic() < end
        time.sleep(0.01)
