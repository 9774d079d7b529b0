"""Processes of tests of one file system that they share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.elsewhere import PRELUDE, Elsewhere


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Start a process that runs some lines after the prelude, with its output as one stream."""
    started = []

    def start(code: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
