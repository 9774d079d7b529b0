"""Bundles against PyTorch and against outputs of the published code; and that validate can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from linert.graphs.families.llamagen import LlamaGen
from linert.graphs.families.vq import VQModel
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.loop import Batch, begin, run_step
from linert.runtime.drawing.noise import Noise
from linert.runtime.measuring import metrics
from tests.conftest import TINY, TINY_VQ, Result, random_state
from tests.golden_weights import golden_outputs, golden_state

Linert = Callable[..., Result]
Files = tuple[Path, Path]
GOLDEN_OPTIONS = ("--grid", 8, "--heads", 2, "--batch", 3)


@pytest.fixture(scope="module")
def golden_bundles(export: Callable[..., Path], golden_files: Files) -> dict[str, Path]:
    """The golden model with the full cache: unguided, and guided."""
    full = (*GOLDEN_OPTIONS, "--policy", "full")
    return {
        "greedy_cfg1": export(*golden_files, *full, "--guidance", 1),
        "guided": export(*golden_files, *full, "--guidance", 4),
    }


@pytest.mark.parametrize(
    ("run", "bundle", "options"),
    [
        ("greedy_cfg1", "greedy_cfg1", ()),
        ("greedy_cfg1", "guided", ("--guidance", 1)),
        ("greedy_cfg4", "guided", ("--guidance", 4)),
        ("greedy_cfg4_interval", "guided", ("--guidance", 4, "--guidance-interval", 16)),
    ],
)
def test_greedy_tokens_equal_the_published_codes(
    run: str,
    bundle: str,
    options: tuple[object, ...],
    linert: Linert,
    golden_bundles: dict[str, Path],
    tmp_path: Path,
) -> None:
    golden = golden_outputs(run)
    classes = ",".join(str(c) for c in golden["classes"])
    saved = tmp_path / "tokens.npz"
    result = linert(
        "run",
        golden_bundles[bundle],
        "--classes",
        classes,
        "--num-images",
        3,
        "--seed",
        0,
        "--greedy",
        "--out",
        tmp_path / "out",
        "--save-tokens",
        saved,
        *options,
    )
    assert result.code == 0, result.err
    with np.load(saved) as arrays:
        assert arrays["tokens"].dtype == np.int64
        assert (arrays["tokens"] == golden["tokens"]).all()
        assert (arrays["classes"] == golden["classes"]).all()


@pytest.mark.parametrize(("run", "bundle"), [("greedy_cfg1", "greedy_cfg1"), ("greedy_cfg4", "guided")])
def test_teacher_forced_logits_equal_the_published_codes(
    run: str, bundle: str, golden_bundles: dict[str, Path]
) -> None:
    golden = golden_outputs(run)
    opened = open_bundle(golden_bundles[bundle])
    manifest = opened.manifest
    noise = Noise(range(3), *manifest.noise_shape)
    batch = Batch({"class_ids": golden["classes"]}, noise, manifest.sampling, manifest.cache)
    backend = OrtBackend(opened, batch.stages.values())
    begin(backend, batch)
    worst = np.abs(backend.read("logits") - golden["logits"][0]).max()
    for step in manifest.raster.schedule():
        if step.stage == "decode":
            index = step.line * 8 + step.column
            backend.write("token", golden["tokens"][:, index])
            run_step(backend, batch, step)
            worst = max(worst, np.abs(backend.read("logits") - golden["logits"][index + 1]).max())
        else:
            run_step(backend, batch, step)
    assert worst < 2e-4


def test_rendered_pixels_equal_the_published_codes(
    linert: Linert, golden_bundles: dict[str, Path], tmp_path: Path
) -> None:
    golden = golden_outputs("vq16")
    np.savez(tmp_path / "tokens.npz", tokens=golden["codes"].reshape(2, 64))
    pixels = tmp_path / "pixels.npz"
    result = linert(
        "render",
        golden_bundles["guided"],
        tmp_path / "tokens.npz",
        "--out",
        tmp_path / "out",
        "--save-pixels",
        pixels,
    )
    assert result.code == 0, result.err
    with np.load(pixels) as arrays:
        assert arrays["pixels"].dtype == np.float32
        np.testing.assert_allclose(arrays["pixels"], golden["image"], atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def lazy_bundle(export: Callable[..., Path], golden_files: Files) -> Path:
    return export(
        *golden_files,
        *GOLDEN_OPTIONS,
        "--mode",
        "lazy",
        "--budget-lines",
        3,
        "--recent-lines",
        1,
        "--anchor-tokens",
        5,
        "--top-k",
        100,
        "--top-p",
        0.95,
    )


@pytest.mark.parametrize("choices", ["pytorch", "bundle", "own"])
def test_a_line_buffer_bundle_validates(choices: str, linert: Linert, lazy_bundle: Path) -> None:
    result = linert("validate", lazy_bundle, "--json", "--choices", choices)
    assert result.code == 0, result.out + result.err
    report = json.loads(result.out)
    assert report["passed"]
    assert report["logits"]["max_abs"] < 2e-4
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["runs"]["1"]["tokens_agreement"] == 1.0
    assert len(report["steps_max_abs"]) == 64
    assert [line["line"] for line in report["lines"]] == list(range(7))
    # Three of eight lines on random weights change the logits: compression, reported apart from error.
    assert report["compression"]["mean_abs"] > 0.01


def test_tables_are_readable(linert: Linert, lazy_bundle: Path) -> None:
    result = linert("validate", lazy_bundle, "--greedy")
    assert result.code == 0
    for words in (
        "teacher-forced logits",
        "line ends",
        "free-running tokens",
        "PSNR",
        "compression",
        "verdict",
    ):
        assert words in result.out


def test_another_model_fails_validation(
    linert: Linert, lazy_bundle: Path, golden_files: Files, tmp_path: Path
) -> None:
    """A bundle whose recorded digest says so, but whose weights were exported from something else."""
    from linert.exporter import sources
    from linert.exporter.commands import validate as command

    state = golden_state("c2i")
    state["layers.1.feed_forward.w2.weight"] = state["layers.1.feed_forward.w2.weight"] * 1.02
    changed = tmp_path / "changed.pt"
    torch.save({"model": state}, changed)
    result = linert("validate", lazy_bundle, "--checkpoint", changed)
    assert result.code == 2
    assert "is not the checkpoint" in result.err

    from click.testing import CliRunner

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(sources, "find_source", lambda bundle, source, user_path, option: user_path)
        arguments = [str(lazy_bundle), "--checkpoint", str(changed), "--vq", str(golden_files[1]), "--json"]
        outcome = CliRunner().invoke(command.command, arguments)
    assert outcome.exit_code == 1
    report = json.loads(outcome.stdout)
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert "logits, max abs error" in failed
    assert "pixels, max abs error" not in failed


@pytest.mark.parametrize(
    ("name", "scale", "options", "whose"),
    [
        ("output.weight", 1e38, (), "PyTorch's logits before token 0"),
        (
            "layers.0.attention.wqkv.weight",
            4e4,
            ("--activations", "fp16"),
            "the bundle's logits before token 0 (PyTorch's are)",
        ),
    ],
)
def test_logits_that_are_not_finite_are_reported(
    name: str,
    scale: float,
    options: tuple[object, ...],
    whose: str,
    linert: Linert,
    export: Callable[..., Path],
    tiny_files: Files,
    tmp_path: Path,
) -> None:
    """Weights are finite; what is computed of them is too large for float32, or for halves."""
    state = random_state(LlamaGen(TINY))
    state[name] *= scale
    torch.save({"model": state}, tmp_path / "model.pt")
    bundle = export(tmp_path / "model.pt", tiny_files[1], "--grid", 6, "--heads", 4, "--batch", 2, *options)
    result = linert("validate", bundle)
    assert result.code == 2
    told = " ".join(result.err.split())
    assert f"{whose} are not finite" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [
        (("--metrics", "linert.runtime.measuring.metrics:some_metrics"), "scipy", "compare"),
        (("--stages", "--backend", "cuda"), "polygraphy", "stages"),
    ],
)
def test_what_an_option_needs_is_missed_before_the_work(
    options: tuple[object, ...],
    package: str,
    extra: str,
    linert: Linert,
    lazy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("linert.exporter.quality", "linert.exporter.intervals", "linert.exporter.stage_parity"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(metrics, "some_metrics", lambda: [metrics.ClassAccuracy(len)], raising=False)
    result = linert("validate", lazy_bundle, *options)
    assert result.code == 2
    assert f"needs {package}" in result.err
    assert f"linert[{extra}]" in result.err
    assert "teacher-forced" not in result.out


def test_pixels_that_are_not_finite_are_reported(
    linert: Linert, export: Callable[..., Path], tiny_files: Files, tmp_path: Path
) -> None:
    """They are finite in PyTorch's float64."""
    state = random_state(VQModel(TINY_VQ))
    name = next(name for name in state if name.endswith("conv_out.weight"))
    state[name] *= 1e38
    torch.save({"model": state}, tmp_path / "vq.pt")
    bundle = export(tiny_files[0], tmp_path / "vq.pt", "--grid", 6, "--heads", 4, "--batch", 2)
    result = linert("validate", bundle)
    assert result.code == 2
    assert "the bundle's pixels (PyTorch's are) are not finite" in " ".join(result.err.split())


def test_a_guided_request_of_an_unguided_bundle_is_refused(
    linert: Linert, golden_bundles: dict[str, Path], tmp_path: Path
) -> None:
    result = linert(
        "run", golden_bundles["greedy_cfg1"], "--classes", 1, "--guidance", 4, "--out", tmp_path / "out"
    )
    assert result.code == 2
    assert "needs unconditional rows" in result.err
    assert not (tmp_path / "out").exists()
    assert SamplingSettings(guidance=1.0).faults(guided=False) == []
