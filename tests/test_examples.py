"""The examples do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image

from linert.runtime.bundles.bundle import open_bundle
from tests.conftest import ROOT, run_linert

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_five_short_ones() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 5
    for script in scripts:
        assert len(script.read_text().splitlines()) <= 60, script


def test_drawing(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("draw.py", tiny_bundle, "--condition", 3, "--condition", 1, "--images", 3, "--out", out)
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 3
    assert all(str(path) in said for path in pictures)
    drawn = tmp_path / "run"
    assert run_linert("run", tiny_bundle, "--classes", "3,1", "--num-images", 3, "--out", drawn).code == 0
    for path in pictures:
        with PIL.Image.open(path) as ours, PIL.Image.open(drawn / path.name) as theirs:
            assert ours.tobytes() == theirs.tobytes()


def test_line_by_line(tiny_bundle: Path, tmp_path: Path) -> None:
    run("line_by_line.py", tiny_bundle, "--condition", 3, "--out", tmp_path / "out")
    raster = open_bundle(tiny_bundle).manifest.raster
    pictures = sorted((tmp_path / "out").glob("line_*.png"))
    assert len(pictures) == raster.lines
    shown = []
    for path in pictures:
        with PIL.Image.open(path) as image:
            pixels = np.asarray(image)
            patch = image.height // raster.lines
        lines = int(path.stem.split("_")[1])
        assert (pixels[lines * patch :] == 128).all()
        shown.append(pixels[: lines * patch])
    assert shown[-1].shape[0] == raster.lines * patch


def test_a_policy_of_ones_own(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    """It stands in the bundle, does what it says, and is what PyTorch computes."""
    bundle = tmp_path / "own"
    options = ("--grid", 6, "--heads", 4, "--batch", 1, "--budget-lines", 2, "--recent-lines", 0)
    run(
        *("own_policy.py", tiny_files[0], "--vq", tiny_files[1], *options),
        *("--anchor-tokens", 0, "--mode", "strict", "--out", bundle),
    )
    assert list(open_bundle(bundle).manifest.policies) == ["columns", "streaming"]
    trace = tmp_path / "trace.npz"
    result = run_linert("run", bundle, "--classes", 1, "--record-trace", trace, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    other = run_linert("run", bundle, "--classes", 1, "--policy", "streaming", "--out", tmp_path / "other")
    assert other.code == 0, other.err


def test_a_metric_of_ones_own(many_bundle: Path, tmp_path: Path) -> None:
    options = ("--policies", "linear", "--budgets", "1/2", "--samples", 2, "--no-timing", "--json")
    result = run_linert(
        "compare", many_bundle, *options, "--metrics", EXAMPLES / "own_metric.py", "--out", tmp_path / "out"
    )
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert all(0 <= cell["metrics"]["darkness"]["value"] <= 1 for cell in told["cells"])


def test_a_batch_job_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    jobs = [{"name": f"job{number}", "condition": number, "seed": number} for number in range(5)]
    file, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    file.write_text("\n".join(map(json.dumps, jobs)))
    assert "5 jobs, 5 to draw" in run("batch_job.py", tiny_bundle, file, "--out", out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(first) == 5
    (out / "job3.png").unlink()
    assert "5 jobs, 1 to draw" in run("batch_job.py", tiny_bundle, file, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
