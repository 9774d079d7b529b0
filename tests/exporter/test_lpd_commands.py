"""LPD by the commands: a training file becomes a bundle that draws in groups, validates, and is measured and served like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from linert.exporter.models import ModelRequest, load_models
from linert.exporter.peers import peers_of
from linert.exporter.reference_loop import draw_groups
from linert.exporter.sources import Checkpoints
from linert.graphs.families.lpd import LPD
from linert.graphs.group_history import GroupHistory
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.sampling_settings import GuidanceSchedule, SamplingSettings
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import Generator, make_batch
from linert.runtime.drawing.loop import generate
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.measuring.bench import step_works
from tests.conftest import TINY_GROUPS, TINY_LPD, Result
from tests.onnxruntime_cuda import CapturingBackend, cuda_faults

Linert = Callable[..., Result]
Export = Callable[..., Path]

CLASSES = (1, 4, 0)


def shown(result: Result) -> str:
    return " ".join((result.out + result.err).split())


def test_the_export_says_what_will_be_drawn(
    lpd_file: Path, tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    options = ("--vq", tiny_files[1], "--heads", 4, "--group-sizes", "1,7,8", "--out", tmp_path / "bundle")
    result = linert("export", lpd_file, *options)
    assert result.code == 0, result.err
    assert "LPD in the published layout: 2 layers" in shown(result)
    assert "draws 5 classes" in shown(result)
    assert "steps an image: 3" in shown(result)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.groups is not None
    assert manifest.sampling == SamplingSettings(guidance=4.8, guidance_schedule=GuidanceSchedule.LINEAR)
    # The condition and all tokens but the last group's have a slot in every layer.
    assert manifest.state_bytes_at([]) == manifest.state_bytes
    sequences, slots = 2, 1 + 8
    keys = sum(spec.nbytes for spec in manifest.states_of("k_cache"))
    assert keys == TINY_LPD.layers * sequences * slots * TINY_LPD.dim * 4


@pytest.mark.parametrize("steps", [5, 3])
def test_pictures_are_those_of_pytorch(
    grouped_bundle: Path, steps: int, linert: Linert, tmp_path: Path
) -> None:
    saved = tmp_path / "tokens.npz"
    asked = ("--classes", ",".join(map(str, CLASSES)), "--seed", 7, "--steps", steps, "--guidance", 3)
    result = linert("run", grouped_bundle, *asked, "--save-tokens", saved, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    bundle = open_bundle(grouped_bundle)
    sampling = SamplingSettings(guidance=3, guidance_schedule=GuidanceSchedule.LINEAR, steps=steps)
    batch = make_batch(
        bundle.manifest, open_conditioner(bundle), [Sample(ClassLabel(k), 7) for k in CLASSES], sampling, None
    )
    model = Checkpoints.find(bundle).load()[0].eager()
    assert isinstance(model, LPD)
    orders = torch.from_numpy(np.asarray(batch.orders))
    sizes = next(sizes for sizes in TINY_GROUPS if len(sizes) == steps)
    tokens = torch.zeros_like(orders)
    noise = torch.from_numpy(batch.noise.table)
    history = GroupHistory(model, guided=True)
    for group in draw_groups(history, [torch.tensor(CLASSES)], orders, sizes, sampling, noise):
        tokens.scatter_(1, group.cells, group.tokens)
    assert np.array_equal(np.load(saved)["tokens"], tokens.numpy())


def test_a_bundle_validates(grouped_bundle: Path, linert: Linert) -> None:
    result = linert("validate", grouped_bundle, "--json")
    assert result.code == 0, result.out
    report = json.loads(result.out)
    assert len(report["steps_max_abs"]) == 5 + 3
    # Every list of groups is proved, whose stages may be of other widths.
    assert {steps: run["tokens_agreement"] for steps, run in report["runs"].items()} == {"5": 1.0, "3": 1.0}
    assert any(check["name"].endswith(", in 3 steps") for check in report["checks"])
    assert not report["lines"]
    assert not cuda_faults(grouped_bundle)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_precisions_cost_what_they_may(
    precision: str, lpd_file: Path, tiny_files: tuple[Path, Path], export: Export, linert: Linert
) -> None:
    calibrated = ("--calibration-images", 2) if precision.startswith("int") else ()
    options = ("--heads", 4, "--group-sizes", "1,7,8", "--precision", precision, *calibrated)
    bundle = export(lpd_file, tiny_files[1], *options)
    result = linert("validate", bundle, "--json")
    # What a precision may cost is bound for models that have learned something: random ones lose more to four bits.
    assert result.code == 0 or precision == "int4", result.out
    # Integers that fit other weights predict nothing of what is right.
    logits = json.loads(result.out)["logits"]
    assert logits["mean_abs"] < 0.3 * logits["reference_std"]


def test_a_broken_weight_is_found(
    grouped_bundle: Path,
    lpd_file: Path,
    tiny_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    linert: Linert,
) -> None:
    """The check can fail: with another position table PyTorch predicts something else."""

    def shifted(self: LPD, cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._placed(torch.nn.functional.embedding(tokens, self.tok_embeddings.weight), cells)

    monkeypatch.setattr(LPD, "tokens_in", shifted)
    result = linert("validate", grouped_bundle, "--json")
    assert result.code == 1
    failed = [check["name"] for check in json.loads(result.out)["checks"] if not check["passed"]]
    assert "logits, max abs error" in failed


def test_captured_sessions_draw_the_cpu_s_tokens(grouped_bundle: Path) -> None:
    opened = open_bundle(grouped_bundle)
    stages = [name for name in opened.manifest.stages if name != "vq_decoder"]
    captured, reference = CapturingBackend(opened, stages, device="cpu"), OrtBackend(opened, stages)
    conditioner = open_conditioner(opened)
    for seed, top_k, steps in ((0, 0, 0), (5, 20, 3), (0, 0, 0)):
        sampling = SamplingSettings(guidance=3, top_k=top_k, steps=steps)
        batch = make_batch(opened.manifest, conditioner, [Sample(ClassLabel(2), seed)], sampling, None)
        assert (generate(captured, batch) == generate(reference, batch)).all()


def test_previews_show_the_cells_that_are_drawn(grouped_bundle: Path) -> None:
    from linert.runtime.commands.run import _preview

    seen: list[Any] = []
    with Generator(grouped_bundle) as generator:
        samples = [Sample(ClassLabel(k), 3) for k in CLASSES]

        def note(parts: int) -> None:
            sheet = np.asarray(_preview(generator, 3, parts))
            grey = (sheet == 128).all(-1).sum()
            seen.append((parts, int(grey), int(generator.undrawn(3).sum())))

        generator.draw(samples, on_line=note)
    assert [parts for parts, _, _ in seen] == [1, 2, 3, 4, 5]
    assert [undrawn for _, _, undrawn in seen] == [3 * left for left in (15, 13, 9, 4, 0)]
    counts = [grey for _, grey, _ in seen]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_the_limit_counts_what_the_steps_read(grouped_bundle: Path, linert: Linert) -> None:
    manifest = open_bundle(grouped_bundle).manifest
    works = step_works(manifest)
    assert len(works) == 5
    assert manifest.groups is not None
    widths = [step.width for step in manifest.groups.steps(TINY_GROUPS[0])]
    assert [work.macs for work in works] == [
        manifest.stages[width.stage(filtered=False)].work.macs for width in widths
    ]
    result = linert("bench", grouped_bundle, "--rounds", 1, "--images", 1, "--profile", "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert values["line_end_ms"] is None
    assert sum(group["steps"] for group in values["groups"].values()) == 5
    assert values["limit"]["macs"] == sum(work.macs for work in works) // 5
    assert values["tokens_per_second"] == pytest.approx(3 * 16 / 5 * 1e3 / values["decode_ms"])
    assert values["image"]["decode"] > 0
    told = linert("bench", grouped_bundle, "--rounds", 1, "--images", 1)
    assert told.code == 0, told.err
    assert "the mean decode step reads" in shown(told)
    assert "line end" not in told.out.split("seconds an image")[0]


def test_sweep_and_the_pytorch_peer(grouped_bundle: Path, linert: Linert) -> None:
    options = ("--axis", "batch=1,2", "--rounds", 1, "--images", 1, "--json", "--compare-pytorch")
    result = linert("sweep", grouped_bundle, *options)
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert len(values["cells"]) == 2
    assert values["pytorch"]["eager, batch 1, grid 4"]["seconds_per_image"] > 0
    result = linert("sweep", grouped_bundle, "--axis", "grid=4,8")
    assert result.code == 2
    assert "--axis grid: the bundle draws the image that its checkpoint was trained for" in shown(result)


def test_the_peer_draws_what_the_bundle_draws(grouped_bundle: Path) -> None:
    from rich.console import Console

    bundle = open_bundle(grouped_bundle)
    peers = peers_of(bundle, Checkpoints.find(bundle).load(), threads=1, batch=3, console=Console(quiet=True))
    [peer] = peers.values()
    with Generator(bundle) as generator:
        samples = [Sample(condition, 0) for condition in generator.conditioner.usual()[:3]]
        assert np.array_equal(peer._draw().numpy(), generator.draw(samples))  # type: ignore[union-attr]


def test_inspect_says_how_images_are_drawn(grouped_bundle: Path, linert: Linert) -> None:
    told = shown(linert("inspect", grouped_bundle))
    assert "steps an image 5 or 3" in told
    assert "cache nothing is evicted" in told
    described = json.loads(linert("inspect", grouped_bundle, "--json").out)
    assert described["decode_steps"] == 5


def test_a_picture_tells_how_to_draw_it_again(grouped_bundle: Path, linert: Linert, tmp_path: Path) -> None:
    result = linert("run", grouped_bundle, "--classes", 1, "--steps", 3, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    [path] = (tmp_path / "out").glob("class_*.png")
    with PIL.Image.open(path) as image:
        recipe = json.loads(image.info["linert"])
    assert recipe["sampling"]["steps"] == 3


def test_a_model_is_loaded_with_what_is_said_of_it(lpd_file: Path, tiny_files: tuple[Path, Path]) -> None:
    transformer, _ = load_models(lpd_file, tiny_files[1], ModelRequest(heads=4))
    assert transformer.config == TINY_LPD
    assert transformer.layout.who == "the published"
