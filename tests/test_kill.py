"""scripts/kill_test.py: nothing is lost where linert is killed, and it is said where something is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks for processes in /proc")


def kill(bundle: Path, code: str, *options: object) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import kill_test\n{code}\nkill_test.command()"
    return subprocess.run(
        [sys.executable, "-c", script, "--bundle", str(bundle), "--at", "operation", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_exports_and_runs_lose_nothing(tiny_bundle: Path) -> None:
    done = kill(tiny_bundle, "", "--kills", 7, "--command", "export", "--command", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in done.stdout.splitlines()[1:]}
    assert rows["kills"] == ["7", "7"]
    for fault in (
        "half-written",
        "left over",
        "not identical",
        "processes that lived on",
        "starts that failed",
    ):
        assert rows[fault] == ["0", "0"]


WRITTEN_IN_PLACE = """
from pathlib import Path
def replace(self, target):
    data = self.read_bytes()
    with open(target, "wb", buffering=0) as file:
        for start in range(0, len(data), 50):
            file.write(data[start : start + 50])
            open(str(target) + ".at", "w").close()
    Path(str(target) + ".at").unlink()
Path.replace = replace
"""
NOTHING_REMOVED = """
from linert.runtime.files import replacement
replacement.leftovers = lambda *arguments: []
"""


@pytest.mark.parametrize(
    ("fault", "row"),
    [(WRITTEN_IN_PLACE, "half-written"), (NOTHING_REMOVED, "left over")],
    ids=["written", "left"],
)
def test_what_does_not_hold_is_found(fault: str, row: str, tiny_bundle: Path) -> None:
    done = kill(tiny_bundle, fault, "--kills", 8, "--command", "run")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)]
    assert int(line.split()[-1]) > 0
