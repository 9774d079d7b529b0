"""Plans of bundles that people have: the demo, and models of LlamaGen-B's size in halves and with 4-bit weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

from random_checkpoint import random_tensors, transformer_shapes, vq_shapes

from linert.exporter.lasadgen_folder import write_lasadgen
from linert.graphs.families.lasadgen import LASADGen, LASADGenConfig, Variant
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.backends.ort_cuda import OrtCudaBackend
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.engines import Engines, missing_plugins, read_engines
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.conditions import conditions_of
from linert.runtime.drawing.generator import make_batch
from linert.runtime.drawing.loop import generate
from linert.runtime.drawing.samples import list_samples
from tests.conftest import ROOT, Result, random_state
from tests.runtime.test_backends import emulated
from tests.text_models import write_lumina

Export = Callable[..., Path]
Linert = Callable[..., Result]
HALVES = ("--activations", "fp16", "--image-decoder-precision", "fp16")
SIZE_B = ("--grid", 24, "--guidance", 4, "--budget-lines", 4)
LAYERS_B = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights of LlamaGen-B at 384 px and of its tokenizer."""
    folder = tmp_path_factory.mktemp("size_b")
    files = folder / "B.pt", folder / "vq16.pt"
    for file, shapes in zip(files, (transformer_shapes("B"), vq_shapes(16)), strict=True):
        torch.save({"model": random_tensors(shapes)}, file)
    return files


def build(linert: Linert, bundle: Path, *options: str) -> tuple[Bundle, Engines]:
    result = linert("build", bundle, "--target", "rtx", "--sm", "89", *options)
    assert result.code == 0, result.err
    opened = open_bundle(bundle)
    return opened, read_engines(opened, "rtx")


def check_layers(bundle: Bundle, engines: Engines, *, plugins: bool, weights: str) -> None:
    """Every stage has a plan, whose layers are what was asked for."""
    manifest = bundle.manifest
    assert set(engines.plans) == set(manifest.stages)
    for stage, plan in engines.plans.items():
        layers = manifest.model.layers
        decoding, ending = (
            stage.startswith("decode"),
            stage.startswith("line_end.") and stage != "line_end.replay",
        )
        wanted = {"LineAttention": layers} if decoding else {"LineEvict": 1} if ending else {}
        assert plan.operations == wanted, stage
        assert plan.plugins == (wanted if plugins else {}), stage
        kinds = Counter(layer.kind for layer in plan.layers)
        assert kinds["PLUGIN_V3"] == sum(plan.plugins.values())
        if decoding:
            # The body of LineAttention has two products and a softmax, and writes caches by TensorRT's own layer.
            body = 0 if plugins else layers
            assert kinds["SOFTMAX"] == body
            assert kinds["KV_CACHE_UPDATE"] == 2 * body
            # Queries, keys and values in one, the rest of attention, gate and up in one, down; and the head.
            assert kinds["MATRIX_MULTIPLY"] == 4 * layers + 1 + 2 * body
            assert kinds["DEQUANTIZE"] == (4 * layers + 1 if weights == "int4" else 0)
            assert len(plan.aliases) == (4 if plugins else 2) * layers
            products = [
                layer.outputs[0].split(": ")[1].split(" ")[0]
                for layer in plan.layers
                if layer.kind == "MATRIX_MULTIPLY"
            ]
            assert Counter(products).most_common(1)[0][0] == ("FLOAT" if weights == "fp32" else "HALF")
    assert missing_plugins(bundle, engines) == []


def test_the_demo(export: Export, linert: Linert) -> None:
    bundle = export(
        ROOT / "demo" / "c2i_demo.pt",
        ROOT / "demo" / "vq_demo.pt",
        *("--grid", 16, "--heads", 4, "--guidance", 3, "--budget-lines", 4, "--batch", 2),
    )
    check_layers(*build(linert, bundle), plugins=True, weights="fp32")


WINDOWS = ("--window", "1,3")


def drawn_on_an_emulated_gpu(bundle: Bundle, width: int) -> None:
    """The TensorRT loop draws with windows what the CPU draws without them."""
    stages = list(bundle.manifest.stages)
    samples = list_samples(conditions_of([1, 4]), 2, seed=4)
    manifest = bundle.manifest
    batch = make_batch(manifest, open_conditioner(bundle), samples, manifest.sampling, manifest.cache)
    here, reference = emulated(bundle, stages), OrtBackend(bundle, stages)
    drawn = generate(here, replace(batch, window=width))
    assert (drawn == generate(reference, batch)).all()


def test_windows_on_an_emulated_gpu(tiny_files: tuple[Path, Path], export: Export, linert: Linert) -> None:
    """Attention of a window hands the caches on, and what is committed lies where they lie."""
    exported = export(
        *tiny_files, "--grid", 6, "--heads", 4, *WINDOWS, "--policy", "linear,leverage", "--batch", 2
    )
    for options in (("--no-plugin",), ()):
        bundle, engines = build(linert, exported, *options)
        assert missing_plugins(bundle, engines) == []
        # It chooses by an importance that is worked out before as well.
        assert engines.plans["line_end.leverage"].operations == {"LineEvict": 1}
        layers = bundle.manifest.model.layers
        for stage in ("decode.w3", "decode.w3.unfiltered"):
            plan = engines.plans[stage]
            assert plan.operations == {"LineWindowAttention": layers, "LineWindowCommit": 1}
            assert plan.plugins == ({} if options else plan.operations)
            kinds = () if options else ("k_cache", "v_cache", "scores")
            assert plan.aliases == {
                f"{kind}.{n}.next": f"{kind}.{n}" for n in range(layers) for kind in kinds
            }
        drawn_on_an_emulated_gpu(bundle, 3)


def test_groups(lpd_file: Path, tiny_files: tuple[Path, Path], export: Export, linert: Linert) -> None:
    """TensorRT writes what a group feeds into the caches where they lie, and needs no plugin for it."""
    bundle = export(lpd_file, tiny_files[1], "--heads", 4, "--group-sizes", "1,7,8", "--batch", 2)
    opened, engines = build(linert, bundle)
    manifest = opened.manifest
    assert set(engines.plans) == set(manifest.stages)
    for stage, plan in engines.plans.items():
        decoding = 2 * manifest.model.layers if stage.startswith("decode") else 0
        kinds = Counter(layer.kind for layer in plan.layers)
        assert kinds["KV_CACHE_UPDATE"] == decoding == len(plan.aliases)
        assert plan.plugins == {}


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_a_model_of_size_b(
    weights: str, checkpoints: tuple[Path, Path], export: Export, linert: Linert
) -> None:
    quantised = ("--quantization", "rtn") if weights == "int4" else ()
    bundle = export(*checkpoints, *SIZE_B, "--precision", weights, *quantised, *HALVES)
    # Without plugins 4-bit products are built as they are with them.
    for options in ((), ("--no-plugin",)) if weights == "fp16" else ((),):
        opened, engines = build(linert, bundle, *options)
        assert opened.manifest.model.layers == LAYERS_B
        check_layers(opened, engines, plugins=not options, weights=weights)
        decode = engines.plans["decode"]
        weight_bytes = opened.manifest.stages["decode"].work.weight_bytes
        assert decode.weights_bytes is not None
        assert weight_bytes < decode.weights_bytes < 1.3 * weight_bytes + (60 << 20)


def test_spatial_decay_on_an_emulated_gpu(
    linert: Linert, export: Export, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """All stages of a LASADGen have plans, with plugins and without, and the TensorRT loop draws what the CPU draws."""
    net = LASADGen(LASADGenConfig(2, 32, 4, 64, 64, 5, 6, Variant.MANHATTAN, gate_rank=8))
    write_lasadgen(random_state(net), net.config, tmp_path / "model")
    exported = export(tmp_path / "model", tiny_files[1], *WINDOWS, "--batch", 2)
    for options in (("--no-plugin",), ()):
        bundle, engines = build(linert, exported, *options)
        assert set(engines.plans) == set(bundle.manifest.stages)
        assert missing_plugins(bundle, engines) == []
        lines = {f"{kind}.{n}.next": f"{kind}.{n}" for n in (0, 1) for kind in ("k_line", "v_line")}
        for stage, operation in (("decode", "SpatialDecayStep"), ("decode.w3", "SpatialDecayWindow")):
            for variant in (stage, f"{stage}.unfiltered"):
                plan = engines.plans[variant]
                assert plan.operations == {operation: 2}
                assert plan.plugins == ({} if options else plan.operations)
                # Without plugins TensorRT writes one token where its cache lies, and a window elsewhere.
                assert plan.aliases == ({} if options and operation.endswith("Window") else lines)
        drawn_on_an_emulated_gpu(bundle, 3)
        stages = list(bundle.manifest.stages)
        samples = list_samples(conditions_of([1, 4]), 2, seed=4)
        batch = make_batch(bundle.manifest, open_conditioner(bundle), samples, bundle.manifest.sampling, None)
        here, reference = emulated(bundle, stages), OrtBackend(bundle, stages)
        drawn, wanted = generate(here, batch), generate(reference, batch)
        assert (drawn == wanted).all()
        np.testing.assert_allclose(here.read("logits"), reference.read("logits"), atol=2e-4)
    assert (generate(OrtCudaBackend(bundle, stages, device="cpu"), batch) == wanted).all()


def test_prompts_newlines_and_grouped_queries_on_an_emulated_gpu(
    linert: Linert, export: Export, tmp_path: Path
) -> None:
    """Lumina-mGPT of 34B's kind: plans hold their plugins, and the TensorRT loop draws what the CPU draws."""
    folder, image_decoder = write_lumina(tmp_path / "tiny", swin_norm=True, kv_heads=2)
    options = ("--size", "96x64", "--budget-lines", 2, "--batch", 2, "--top-k", 0)
    bundle, engines = build(linert, export(folder, image_decoder, *options))
    assert engines.plans["decode"].plugins == {"LineAttention": 2}
    assert missing_plugins(bundle, engines) == []
    manifest = bundle.manifest
    stages = [name for name in manifest.stages if name != "decode"]
    samples = list_samples(conditions_of(["a red fox", "snow"]), 2, seed=4)
    batch = make_batch(manifest, open_conditioner(bundle), samples, manifest.sampling, manifest.cache)
    here, reference = emulated(bundle, stages), OrtBackend(bundle, stages)
    drawn, wanted = generate(here, batch), generate(reference, batch)
    assert (drawn == wanted).all()
    assert (generate(OrtCudaBackend(bundle, stages, device="cpu"), batch) == wanted).all()
    assert (drawn.reshape(2, 4, 7)[:, :, -1] == manifest.model.vocab_size).all()
    np.testing.assert_allclose(here.read("logits"), reference.read("logits"), atol=2e-4)
