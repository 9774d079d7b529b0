"""``linert export``: what stands in a bundle, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linert.exporter import bundle_export
from linert.exporter.bundle_folder import foreign_to_bundle
from linert.exporter.bundle_request import BundleRequest
from linert.exporter.cache_wishes import usual_cache
from linert.exporter.models import ModelRequest, load_models
from linert.exporter.sources import family_config, precision_settings
from linert.exporter.weights_file import WeightsFile
from linert.graphs.families import llamagen
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.errors import BundleError, ExportError, GeometryError, OutputError
from linert.runtime.files.locks import Lock, lock_path
from linert.runtime.plugins.contracts import DOMAIN, LINE_ATTENTION
from tests.conftest import ROOT, TINY, Result, cache_settings, random_state

Linert = Callable[..., Result]
Files = tuple[Path, Path]
TINY_OPTIONS = ("--grid", 6, "--heads", 4)


def test_a_bundle_holds_static_stages_and_one_weights_file(tiny_bundle: Path) -> None:
    names = {path.name for path in tiny_bundle.iterdir()}
    stages = {
        "admit.onnx",
        "prefill.onnx",
        "decode.onnx",
        "decode.unfiltered.onnx",
        "line_end.leverage.onnx",
        "line_end.replay.onnx",
        "vq_decoder.onnx",
    }
    assert names == {"manifest.json", "weights.bin", *stages}
    for name in stages:
        model = onnx.load(tiny_bundle / name, load_external_data=False)
        opset = 24 if name.startswith("decode") else 21
        assert {o.domain: o.version for o in model.opset_import}[""] == opset
        for value in (*model.graph.input, *model.graph.output):
            assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                assert {e.key: e.value for e in tensor.external_data}["location"] == "weights.bin"


def test_line_attention_is_one_node_a_layer_with_its_function_and_plugin_attributes(
    tiny_bundle: Path,
) -> None:
    model = onnx.load(tiny_bundle / "decode.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == LINE_ATTENTION.name]
    assert len(nodes) == TINY.layers
    for node in nodes:
        assert node.domain == DOMAIN
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"plugin_namespace": b"linert", "plugin_version": b"1"}
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, LINE_ATTENTION.name)]
    standard = {node.domain for node in model.functions[0].node}
    assert standard == {""}


def test_the_stages_hold_the_weights_once(tiny_bundle: Path) -> None:
    def places(name: str) -> dict[str, str]:
        model = onnx.load(tiny_bundle / name, load_external_data=False)
        return {
            t.name: str({e.key: e.value for e in t.external_data})
            for t in model.graph.initializer
            if t.name.startswith("model.layers.")
        }

    assert places("decode.unfiltered.onnx") == places("decode.onnx") != {}
    assert not places("prefill.onnx")


def test_graphs_tell_nothing_of_the_machine_that_made_them(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        assert str(ROOT).encode() not in path.read_bytes()


def test_state_memory_is_printed_first_and_stands_in_the_manifest(
    linert: Linert, tiny_files: Files, tmp_path: Path
) -> None:
    result = linert(
        "export",
        tiny_files[0],
        "--vq",
        tiny_files[1],
        *TINY_OPTIONS,
        "--out",
        tmp_path / "b",
        "--batch",
        3,
        "--budget-lines",
        2,
    )
    assert result.code == 0, result.err
    manifest = open_bundle(tmp_path / "b").manifest
    assert f"state memory: {manifest.state_bytes} bytes" in result.err
    slots, rows = 1 + 2 * 6, 3 * 2 * TINY.heads
    buffers = TINY.layers * rows * slots * (2 * 4 * TINY.head_dim + 4 + 4)
    loop = 8 * (3 + 3 * 36 + 2 * 6 + TINY.layers * rows * 6)
    condition = 3 * 2 * (4 * TINY.dim + 8)
    assert manifest.state_bytes == buffers + loop + condition


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget-lines", 7), "above the image's 6 lines"),
        (("--budget-lines", 0), "budget_lines is 0"),
        (("--budget-lines", 2, "--recent-lines", 2), "give at least 3 lines"),
        (("--budget-lines", 3, "--anchor-tokens", 7, "--recent-lines", 1), "give at least 4 lines"),
        (("--recent-lines", -1), "recent_lines is -1"),
        (("--policy", "full", "--budget-lines", 3), "evicts nothing"),
        (("--batch", 0), "a batch of 0 images"),
        (("--temperature", 0), "temperature 0.0"),
        (("--top-p", 1.5), "top_p 1.5"),
        (("--top-k", -1), "top_k -1"),
        (("--policy", "linear,nonsense"), "no policy nonsense"),
        (("--policy", "linear,full", "--capacity-lines", 3), "leave --capacity-lines out"),
        (("--capacity-lines", 2, "--budget-lines", 3), "above the 2 that the bundle's buffer has"),
        (("--capacity-lines", 9), "a buffer of 9 lines"),
        (("--layer-budgets", "3,2,2"), "budgets for 3 layers; the model has 2"),
        (("--layer-budgets", "cone"), "--layer-budgets cone"),
        (("--share-guidance", "--guidance", 1), "share_guidance needs a guided bundle"),
        (("--ema",), "no ema weights"),
        (("--heads", 7), "not a multiple of heads 7"),
        (("--grid", 1), "1 lines of 1 tokens"),
    ],
)
def test_bad_requests_are_refused_and_write_nothing(
    options: tuple[object, ...], message: str, linert: Linert, tiny_files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    result = linert("export", tiny_files[0], "--vq", tiny_files[1], *TINY_OPTIONS, "--out", out, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_no_bundle_is_written_where_none_can_be_opened(
    linert: Linert, tiny_files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "gar\udce7on" / "bundle"
    result = linert("export", tiny_files[0], "--vq", tiny_files[1], *TINY_OPTIONS, "--out", out)
    assert result.code == 2
    assert "is not in UTF-8" in " ".join(result.err.split())
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused_and_write_nothing(linert: Linert, tiny_files: Files, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(tiny_files[0].read_bytes()[:5000])
    for model, vq_file in ((broken, tiny_files[1]), (tiny_files[0], broken), (tiny_files[1], tiny_files[0])):
        result = linert("export", model, "--vq", vq_file, *TINY_OPTIONS, "--out", tmp_path / "b")
        assert result.code == 2
        assert "Traceback" not in result.err
        assert [path.name for path in tmp_path.iterdir()] == ["broken.pt"]


def test_a_tokenizer_of_another_codebook_is_refused(tiny_files: Files, golden_files: Files) -> None:
    with pytest.raises(ExportError, match="do not belong together"):
        request_of(tiny_files[0], golden_files[1])


def request_of(model: Path, vq_file: Path) -> BundleRequest:
    transformer, decoder = load_models(model, vq_file, ModelRequest(grid=6, heads=4))
    cache = cache_settings()
    return BundleRequest(
        transformer=transformer,
        image_decoder=decoder,
        policies=("linear",),
        capacity_lines=cache.budget_lines,
        cache=cache,
        images=1,
        sampling=SamplingSettings(),
    )


def test_a_bundle_is_replaced_by_force_alone(
    linert: Linert, tiny_files: Files, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    arguments = ("export", tiny_files[0], "--vq", tiny_files[1], *TINY_OPTIONS, "--out", out)
    result = linert(*arguments)
    assert result.code == 2
    assert "--force" in result.err
    assert open_bundle(out).manifest.images == 2
    result = linert(*arguments, "--force")
    assert result.code == 0, result.err
    assert open_bundle(out).manifest.images == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_replaces_nothing_but_a_bundle_and_says_so_first(
    linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Before the checkpoint is looked for, which is not there."""
    photographs, run, more = (tmp_path / name for name in ("photographs", "run", "more"))
    for folder, name in ((photographs, "holiday.jpg"), (run, "run.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    shutil.copytree(tiny_bundle, more)
    (more / "engines" / "mine").mkdir(parents=True)
    (more / "engines" / "mine" / "notes.md").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(photographs)
    before = sorted(tmp_path.rglob("*"))
    for out in (photographs, run, more, link, tmp_path, Path.home(), Path("/")):
        result = linert("export", "no.pt", "--out", out, "--force")
        said = " ".join(result.err.split())
        assert result.code == 2
        assert "not a bundle" in said or "more than a bundle" in said or "mount point" in said
        assert "no.pt" not in said
    assert sorted(tmp_path.rglob("*")) == before
    other = Lock.take(lock_path(tmp_path / "new"))
    assert other is not None
    result = linert("export", "no.pt", "--out", tmp_path / "new")
    other.release()
    assert "another linert is writing" in " ".join(result.err.split())
    assert "checkpoint" in linert("export", "no.pt", "--out", tmp_path / "new").err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_belongs_to_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert foreign_to_bundle(out) == []
    # Plans, other sizes, what was left unfinished, and a manifest of another version belong to it.
    for name in ("engines/rtx/engine.json", "engines/rtx.64x32/decode.plan", "engines/.rtx.linert-lock"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "engines" / ".rtx.0123456789abcdef.partial").mkdir()
    (out / "engines" / ".rtx.0123456789abcdef.partial" / "decode.plan").touch()
    content = json.loads((out / "manifest.json").read_text())
    content |= {"schema": 3, "files": {**content["files"], "older.onnx": {}}, "of_another_version": 1}
    (out / "manifest.64x32.json").write_text(json.dumps(content))
    (out / "older.onnx").touch()
    assert foreign_to_bundle(out) == []
    foreign = ["engines/rtx/notes", "engines/tensorrt", "link", "notes", "tokenizer/words"]
    for name in ("engines/rtx/notes", "notes", "tokenizer/words", "engines/tensorrt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "link").symlink_to(tmp_path)
    assert foreign_to_bundle(out) == foreign
    for text in (
        "",
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": 3, "producer": {"linert": "1"}}',
        "\xff",
        "[" * 100_000,
    ):
        (out / "manifest.json").write_text(text, encoding="latin-1")
        (out / "manifest.64x32.json").unlink(missing_ok=True)
        assert foreign_to_bundle(out) is None


def test_a_folder_that_cannot_be_made_is_an_error(linert: Linert, tiny_files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = linert(
        "export", tiny_files[0], "--vq", tiny_files[1], *TINY_OPTIONS, "--out", tmp_path / "file" / "bundle"
    )
    assert result.code == 2
    assert "cannot write" in result.err


def test_a_full_disk_is_an_error_and_leaves_the_old_bundle(
    monkeypatch: pytest.MonkeyPatch, tiny_files: Files, tiny_bundle: Path, tmp_path: Path
) -> None:
    def full(self: WeightsFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    request = request_of(*tiny_files)
    monkeypatch.setattr(WeightsFile, "_write", full)
    with pytest.raises(OutputError, match="disk is full"):
        bundle_export.export_bundle(request, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(out).manifest == open_bundle(tiny_bundle).manifest


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(
    ("kind", "delay"),
    [
        *((kind, delay) for kind in ("SIGINT", "SIGTERM") for delay in (0.0, 1.5, 3.0)),
        ("SIGHUP", 1.5),
        ("SIGQUIT", 1.5),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    kind: str, delay: float, tiny_files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    # A shell starts jobs in the background with SIGINT ignored, and nohup with SIGHUP.
    usual = "signal.default_int_handler" if kind == "SIGINT" else "signal.SIG_DFL"
    code = (
        f"import signal; signal.signal(signal.{kind}, {usual})\nfrom linert.runtime.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "export", tiny_files[0], "--vq"]
    process = subprocess.Popen(
        [*command, tiny_files[1], "--grid", "6", "--heads", "4", "--out", out],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "state memory" in line:
            break
    time.sleep(delay)
    process.send_signal(getattr(signal, kind))
    status = process.wait(timeout=60)
    if out.exists():
        assert status == 0
        assert open_bundle(out)
    else:
        assert status == 130
    assert [path.name for path in tmp_path.iterdir()] in ([], ["bundle"])


@pytest.mark.parametrize("head_dim", [100, 12])
def test_head_sizes_that_are_no_power_of_two(
    head_dim: int, linert: Linert, export: Callable[..., Path], tiny_files: Files, tmp_path: Path
) -> None:
    config = llamagen.LlamaGenConfig(2, 2 * head_dim, 2, 64, 64, 5, grid=4)
    model = tmp_path / "model.pt"
    torch.save({"model": random_state(llamagen.LlamaGen(config))}, model)
    bundle = export(model, tiny_files[1], "--grid", 4, "--heads", 2, "--budget-lines", 2)
    result = linert("validate", bundle, "--json")
    assert result.code == 0, result.out + result.err
    assert json.loads(result.out)["passed"]


@given(
    lines=st.integers(2, 64), width=st.integers(2, 65), prefix=st.integers(1, 120), budget=st.integers(1, 64)
)
def test_default_protection_always_fits_the_budget(lines: int, width: int, prefix: int, budget: int) -> None:
    raster = Raster(prefix, width, lines)
    for shape in (None, "pyramid"):
        request = CacheRequest(budget_lines=min(budget, lines), layer_budgets=shape)
        cache = usual_cache(raster, 5, ["linear"], request, guided=True)
        cache.check(raster, cache.budget_lines)
        assert sum(cache.budget_lines) == 5 * min(budget, lines)
    cache = usual_cache(raster, 5, ["full"], CacheRequest(), guided=True)
    cache.check(raster, cache.budget_lines)


@given(
    lines=st.integers(2, 40),
    width=st.integers(2, 40),
    budget=st.integers(-1, 45),
    recent=st.integers(-1, 45),
    anchors=st.integers(-1, 200),
)
def test_a_budget_is_accepted_exactly_when_a_line_can_always_be_evicted(
    lines: int, width: int, budget: int, recent: int, anchors: int
) -> None:
    cache = cache_settings(budget_lines=(budget,) * 3, recent_lines=recent, anchor_tokens=anchors)
    fits = budget * width - anchors - recent * width >= width or budget == lines
    valid = 1 <= budget <= lines and recent >= 0 and anchors >= 0 and fits
    if valid:
        cache.check(Raster(1, width, lines), (lines,) * 3)
    else:
        with pytest.raises(GeometryError):
            cache.check(Raster(1, width, lines), (lines,) * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "diffusion"}, "holds a diffusion, and there are llamagen"),
        ({"config": {}}, "is no llamagen's"),
        ({"config": {"layers": "two"}}, "is no llamagen's"),
        ({"config": {**asdict(TINY), "heads": 0}}, "heads is 0, must be at least 1"),
        ({"config": {**asdict(TINY), "grid": 10**9}}, "must be 1 to 512 of each"),
        ({"config": {**asdict(TINY), "ffn_dim": -1}}, "ffn_dim is -1, must be at least 1"),
        ({"config": {**asdict(TINY), "num_classes": 10**30}}, "num_classes is 1000.*, must be"),
        ({"config": {**asdict(TINY), "layers": 10**6}}, "layers is 1000000, must be"),
        ({"config": {**asdict(TINY), "vocab_size": 0}}, "vocab_size is 0, must be"),
        *[
            ({"config": {**asdict(TINY), "rope_base": base}}, "rope_base is .*, must be a number from 1")
            for base in (0.0, -1.0, float("nan"), float("inf"), "1")
        ],
        ({"config": {**asdict(TINY), "norm_eps": float("nan")}}, "norm_eps is nan, must be a number"),
        # What JSON has for numbers that are none.
        ({"config": {**asdict(TINY), "rope_base": None}}, "rope_base is None, must be told"),
        ({"config": {**asdict(TINY), "dim": 10**6}}, "dim is 1000000, must be a whole number from 1"),
    ],
)
def test_a_manifest_of_no_model_is_refused(
    change: dict[str, object], message: str, tiny_bundle: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    model = msgspec.structs.replace(bundle.manifest.model, **change)
    forged = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, model=model))
    with pytest.raises(BundleError, match=message):
        family_config(forged)


def test_a_manifest_of_no_precision_is_refused(tiny_bundle: Path) -> None:
    spec = open_bundle(tiny_bundle).manifest.precision
    for change in ({"weights": "fp8"}, {"activations": ""}, {"method": "magic"}, {"parts": {"0": "int3"}}):
        with pytest.raises(BundleError, match="a precision that there is not"):
            precision_settings(msgspec.structs.replace(spec, **change))
