"""scripts/gpu_check.py says what it could not run, and fails where something did not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("cuda.bindings")

from gpu_check import run
from gpu_kernels import NotRunError, Outcome


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the script itself")
def test_without_a_gpu_everything_is_listed_as_not_run(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["machine"]["device"] is None
    assert {check["status"] for check in told["checks"]} == {"not run"}
    assert {check["text"] for check in told["checks"]} == {told["checks"][0]["text"]}
    assert "no CUDA device" in done.stdout
    for name in (
        "LineAttention, batch 64, 97 slots",
        "rtx: the LASADGen demo in fp16",
        "SpatialDecayStep, batch 64",
        "cuda: XL 384 px, batch 256",
    ):
        assert name in done.stdout


def test_what_a_check_raises_is_its_outcome() -> None:
    def absent() -> Outcome:
        raise NotRunError("not here")

    def broken() -> Outcome:
        raise ValueError("wrong")

    assert run("a", absent, "").status == "not run"
    failed = run("b", broken, "")
    assert (failed.status, failed.text) == ("failed", "ValueError: wrong")
    assert run("c", broken, "no device").status == "not run"
    assert run("d", lambda: Outcome("d", "passed"), "").status == "passed"
