"""Every backend does the same: the tests run on each that is here, and on an emulated GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest

from linert.runtime.backends.base import Backend
from linert.runtime.backends.cuda import Device
from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.backends.ort_cuda import OrtCudaBackend
from linert.runtime.backends.trt import TrtBackend
from linert.runtime.backends.trt_flavour import FLAVOURS, Flavour
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.loop import generate
from linert.runtime.errors import BundleError, DeviceError, LinertError, RequestError
from tests.conftest import TINY, Result
from tests.runtime.test_ort import STAGES, tiny_batch

Open = Callable[..., Backend]
EVERYWHERE = [*BackendName, "cuda, on the CPU", "rtx, emulated"]


def emulated(bundle: Bundle, stages: Sequence[str], **options: bool) -> TrtBackend:
    """The TensorRT backend on a GPU that is not there."""
    pytest.importorskip("cuda.bindings")
    from tests.emulated_gpu import EmulatedDriver, EmulatedTensorRT

    driver = EmulatedDriver()
    module = EmulatedTensorRT("rtx", FLAVOURS["rtx"].load(), bundle, driver)
    flavour = cast("Flavour", SimpleNamespace(name="rtx", load=lambda: module))
    return TrtBackend(bundle, stages, flavour, device=Device(driver), **options)


@pytest.fixture(params=EVERYWHERE)
def opened(
    request: pytest.FixtureRequest, planned_bundle: Path, linert: Callable[..., Result], tmp_path: Path
) -> Open:
    """Opens a bundle's stages on one backend; skips where it cannot be had, saying why."""
    name = request.param
    if name == "cuda, on the CPU":
        return lambda bundle, stages: OrtCudaBackend(bundle, stages, device="cpu")
    if name == "rtx, emulated":
        return emulated
    options = BackendOptions(name)
    if name not in FLAVOURS:
        skip_unless(name, lambda: options.open(open_bundle(planned_bundle), ["prefill"]))
        return options.open
    skip_unless(name, Device)
    skip_unless(name, FLAVOURS[name].load)
    copy = shutil.copytree(planned_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    result = linert("build", copy, "--target", name, "--sm", "current")
    assert result.code == 0, result.err
    return lambda bundle, stages: options.open(open_bundle(copy), stages)


def skip_unless(name: str, possible: Callable[[], object]) -> None:
    try:
        possible()
    except LinertError as error:
        pytest.skip(f"{name}: {error}")


def test_it_draws_what_the_cpu_draws(opened: Open, planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    here, reference = opened(bundle, STAGES), OrtBackend(bundle, STAGES)
    for seed in (0, 9):
        drawn = generate(here, tiny_batch(here, seed))
        wanted = generate(reference, tiny_batch(reference, seed))
        assert (drawn == wanted).all()
        for name in ("position", "write_slots", "slot_pos.1"):
            assert (here.read(name) == reference.read(name)).all()
        for name in ("logits", "scores.0", "k_cache.1"):
            np.testing.assert_allclose(here.read(name), reference.read(name), atol=2e-4)


def test_pixels_are_the_cpu_s(opened: Open, planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    tokens = np.arange(TINY.image_tokens)[None] % 64
    pixels = []
    for backend in (opened(bundle, ["vq_decoder"]), OrtBackend(bundle, ["vq_decoder"])):
        backend.write("grid_tokens", tokens)
        backend.run("vq_decoder")
        pixels.append(backend.read("pixels"))
    np.testing.assert_allclose(*pixels, atol=1e-3)


def test_one_seed_gives_the_same_tokens(opened: Open, planned_bundle: Path) -> None:
    backend = opened(open_bundle(planned_bundle), STAGES)
    first, other, again = (generate(backend, tiny_batch(backend, seed)) for seed in (4, 5, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_lines_are_reported_when_their_tokens_are_drawn(opened: Open, planned_bundle: Path) -> None:
    backend = opened(open_bundle(planned_bundle), STAGES)
    seen: list[tuple[int, np.ndarray]] = []
    tokens = generate(backend, tiny_batch(backend), lambda n: seen.append((n, backend.read("tokens"))))
    assert [lines for lines, _ in seen] == list(range(1, TINY.lines + 1))
    for lines, partial in seen:
        drawn = lines * TINY.line_width
        assert (partial[:, :drawn] == tokens[:, :drawn]).all()


def test_evictions_can_be_imposed(opened: Open, planned_bundle: Path) -> None:
    """What is written between two steps is what the next one sees."""
    bundle = open_bundle(planned_bundle)
    stages = [*STAGES, "line_end.replay"]
    here, reference = opened(bundle, stages), OrtBackend(bundle, stages)
    rng = np.random.default_rng(3)
    shape = reference.specs["write_slots"].shape
    slots = rng.permuted(
        np.broadcast_to(np.arange(1, 1 + TINY.grid * 3), (*shape[:2], TINY.grid * 3)), axis=2
    )
    replay = np.stack([np.roll(slots, line, axis=2)[:, :, : shape[2]] for line in range(TINY.lines - 1)])
    drawn = []
    for backend in (here, reference):
        drawn.append(generate(backend, dataclasses.replace(tiny_batch(backend), replay=replay)))
    assert (drawn[0] == drawn[1]).all()


def test_unfit_values_are_refused(opened: Open, planned_bundle: Path) -> None:
    backend = opened(open_bundle(planned_bundle), STAGES)
    for name, value, message in (
        ("nonsense", 0, "no stage of this backend"),
        ("class_ids", np.zeros(3, np.int64), "shape"),
        ("class_ids", np.zeros(2, np.float32), "int64"),
    ):
        with pytest.raises(RequestError, match=message):
            backend.write(name, value)
    with pytest.raises(RequestError, match="does not hold stage"):
        backend.run("vq_decoder")


def test_a_token_costs_one_launch(planned_bundle: Path) -> None:
    backend = emulated(open_bundle(planned_bundle), STAGES)
    generate(backend, tiny_batch(backend))
    launches = backend.device.driver.launches
    before = dict(launches)
    batch = tiny_batch(backend, seed=1)
    generate(backend, batch)
    raster = backend.bundle.manifest.raster
    steps = raster.prefix_len + sum(1 for _ in raster.schedule())
    # The prefill is captured in this, its second run.
    assert launches["graph"] - before["graph"] == 1 + steps
    # Nothing else but what the batch writes, the logits looked at once a line, the noise of the lines behind the first two, and the
    # tokens read at the end.
    written = len(batch.conditions) + 1 + sum(name in backend.specs for name in SETTINGS)
    assert launches["operation"] - before["operation"] == written + raster.lines + (raster.lines - 2) + 1
    nodes = backend.graphs["decode.unfiltered"].nodes
    # Caches, scores and positions are updated in place; the loop's three small states are copied.
    assert nodes == {"CU_GRAPH_NODE_TYPE_KERNEL": 1, "CU_GRAPH_NODE_TYPE_MEMCPY": 3}


SETTINGS = (
    *(
        "guidance",
        "guidance_interval",
        "temperature",
        "top_k",
        "top_p",
        "greedy",
        "capacity",
        "recent_tokens",
    ),
    *("anchor_tokens", "strict", "score_window", "score_max", "average_heads", "share_guidance"),
)


def test_state_stays_where_it_is(planned_bundle: Path) -> None:
    backend = emulated(open_bundle(planned_bundle), STAGES)
    states = [spec.name for spec in backend.bundle.manifest.state]
    before = [backend.address(name) for name in states]
    generate(backend, tiny_batch(backend))
    allocated = backend.device.driver.cuMemGetInfo()
    generate(backend, tiny_batch(backend, seed=2))
    assert [backend.address(name) for name in states] == before
    # Apart from page-locked memory, which the first batch needed as well.
    assert backend.device.driver.cuMemGetInfo() == allocated


def test_without_graphs_it_draws_the_same(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    backend, plain = emulated(bundle, STAGES), emulated(bundle, STAGES, cuda_graphs=False)
    wanted = generate(backend, tiny_batch(backend))
    assert (generate(plain, tiny_batch(plain)) == wanted).all()
    assert plain.device.driver.launches["graph"] == 0
    assert not plain.graphs


def test_falling_back_from_graphs_is_an_error(planned_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = emulated(open_bundle(planned_bundle), STAGES)
    copy = Device.copy

    def refuse(device: Device, target: int, source: int, size: int) -> None:
        device.allocate(1)
        copy(device, target, source, size)

    monkeypatch.setattr(Device, "copy", refuse)
    with pytest.raises(DeviceError, match="--no-cuda-graphs"):
        generate(backend, tiny_batch(backend))


def test_a_plan_that_allocates_while_it_runs_is_refused_when_it_is_loaded(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    backend, plain = emulated(bundle, STAGES), emulated(bundle, STAGES, cuda_graphs=False)
    for here in (backend, plain):
        plan = msgspec.structs.replace(here.engines.plans["prefill"], user_allocation=False)
        here.trt._stages[plan.sha256] = "prefill", plan
    with pytest.raises(DeviceError, match=r"prefill.*allocates.*--no-cuda-graphs.*linert build"):
        backend.load("prefill")
    plain.run("prefill")


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuGraphLaunch", "cuStreamBeginCapture"])
def test_what_the_driver_refuses_of_a_graph_says_what_to_do(
    call: str, planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import emulated_gpu

    backend = emulated(open_bundle(planned_bundle), STAGES)
    driver = backend.device.driver
    generate(backend, tiny_batch(backend))
    monkeypatch.setattr(driver, call, lambda *arguments: (emulated_gpu.FULL, None))
    with pytest.raises(DeviceError, match=r"stage prefill.*OUT_OF_MEMORY.*--no-cuda-graphs"):
        generate(backend, tiny_batch(backend))
    monkeypatch.undo()
    backend.close()
    backend.device.close()
    assert not +driver.live


def test_copies_that_nobody_asked_for_are_told(
    planned_bundle: Path, linert: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    from tests.emulated_gpu import EmulatedDriver, EmulatedEngine, EmulatedTensorRT

    bundle = open_bundle(planned_bundle)
    driver = EmulatedDriver()
    module = EmulatedTensorRT("rtx", FLAVOURS["rtx"].load(), bundle, driver)
    monkeypatch.setattr("linert.runtime.backends.cuda._driver", lambda: driver)
    monkeypatch.setattr(Flavour, "load", lambda flavour: module)
    asked = linert("inspect", planned_bundle, "--graphs", "rtx")
    assert asked.code == 0, asked.err
    assert "1 kernel" in asked.out
    assert "warning" not in asked.out
    execute = EmulatedEngine.execute_async_v3

    def with_a_copy(engine: EmulatedEngine, stream: int) -> bool:
        cache = engine._addresses.get("k_cache.0")
        if cache is not None:
            driver.cuMemcpyDtoDAsync(cache, cache, 64, stream)
        return execute(engine, stream)

    monkeypatch.setattr(EmulatedEngine, "execute_async_v3", with_a_copy)
    told = json.loads(linert("inspect", planned_bundle, "--graphs", "rtx", "--json").out)["graphs"]
    graphs = {graph["stage"]: graph for graph in told}
    assert graphs["decode"]["unasked"] == ["k_cache.0 onto itself, 64 bytes"]
    assert graphs["decode"]["copied_back"] > 0
    assert not graphs["vq_decoder"]["unasked"]
    assert "warning: decode copies 1" in linert("inspect", planned_bundle, "--graphs", "rtx").out.replace(
        "\n", " "
    )
    assert not +driver.live


def test_everything_is_given_back(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    backend = emulated(bundle, STAGES)
    device = backend.device
    driver = device.driver
    with backend:
        generate(backend, tiny_batch(backend))
        generate(backend, tiny_batch(backend, seed=1))
        assert driver.live["executable graph"] == len(backend.graphs) > 2
    # The device is not the backend's own.
    assert +driver.live == {"context": 1, "stream": 1}
    with pytest.raises(RequestError, match="closed"):
        backend.read("tokens")
    with pytest.raises(RequestError, match="closed"):
        backend.run("prefill")
    device.close()
    device.close()
    assert not +driver.live


def test_a_device_that_is_dropped_gives_everything_back() -> None:
    pytest.importorskip("cuda.bindings")
    from tests.emulated_gpu import EmulatedDriver

    driver = EmulatedDriver()
    device = Device(driver)
    device.upload(device.allocate(8), np.zeros(2, np.int32))
    assert device.copy_bandwidth(1 << 10) > 0
    assert +driver.live == {"context": 1, "stream": 1, "memory": 2}
    del device
    assert not +driver.live


def test_a_backend_that_cannot_be_made_keeps_no_device(
    planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    from tests.emulated_gpu import EmulatedDriver, EmulatedTensorRT

    bundle = open_bundle(planned_bundle)
    driver = EmulatedDriver()
    module = EmulatedTensorRT("rtx", FLAVOURS["rtx"].load(), bundle, driver)
    flavour = cast("Flavour", SimpleNamespace(name="rtx", load=lambda: module))
    monkeypatch.setattr("linert.runtime.backends.cuda._driver", lambda: driver)
    monkeypatch.setattr(Device, "capability", 120)
    with pytest.raises(BundleError, match="SM120"):
        TrtBackend(bundle, STAGES, flavour)
    assert not +driver.live
    monkeypatch.setattr(Device, "capability", 89)
    with TrtBackend(bundle, STAGES, flavour) as backend:
        generate(backend, tiny_batch(backend))
    assert not +driver.live


@pytest.mark.parametrize("name", ["cpu", "cuda, on the CPU"])
def test_a_closed_session_backend_holds_nothing(name: str, planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    with (
        OrtBackend(bundle, STAGES)
        if name == "cpu"
        else OrtCudaBackend(bundle, STAGES, device="cpu") as backend
    ):
        backend.run("prefill")
        tensor = weakref.ref(backend._values["k_cache.0"])
        session = weakref.ref(backend._bindings["prefill"][0])
    assert tensor() is None
    assert session() is None
    with pytest.raises(RequestError, match="closed"):
        backend.run("prefill")


@pytest.mark.parametrize("wrong", ["version", "capability", "plugin", "tensors"])
def test_plans_that_do_not_fit_this_machine_are_refused(
    wrong: str, planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    from tests import emulated_gpu

    bundle = open_bundle(planned_bundle)
    if wrong == "version":
        monkeypatch.setattr(emulated_gpu.EmulatedTensorRT, "__version__", "0.1", raising=False)
    elif wrong == "capability":
        monkeypatch.setattr(Device, "capability", 120)
    elif wrong == "plugin":
        monkeypatch.setattr("linert.runtime.backends.trt.PLUGIN_VERSION", "2")
    else:
        monkeypatch.setattr(emulated_gpu.EmulatedEngine, "get_tensor_shape", lambda engine, name: (1,))
    with pytest.raises(BundleError, match=r"linert build .* --target rtx"):
        emulated(bundle, STAGES).run("prefill")


def test_a_plan_that_was_changed_is_refused_when_it_is_loaded(planned_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(planned_bundle, tmp_path / "bundle"))
    plan = copy / "engines" / "rtx" / "decode.unfiltered.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    backend = emulated(open_bundle(copy), STAGES)
    backend.run("prefill")
    with pytest.raises(BundleError, match=r"decode.unfiltered.*was changed.*linert build"):
        backend.run("decode.unfiltered")


def test_memory_that_is_not_there_is_said(planned_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr("tests.emulated_gpu.MEMORY", 20_000)
    with pytest.raises(DeviceError, match=r"Emulated GPU has .* free"):
        emulated(open_bundle(planned_bundle), STAGES)


def test_a_backend_that_is_not_here_says_what_to_do(
    planned_bundle: Path, linert: Callable[..., Result]
) -> None:
    for name in (BackendName.RTX, BackendName.CUDA):
        try:
            Device()
        except DeviceError:
            result = linert(
                "run", planned_bundle, "--classes", 1, "--backend", name, "--out", planned_bundle / "no"
            )
            assert result.code == 2
            assert "Traceback" not in result.err
            assert any(word in result.err for word in ("no CUDA", "linert build", "pip install"))
            assert not (planned_bundle / "no").exists()


def test_a_runtime_that_is_not_installed_says_what_to_install(
    planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("linert.runtime.backends.ort", "linert.runtime.backends.ort_sessions", "onnxruntime"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without("onnxruntime"), *sys.meta_path])
    with pytest.raises(LinertError, match=r"needs onnxruntime.*linert\[cpu\]"):
        BackendOptions().open(open_bundle(planned_bundle), ["prefill"])


class Without(MetaPathFinder):
    """Finds a package nowhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def test_the_generator_takes_a_backend(planned_bundle: Path) -> None:
    image = Generator(planned_bundle, BackendOptions(BackendName.CPU, threads=1)).generate([1])[0]
    assert (image.tokens == Generator(planned_bundle).generate([1])[0].tokens).all()
