"""LASADGen by the commands: a folder becomes a bundle without a cache, which draws, validates and is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from linert.exporter.lasadgen_folder import write_lasadgen
from linert.exporter.peers import peer_of
from linert.exporter.sources import Checkpoints
from linert.graphs.families import vq
from linert.graphs.families.lasadgen import LASADGen, LASADGenConfig, Variant
from linert.graphs.memory import memory_of
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.drawing.loop import generate
from tests.conftest import TINY_VQ, Result, random_state
from tests.eager import Eager
from tests.onnxruntime_cuda import CapturingBackend, cuda_faults
from tests.runtime.test_ort import tiny_batch
from tests.text_models import broken, without

Linert = Callable[..., Result]
Export = Callable[..., Path]

CLASSES = (1, 4)


def model(variant: Variant) -> LASADGen:
    net = LASADGen(LASADGenConfig(2, 32, 4, 64, TINY_VQ.codebook_size, 5, 6, variant, gate_rank=8))
    state = random_state(net)
    for name, logits in state.items():
        if name.endswith("_decay"):
            # A head that forgets at once, and one that never does.
            logits[:2] = torch.tensor([-200.0, 200.0])
    net.load_state_dict(state)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Variant, Path], Path]:
    """A folder of every variant, and an image tokenizer."""
    root = tmp_path_factory.mktemp("lasadgen")
    folders = {}
    for variant in Variant:
        net = model(variant)
        folders[variant] = root / variant
        write_lasadgen(net.state_dict(), net.config, folders[variant])
    torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, root / "vq.pt")
    return folders, root / "vq.pt"


@pytest.fixture(scope="module")
def bundle(files: tuple[dict[Variant, Path], Path], export: Export) -> Path:
    """Manhattan decay, batch 2, guided."""
    return export(files[0][Variant.MANHATTAN], files[1], "--batch", 2, "--guidance", 3)


def shown(result: Result) -> str:
    return " ".join((result.out + result.err).split())


@pytest.mark.parametrize("variant", Variant)
def test_pictures_are_those_of_pytorch(
    variant: Variant,
    files: tuple[dict[Variant, Path], Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    out, saved = tmp_path / "bundle", tmp_path / "tokens.npz"
    options = ("--vq", files[1], "--batch", 2, "--guidance", 3, "--out", out)
    result = linert("export", files[0][variant], *options)
    assert result.code == 0, result.err
    assert "LASADGen in linert's layout: 2 layers" in shown(result)
    assert "draws 5 classes" in shown(result)
    assert "cache: none" in shown(result)
    drawn = ("--classes", ",".join(map(str, CLASSES)), "--greedy", "--save-tokens", saved)
    result = linert("run", out, *drawn, "--out", tmp_path / "pictures")
    assert result.code == 0, result.err
    net = model(variant)
    eager = Eager(net, memory_of(net.config, images=2, guided=True), "", [torch.tensor(CLASSES)], greedy=1)
    assert (np.load(saved)["tokens"] == eager.draw().numpy()).all()
    result = linert("validate", out, "--json")
    assert result.code == 0, result.out
    report = json.loads(result.out)
    assert report["runs"]["1"]["tokens_agreement"] == 1.0
    assert not report["lines"]
    assert not cuda_faults(out)


def test_captured_sessions_draw_the_cpu_s_tokens(bundle: Path) -> None:
    """ONNX Runtime runs a stage three times when it captures it, and the end of a row updates its state too."""
    stages = ("prefill", "decode", "decode.unfiltered", "line_end")
    opened = open_bundle(bundle)
    captured, reference = CapturingBackend(opened, stages, device="cpu"), OrtBackend(opened, stages)
    for seed, top_k in ((0, 0), (5, 20), (0, 0)):
        usual = tiny_batch(reference, seed)
        batch = replace(usual, sampling=msgspec.structs.replace(usual.sampling, top_k=top_k))
        assert (generate(captured, batch) == generate(reference, batch)).all()


def test_inspect_says_what_is_kept(bundle: Path, linert: Linert) -> None:
    described = json.loads(linert("inspect", bundle, "--json").out)
    kinds = described["state_bytes_by_kind"]
    rows, size = 2 * 2 * 4, 8
    assert kinds["above"] == 2 * rows * 6 * size * size * 4
    assert kinds["k_line"] == kinds["v_line"] == 2 * rows * (1 + 6) * size * 4
    assert "cache_saving" not in described
    # A step reads one matrix of a row's six.
    manifest = described["manifest"]
    work = manifest["stages"]["decode"]["work"]
    assert work["state_bytes"] == described["state_bytes"] - kinds["above"] * 5 // 6 - kinds["line"]
    assert manifest["cache"] is None
    assert "cache none" in shown(linert("inspect", bundle))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "--policy", "linear", "--classes", "0", "--out", "x"), "cache options"),
        (("run", "--budget-lines", "1/6", "--classes", "0", "--out", "x"), "cache options"),
        (("run", "--eviction-map", "layers", "--classes", "0", "--out", "x"), "--eviction-map"),
        (("run", "--record-trace", "x.npz", "--classes", "0", "--out", "x"), "--record-trace"),
        (("validate", "--policy", "full"), "cache options"),
        (("compare", "--classes", "0", "--out", "x"), "compare weighs cache policies"),
        (("sweep", "--axis", "policy=full"), "--axis policy"),
        (("bench", "--anchor-tokens", "4"), "cache options"),
    ],
)
def test_what_needs_a_cache_is_refused(
    command: tuple[str, ...], message: str, bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    name, *options = command
    at = [str(tmp_path / option) if option.startswith("x") else option for option in options]
    result = linert(name, bundle, *at)
    assert result.code == 2
    assert f"{message}: a lasadgen bundle has no KV cache" in shown(result)


def test_an_export_with_a_budget_is_refused(
    files: tuple[dict[Variant, Path], Path], linert: Linert, tmp_path: Path
) -> None:
    for options in (("--policy", "full"), ("--budget-lines", 2), ("--capacity-lines", 3)):
        arguments = ("--vq", files[1], "--out", tmp_path / "bundle", *options)
        result = linert("export", files[0][Variant.MANHATTAN], *arguments)
        assert result.code == 2
        assert "is a LASADGen, which has no KV cache" in shown(result)


def test_a_trace_of_another_model_is_refused(
    bundle: Path, tiny_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.npz"
    recorded = ("--classes", "0", "--out", tmp_path / "out", "--record-trace", trace)
    assert linert("run", tiny_bundle, *recorded).code == 0
    result = linert("run", bundle, "--replay-trace", trace, "--out", tmp_path / "other")
    assert result.code == 2
    assert "a trace: a lasadgen bundle has no KV cache" in shown(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "there is no config.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "lasadgen"}'),
            "config.json lacks",
        ),
        (without("model.safetensors"), "is a folder without weights"),
    ],
)
def test_bad_folders_are_named(
    change: Callable[[Path], None],
    message: str,
    files: tuple[dict[Variant, Path], Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    folder = broken(files[0][Variant.MANHATTAN], tmp_path / "model", change)
    result = linert("export", folder, "--vq", files[1], "--out", tmp_path / "bundle")
    assert result.code == 2
    assert message in shown(result)


def test_another_variant_is_another_checkpoint(
    files: tuple[dict[Variant, Path], Path], linert: Linert, tmp_path: Path
) -> None:
    """Signed decay has the tensors of Manhattan's; without decay there are fewer."""
    folder = tmp_path / "model"
    shutil.copytree(files[0][Variant.NONE], folder)
    shutil.copyfile(files[0][Variant.MANHATTAN] / "config.json", folder / "config.json")
    result = linert("export", folder, "--vq", files[1], "--out", tmp_path / "bundle")
    assert result.code == 2
    assert "_decay" in shown(result)


def test_bench_over_grids(bundle: Path, linert: Linert) -> None:
    result = linert("sweep", bundle, "--axis", "grid=6,8", "--rounds", 1, "--images", 0, "--json")
    assert result.code == 0, result.err
    small, large = json.loads(result.out)["cells"]
    assert small["state_bytes"] < large["state_bytes"]


def test_the_pytorch_peer_is_recurrent_and_right(bundle: Path) -> None:
    opened = open_bundle(bundle)
    inputs = {"class_ids": np.array(CLASSES)}
    peer = peer_of(*Checkpoints.find(opened).load(), inputs, 3.0)
    assert peer.note == "recurrent"
    net, ids = model(Variant.MANHATTAN), torch.tensor(CLASSES)
    tokens = torch.randint(TINY_VQ.codebook_size, (2, 14), generator=torch.Generator().manual_seed(0)).repeat(
        2, 1
    )
    wanted = net(net.condition([ids], guided=True), tokens)
    logits = [peer._prefill()]
    for index in range(14):
        logits.append(
            peer._forward(peer.model.embed(tokens[:, index : index + 1]), torch.tensor([1 + index]))
        )
        if index % 6 == 5:
            peer._end_line()
    torch.testing.assert_close(torch.stack(logits, dim=1), wanted, atol=1e-4, rtol=1e-4)
    assert peer.image() > 0
