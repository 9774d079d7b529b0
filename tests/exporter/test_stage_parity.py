"""Stage by stage: backends against each other, Polygraphy on the bundle's own files, plans that lack what they claim."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("polygraphy")

from linert.exporter.stage_parity import compare_stages
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import file_sha256, open_bundle
from linert.runtime.bundles.engines import engines_folder, missing_plugins, read_engines
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import make_batch
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.plugins import CONTENTS
from tests.conftest import Result
from tests.onnxruntime_cuda import CapturingBackend
from tests.runtime.test_backends import emulated
from tests.runtime.test_ort import tiny_batch

Linert = Callable[..., Result]


def test_all_stages_agree(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    reference, other = (
        OrtBackend(bundle, bundle.manifest.stages),
        emulated(bundle, list(bundle.manifest.stages)),
    )
    differences = compare_stages(reference, other, tiny_batch(reference))
    assert {far.stage for far in differences} == set(bundle.manifest.stages)
    outputs = {(far.stage, far.output) for far in differences}
    assert outputs == {
        (name, tensor.name) for name, spec in bundle.manifest.stages.items() for tensor in spec.outputs
    }
    assert all(far.judged and far.passed for far in differences)


def test_stages_of_groups_agree_and_one_that_is_off_is_found(
    grouped_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(grouped_bundle)
    stages = list(bundle.manifest.stages)
    reference, other = OrtBackend(bundle, stages), CapturingBackend(bundle, stages, device="cpu")
    samples = [Sample(ClassLabel(2), seed) for seed in (3, 4, 5)]
    batch = make_batch(bundle.manifest, open_conditioner(bundle), samples, bundle.manifest.sampling, None)
    differences = compare_stages(reference, other, batch)
    assert {far.stage for far in differences} == set(stages)
    assert all(far.judged and far.passed for far in differences)
    groups = bundle.manifest.groups
    assert groups is not None
    width = groups.widths[-1]
    wrong = OrtBackend(bundle, stages)
    run = wrong._run

    def off(name: str) -> None:
        run(name)
        if name == width.stage(filtered=True):
            wrong.array(width.logits)[0, 0, 0] += 0.01

    monkeypatch.setattr(wrong, "_run", off)
    found = [(far.stage, far.output) for far in compare_stages(reference, wrong, batch) if not far.passed]
    assert found == [(width.stage(filtered=True), width.logits)]


@pytest.mark.parametrize(
    ("stage", "output", "error"),
    [("decode", "logits", 0.01), ("line_end.snapkv", "write_slots", 1), ("vq_decoder", "pixels", 0.01)],
)
def test_a_stage_that_is_off_is_found(
    stage: str, output: str, error: float, planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(planned_bundle)
    stages = list(bundle.manifest.stages)
    reference, other = OrtBackend(bundle, stages), OrtBackend(bundle, stages)
    run = other._run

    def wrong(name: str) -> None:
        run(name)
        if name == stage:
            flat = other.array(output).reshape(-1)
            flat[0] += np.asarray(error).astype(flat.dtype)

    monkeypatch.setattr(other, "_run", wrong)
    differences = compare_stages(reference, other, tiny_batch(reference))
    off = [(far.stage, far.output.removesuffix(".next")) for far in differences if not far.passed]
    assert off == [(stage, output)]


def test_comparing_the_cpu_with_itself_is_refused(planned_bundle: Path, linert: Linert) -> None:
    result = linert("validate", planned_bundle, "--stages")
    assert result.code == 2
    assert "--backend" in result.err


@pytest.fixture
def damaged(planned_bundle: Path, tmp_path: Path) -> Path:
    """Plans of which one says that it holds plugins and does not; digests and sizes are right."""
    bundle = Path(shutil.copytree(planned_bundle, tmp_path / "bundle"))
    folder = engines_folder(open_bundle(bundle), "rtx")
    plan, record = folder / "decode.plan", folder / "engine.json"
    plan.write_bytes(plan.read_bytes().replace(CONTENTS.encode(), b"x" * len(CONTENTS)))
    told = json.loads(record.read_text())
    told["plans"]["decode"]["sha256"] = file_sha256(plan)
    record.write_text(json.dumps(told))
    return bundle


def test_plans_that_lack_the_plugins_they_claim_fail_validation(damaged: Path, linert: Linert) -> None:
    bundle = open_bundle(damaged)
    assert missing_plugins(bundle, read_engines(bundle, "rtx")) == ["decode: 0 of 2"]
    result = linert("validate", damaged, "--json")
    assert result.code == 1, result.err
    failed = [check["name"] for check in json.loads(result.out)["checks"] if not check["passed"]]
    assert failed == ["rtx plans, stages without their plugins"]


@pytest.mark.parametrize("stage", ["prefill", "decode.unfiltered", "line_end.linear", "vq_decoder"])
def test_polygraphy_runs_the_files_as_they_are(stage: str, planned_bundle: Path) -> None:
    file = planned_bundle / f"{stage}.onnx"
    for arguments in (("inspect", "model", file), ("run", file, "--onnxrt")):
        done = subprocess.run(
            [Path(sys.executable).with_name("polygraphy"), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
