"""Plans from bundles with TensorRT for RTX, which builds them without a GPU."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import onnx
import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

from linert.exporter.bundle_folder import PLANS
from linert.exporter.tensorrt.build import BuildRequest, environment_of, parse_capabilities
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.backends.trt_flavour import FLAVOURS
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.engines import engines_folder, missing_plugins, read_engines
from linert.runtime.drawing.loop import generate
from linert.runtime.errors import BundleError, ExportError
from linert.runtime.files.replacement import claim_folder
from linert.runtime.plugins.kernels import CompiledKernel
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from tests.conftest import ROOT, TINY, Result
from tests.exporter.compiler import run_compiler
from tests.graphs.test_line_attention import function_model, random_inputs
from tests.runtime.test_backends import emulated
from tests.runtime.test_ort import STAGES, tiny_batch

Linert = Callable[..., Result]
OPTIONS = ("--grid", 6, "--heads", 4, "--batch", 2, "--guidance", 3, "--budget-lines", 3)
SM = ("--target", "rtx", "--sm", "80,89")


@pytest.fixture(scope="module")
def half(export: Callable[..., Path], tiny_files: tuple[Path, Path]) -> Path:
    """A tiny bundle in halves."""
    return export(*tiny_files, *OPTIONS, "--precision", "fp16", "--activations", "fp16")


@pytest.fixture(scope="module")
def built(half: Path, linert: Linert) -> Path:
    """The same with plans that hold the plugin."""
    result = linert("build", half, *SM)
    assert result.code == 0, result.err
    assert "7 stages" in result.out
    return half


def test_every_stage_has_a_plan_and_every_layer_the_plugin(built: Path) -> None:
    bundle = open_bundle(built)
    engines = read_engines(bundle, "rtx")
    assert set(engines.plans) == set(bundle.manifest.stages)
    assert engines.capabilities == (80, 89)
    for stage in ("decode", "decode.unfiltered"):
        plan = engines.plans[stage]
        assert plan.plugins == plan.operations == {"LineAttention": TINY.layers}
        for layer in range(TINY.layers):
            for name in ("k_cache", "v_cache", "scores", "slot_pos"):
                assert plan.aliases[f"{name}.{layer}.next"] == f"{name}.{layer}"
    assert engines.plans["line_end.leverage"].plugins == {"LineEvict": 1}
    assert not engines.plans["vq_decoder"].operations
    assert missing_plugins(bundle, engines) == []
    # Without it TensorRT for RTX may allocate memory in a run, which then cannot be captured.
    assert all(plan.user_allocation for plan in engines.plans.values())
    weights = engines.plans["decode"].weights_bytes
    assert weights is not None
    assert weights >= 2 * 12 * TINY.layers * TINY.dim**2


def test_inspect_tells_what_the_plans_hold(built: Path, linert: Linert) -> None:
    result = linert("inspect", built, "--layers", "decode.unfiltered")
    assert result.code == 0, result.err
    assert f"{TINY.layers}/{TINY.layers} LineAttention" in result.out
    assert "1/1 LineEvict" in result.out
    assert "plugins version 1" in result.out
    assert "SM80, SM89" in result.out
    assert "k_cache.1.next: HALF" in result.out
    told = json.loads(linert("inspect", built, "--json").out)
    assert told["engines"]["rtx"]["plans"]["decode"]["aliases"]["scores.0.next"] == "scores.0"


def test_building_again_with_nothing_changed_does_nothing(built: Path, linert: Linert) -> None:
    record = engines_folder(open_bundle(built), "rtx") / "engine.json"
    before = record.stat().st_mtime_ns
    result = linert("build", built, *SM)
    assert result.code == 0, result.err
    assert "nothing changed" in result.out
    assert record.stat().st_mtime_ns == before


def test_without_the_plugin_its_body_is_built(built: Path, linert: Linert, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "bundle"))
    result = linert("build", copy, *SM, "--no-plugin")
    assert result.code == 0, result.err
    engines = read_engines(open_bundle(copy), "rtx")
    assert engines.plugin_version == ""
    assert not any(plan.plugins for plan in engines.plans.values())
    assert "0/1 LineEvict" in linert("inspect", copy).out
    decode = engines.plans["decode"]
    assert "SOFTMAX" in {layer.kind for layer in decode.layers}
    # TensorRT writes caches in place itself; scores and positions are copied back.
    caches = {f"{kind}.{layer}" for kind in ("k_cache", "v_cache") for layer in range(TINY.layers)}
    assert set(decode.aliases.values()) == caches
    bundle = open_bundle(copy)
    there, reference = emulated(bundle, STAGES), OrtBackend(bundle, STAGES)
    for seed in (0, 1):
        assert (
            generate(there, tiny_batch(there, seed)) == generate(reference, tiny_batch(reference, seed))
        ).all()
    assert there.graphs["decode.unfiltered"].nodes["CU_GRAPH_NODE_TYPE_MEMCPY"] == 3 + 2 * TINY.layers


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "another export", "no record"])
def test_plans_that_do_not_belong_are_refused(damage: str, built: Path, tmp_path: Path) -> None:
    bundle = open_bundle(Path(shutil.copytree(built, tmp_path / "bundle")))
    folder = engines_folder(bundle, "rtx")
    plan, record = folder / "prefill.plan", folder / "engine.json"
    if damage == "changed":
        data = bytearray(plan.read_bytes())
        data[100] ^= 1
        plan.write_bytes(data)
    elif damage == "shorter":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "missing":
        plan.unlink()
    elif damage == "another export":
        content = json.loads(record.read_text())
        record.write_text(json.dumps(content | {"bundle": "0" * 64}))
    else:
        record.unlink()
    with pytest.raises(BundleError, match=r"linert build .* --target rtx"):
        read_engines(bundle, "rtx")


def test_what_tensorrt_cannot_read_is_said_and_leaves_nothing(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], linert: Linert
) -> None:
    bundle = export(*tiny_files, *OPTIONS, "--precision", "int8", "--calibration-images", 1)
    result = linert("build", bundle, *SM)
    assert result.code == 2
    assert "vq_decoder" in result.err
    assert "--image-decoder-precision fp16" in result.err
    assert "Traceback" not in result.err
    assert not list((bundle / "engines").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the size of files")
def test_a_plan_that_cannot_be_written_whole_is_no_plan(half: Path, tmp_path: Path) -> None:
    """TensorRT itself says nothing of it."""
    bundle = Path(shutil.copytree(half, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from linert.runtime.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "build", bundle, *SM, "--no-plugin"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list((bundle / "engines").iterdir())


def running_commands() -> Iterator[str]:
    """The command lines of all processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        # It may have ended.
        with contextlib.suppress(OSError):
            yield file.read_text(errors="replace")


@pytest.mark.skipif(sys.platform != "linux", reason="sends POSIX signals and reads /proc")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing(kind: signal.Signals, half: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(half, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
    # A shell starts jobs in the background with SIGINT ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from linert.runtime.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "build", bundle, *SM], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(bundle.glob("engines/.rtx.*/prefill.plan")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if kind is signal.SIGKILL:
        # What it started ends by itself, and goes on writing nothing; the next start cleans up.
        assert process.returncode == -kind, said
        while any(str(bundle) in command for command in running_commands()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list((bundle / "engines").iterdir())
        with claim_folder(bundle / "engines" / "rtx", PLANS, force=True):
            pass
    else:
        assert process.returncode == 130, said
    assert not list((bundle / "engines").iterdir())
    assert not any(str(bundle) in command for command in running_commands())


def test_requests_that_cannot_be_met_are_refused(half: Path, linert: Linert) -> None:
    result = linert("build", half, "--target", "rtx", "--sm", "fast")
    assert result.code == 2
    assert "80,86,89,120" in result.err
    result = linert("build", half, "--target", "rtx", "--sm", "")
    assert result.code == 2
    assert "80,86,89,120" in result.err
    result = linert("build", half, "--target", "tensorrt", "--sm", "80")
    assert result.code == 2
    assert "GPU at hand" in result.err
    result = linert("build", half, "--target", "rtx", "--sm", "89,90")
    assert result.code == 2
    assert "has no SM90, only SM75" in result.err
    assert "--target tensorrt" in result.err
    assert parse_capabilities("sm89, 8.0") == (80, 89)
    with pytest.raises(ExportError):
        parse_capabilities("")


def test_launches_follow_the_state(half: Path) -> None:
    request = BuildRequest(open_bundle(half), FLAVOURS["rtx"], (80,), True)
    rows, head = 4 * TINY.heads, TINY.head_dim
    # With and without filters.
    launch = LineAttentionLaunch.tuned(rows, 1, 1 + 3 * TINY.grid, head, "float16")
    assert request.launches() == [launch] * (2 * TINY.layers)


def test_kernels_are_compiled_without_a_gpu(tmp_path: Path) -> None:
    compiled = tmp_path / "kernels"
    script = (
        "import sys, msgspec; from pathlib import Path\n"
        "from linert.exporter.tensorrt.compile import kernels_of\n"
        "from linert.runtime.plugins.line_attention import LineAttentionLaunch\n"
        "from linert.runtime.plugins.line_evict import LineEvictLaunch\n"
        "found = kernels_of(LineAttentionLaunch.tuned(24, 1, 97, 100, 'bfloat16'), [80, 90, 120]).kernels\n"
        "found |= kernels_of(LineEvictLaunch((97, 73), 24, 24, 24, 1, 12, 2, 4, 0), [80, 90, 120]).kernels\n"
        "Path(sys.argv[1]).write_bytes(msgspec.msgpack.encode(found))\n"
    )
    run_compiler(script, compiled)
    kernels = msgspec.msgpack.decode(compiled.read_bytes(), type=dict[str, CompiledKernel])
    assert set(kernels) == {"attend", "combine", "line_evict"}
    for kernel in kernels.values():
        assert set(kernel.cubins) == {80, 90, 120}
        assert all(code.startswith(b"\x7fELF") for code in kernel.cubins.values())
        assert b".target sm_80" in kernel.ptx
        assert kernel.image(86) == kernel.cubins[80]
        assert kernel.image(90) == kernel.cubins[90]
        assert kernel.image(100) == kernel.ptx


def test_a_kernel_that_needs_memory_of_triton_s_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "described.py"
    # The description of a tensor lies in such memory.
    file.write_text(
        "import triton, triton.language as tl\n"
        "from linert.exporter.tensorrt.compile import compile_kernel\n"
        "@triton.jit\n"
        "def described(source, target, BLOCK: tl.constexpr):\n"
        "    tensor = tl.make_tensor_descriptor(source, [BLOCK], [1], [BLOCK])\n"
        "    tl.store(target + tl.arange(0, BLOCK), tensor.load([0]))\n"
        "try:\n"
        "    compile_kernel(described, dict.fromkeys(('source', 'target'), '*fp32'), {'BLOCK': 32}, [90], 1)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    said = run_compiler("import runpy, sys; runpy.run_path(sys.argv[1])", file)
    assert "ExportError" in said
    assert "compiled described to need memory of its own (global_scratch_size 128, " in said
    assert "--no-plugin" in said


def test_what_triton_cannot_do_is_said_by_the_build(tmp_path: Path) -> None:
    file = tmp_path / "one_node.onnx"
    onnx.save(function_model(random_inputs(4, 1, 9, 8)), file)
    # In the place of a Triton whose kernels need memory of its own.
    script = (
        "import sys; from types import SimpleNamespace\n"
        "from linert.exporter.tensorrt import compile\n"
        "from linert.exporter.tensorrt.build_stage import Job, build\n"
        "refuse = compile.refuse_hidden_memory\n"
        "compile.refuse_hidden_memory = lambda name, _: refuse(name, SimpleNamespace(global_scratch_size=1))\n"
        "print(build(Job('rtx', sys.argv[1], sys.argv[2], (89,), True)).error)\n"
    )
    with environment_of(FLAVOURS["rtx"]) as environment:
        said = run_compiler(script, file, tmp_path / "plan", environment=environment)
    assert "compiled attend to need memory of its own (global_scratch_size 1" in said
    assert "--no-plugin" in said
