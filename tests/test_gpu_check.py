"""scripts/gpu_check.py: the whole is rehearsed on an emulated driver; limits hold; what cannot be run is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("cuda.bindings")
pytest.importorskip("triton")

import gpu_check
from gpu_phases.outcome import NotRunError, Outcome, Recorder, read_outcomes, run
from gpu_phases.place import Place

SCRIPTS = ROOT / "scripts"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the script itself")

SANITIZER = """#!/usr/bin/env python3
# Runs what it is given, as compute-sanitizer does where it finds nothing.
import subprocess, sys
assert sys.argv[1] == "--tool" and sys.argv[3:5] == ["--error-exitcode", "99"], sys.argv
code = subprocess.call(sys.argv[5:])
print("========= ERROR SUMMARY: 0 errors")
sys.exit(code)
"""


NOT_INSTALLED = f"""
import sys
sys.path[:] = [place for place in sys.path if place != {str(ROOT)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
"""
"""What a Python runs when it starts that has this environment's packages but not the project."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes Python forget that the project is installed."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(NOT_INSTALLED)
    done = subprocess.run(
        [sys.executable, "-c", "import linert"],
        env={"PYTHONPATH": str(folder)},
        cwd="/",
        capture_output=True,
    )
    assert b"No module named 'linert'" in done.stderr
    return folder


def call(bare: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository where the project is not installed."""
    plain = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        **{"capture_output": True, "text": True, "check": False, "cwd": "/"},
        env={**plain, "PYTHONPATH": str(bare), **environment},
    )


@pytest.fixture(scope="module")
def carried(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least of everything that travels."""
    folder = tmp_path_factory.mktemp("carried")
    done = call(bare, SCRIPTS / "gpu_prepare.py", "--few", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_quarter_of_an_hour_is_rehearsed(bare: Path, carried: Path, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    out = tmp_path / "out"
    begun = time.monotonic()
    done = call(
        bare,
        *(SCRIPTS / "gpu_check.py", "--rehearse", "--carried", carried, "--out", out),
        PATH=f"{tool.parent}{os.pathsep}{os.environ['PATH']}",
    )
    took = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((out / "gpu_check.json").read_text())["phases"]
    assert list(told) == list(gpu_check.PHASES)
    assert took < sum(phase.seconds for phase in gpu_check.PHASES.values())
    ran = {
        phase: [check for check in checks if check["status"] != "not run"] for phase, checks in told.items()
    }
    for phase, names in {
        "driver": ("what is uploaded comes back", "a captured graph does its work at every launch"),
        "kernels": ("LineAttention, 2x1x33x16, float32, machine code", "LineEvict, linear"),
        "sanitizer": ("memcheck", "racecheck"),
        "tests": ("test_line_evict_kernels.py",),
        "speeds": ("LineAttention, batch 64", "SpatialDecayStep, batch 64", "LineEvict", "the best layout"),
        "onnxruntime": ("demo_fp32, operations one by one", "XL 384 px, batch 1, 4 lines"),
    }.items():
        for name in names:
            assert any(check["name"].startswith(name) for check in ran[phase]), (phase, name)
        assert not any(check["status"] == "failed" for check in ran[phase]), ran[phase]
    # What needs a device is not passed off as run.
    assert not ran["plans"]


def test_limits_leave_a_reserve() -> None:
    seconds = {name: phase.seconds for name, phase in gpu_check.PHASES.items()}
    assert sum(seconds[name] for name in ("driver", "kernels", "sanitizer", "tests", "speeds")) <= 7 * 60
    assert seconds["onnxruntime"] <= 6 * 60


def test_without_a_gpu_everything_is_listed_as_not_run(bare: Path, carried: Path, tmp_path: Path) -> None:
    done = call(
        bare,
        *(SCRIPTS / "gpu_check.py", "--carried", carried, "--out", tmp_path),
        *("--phase", "driver", "--phase", "kernels", "--phase", "speeds"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "gpu_check.json").read_text())["phases"]
    for checks in told.values():
        assert {check["status"] for check in checks} == {"not run"}
    assert "no CUDA device" in done.stdout
    assert "LineAttention, 2x1x33x16, float32, text" in " ".join(done.stdout.split())


def test_a_phase_that_takes_too_long_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process and what it started are ended; what was written before stands, a line that was cut does not."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
        "from gpu_phases.outcome import Outcome, Recorder\n"
        f"file = Path({str(tmp_path)!r}) / 'driver.jsonl'\n"
        "Recorder(file, 9).write(Outcome('first', 'passed'))\n"
        "with file.open('a') as more: more.write('{\"name\": \"second')\n"
        f"child = subprocess.Popen(['sleep', '1000']); Path({str(tmp_path)!r}, 'child').write_text(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "GRACE", 4)
    outcomes = gpu_check.run_phase("driver", 1, Place(tmp_path, tmp_path))
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("first", "passed"),
        ("the whole phase", "failed"),
    ]
    assert "ended after 5 seconds" in outcomes[1].text
    child = int((tmp_path / "child").read_text())
    # Only the leader of the killed group is waited for: the system takes its time over the others.
    patience = time.monotonic() + 60
    while running(child) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not running(child)


def running(process: int) -> bool:
    """Whether a process runs: one that was killed and that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_checks_behind_the_limit_are_listed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "found", 0.2)
    recorder.run(
        [("slow", lambda: time.sleep(0.3) or Outcome("", "passed")), ("late", lambda: Outcome("", "passed"))]
    )
    assert [(o.name, o.status) for o in read_outcomes(tmp_path / "found")] == [
        ("slow", "passed"),
        ("late", "not run"),
    ]


def test_what_a_check_raises_is_its_outcome() -> None:
    def absent() -> Outcome:
        raise NotRunError("not here")

    def broken() -> Outcome:
        raise ValueError("wrong")

    assert run("a", absent).status == "not run"
    failed = run("b", broken)
    assert (failed.name, failed.status, failed.text) == ("b", "failed", "ValueError: wrong")
    assert run("c", lambda: Outcome("", "passed")).name == "c"


def test_a_wrong_kernel_is_found(carried: Path, tmp_path: Path) -> None:
    """Every output of every case is compared: a case with another result wanted fails."""
    import msgspec
    from gpu_phases import kernels
    from gpu_phases.cases import FILE, Case, read_carried

    for case in read_carried(carried / FILE, Case):
        for number, output in enumerate(case.outputs):
            if case.made()[0].aliased_input(number) >= 0:
                continue
            data = bytearray(output.data)
            data[1] ^= 0x40
            wrong = [*case.outputs]
            wrong[number] = msgspec.structs.replace(output, data=bytes(data))
            place = Place(carried, tmp_path, rehearsal=True)
            with pytest.raises(AssertionError, match=f"output {number}"):
                kernels.run_case(place, msgspec.structs.replace(case, outputs=tuple(wrong)), "text")


def test_random_weights_make_a_bundle_whole(carried: Path, tmp_path: Path) -> None:
    from gpu_phases.onnxruntime import bundle_name, unpacked
    from random_weights import fill

    from linert.runtime.bundles.bundle import open_bundle
    from linert.runtime.drawing.generator import Generator
    from linert.runtime.errors import BundleError

    place = Place(carried, tmp_path)
    bundle = unpacked(place, tmp_path, bundle_name(1, 4))
    with pytest.raises(BundleError, match="lacks"):
        open_bundle(bundle)
    made: dict[str, Path] = {}
    fill(bundle, made)
    assert len(made) == 1
    with Generator(bundle) as generator:
        [image] = generator.generate([1])
    assert np.isfinite(image.pixels).all()
    assert len(np.unique(image.tokens)) > 1
