"""scripts/fuzz.py: whatever is damaged, there is no fault; and where there is one, it is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


def fuzz(fault: str, *options: object) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import fuzz\n{fault}\nfuzz.main()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_damaged_inputs_are_refused_or_draw_the_same(tmp_path: Path) -> None:
    done = fuzz("", "--cases", 135, "--seed", 18, "--keep", tmp_path / "faults")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"│ ([a-z ]+?) +│ (\d+) +│ (\d+) ", done.stdout)
    assert [(name, int(tried)) for name, tried, _ in rows] == [(name, 15) for name, _, _ in rows]
    assert len(rows) == 9
    # Most damage is found.
    assert sum(int(refused) for _, _, refused in rows) > 65


UNCHECKED = """
import numpy
from linert.runtime.drawing import output
output.read_arrays = lambda path: dict(numpy.load(path))
"""
UNVERIFIED = """
from linert.runtime.commands import bundle_argument
bundle_argument.BundlePlace.open.__kwdefaults__["digests"] = False
"""


def test_a_traceback_is_found_and_its_input_kept(tmp_path: Path) -> None:
    done = fuzz(UNCHECKED, "--cases", 14, "--seed", 1, "--only", "tokens", "--keep", tmp_path / "faults")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "traceback: " in done.stdout
    kept = sorted((tmp_path / "faults").iterdir())
    assert kept
    assert all((folder / "tokens.npz").exists() for folder in kept)
    said = [(folder / "what_happened.txt").read_text() for folder in kept]
    assert any("Traceback (most recent call last)" in text for text in said)
    assert any("\nmemory\n" in text for text in said)


def test_a_file_that_draws_otherwise_is_found(tmp_path: Path) -> None:
    done = fuzz(
        UNVERIFIED, "--cases", 240, "--seed", 2, "--only", "bundle file", "--keep", tmp_path / "faults"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert ": otherwise: " in done.stdout
