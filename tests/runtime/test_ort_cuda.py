"""ONNX Runtime on CUDA: what its first runs do, what its graphs hold, and which operators it has kernels for."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from linert.runtime.backends.base import Backend
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.backends.ort_cuda import OrtCudaBackend, cuda_options
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.drawing.loop import Batch, generate
from linert.runtime.errors import BundleError, DeviceError, RequestError
from tests.conftest import TINY, cache_settings
from tests.onnxruntime_cuda import CapturingBackend, constant_outputs, cuda_faults, inlined, without_kernel
from tests.runtime.test_ort import tiny_batch

Made = Callable[[Backend], Batch]
STAGES = ["prefill", "decode", "decode.unfiltered", "line_end.leverage", "line_end.h2o", "line_end.replay"]


def filtered(batch: Batch) -> Batch:
    return dataclasses.replace(batch, sampling=msgspec.structs.replace(batch.sampling, top_k=20, top_p=0.9))


def under_h2o(batch: Batch) -> Batch:
    return dataclasses.replace(batch, cache=cache_settings(policy="h2o", budget_lines=(3, 3)))


def replayed(batch: Batch, backend: Backend) -> Batch:
    layers, rows, width = backend.specs["write_slots"].shape
    lines = np.arange(1, 1 + width) + width * (np.arange(TINY.lines - 1)[:, None] % 2)
    return dataclasses.replace(
        batch, replay=np.broadcast_to(lines[:, None, None], (len(lines), layers, rows, width)).copy()
    )


def batches_in_turn(backend: Backend) -> list[Batch]:
    """With and without filters, another policy, evictions imposed, and what was drawn first again."""
    first, second = tiny_batch(backend), tiny_batch(backend, seed=5)
    return [first, filtered(second), under_h2o(second), filtered(first), replayed(second, backend), first]


def test_a_first_run_that_executes_three_times_draws_the_cpu_s_tokens(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    captured, reference = CapturingBackend(bundle, STAGES, device="cpu"), OrtBackend(bundle, STAGES)
    for batch in batches_in_turn(reference):
        wanted = generate(reference, batch)
        assert (generate(captured, batch) == wanted).all()
        for name in ("position", "write_slots", "slot_pos.1"):
            assert (captured.read(name) == reference.read(name)).all()


def test_another_thread_captures_for_itself(planned_bundle: Path) -> None:
    backend = CapturingBackend(open_bundle(planned_bundle), STAGES, device="cpu")
    drawn: list[np.ndarray] = []

    def draw() -> None:
        drawn.append(generate(backend, tiny_batch(backend)))

    draw()
    for _ in range(2):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    draw()
    assert len(drawn) == 4
    assert all((tokens == drawn[0]).all() for tokens in drawn)


def test_a_stage_that_updates_its_state_is_not_run_before_it_is_loaded(planned_bundle: Path) -> None:
    backend = OrtCudaBackend(open_bundle(planned_bundle), STAGES, device="cpu")
    # These read nothing that they write.
    backend.run("prefill")
    backend.run("line_end.leverage")
    with pytest.raises(RequestError, match=r"decode\.unfiltered .*must be loaded"):
        backend.run("decode.unfiltered")
    backend.load("decode.unfiltered")
    backend.run("decode.unfiltered")
    plain = OrtCudaBackend(open_bundle(planned_bundle), STAGES, device="cpu", cuda_graphs=False)
    plain.run("prefill")
    plain.run("decode.unfiltered")


def test_a_stage_is_loaded_whatever_the_last_image_left(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    backend, reference = CapturingBackend(bundle, STAGES, device="cpu"), OrtBackend(bundle, STAGES)
    for state in bundle.manifest.state:
        backend.write(state.name, np.full(state.shape, np.nan if "float" in state.dtype else 10_000))
    assert (generate(backend, tiny_batch(backend)) == generate(reference, tiny_batch(reference))).all()


def test_a_stage_that_the_backend_does_not_hold_is_not_loaded(planned_bundle: Path) -> None:
    backend = OrtCudaBackend(open_bundle(planned_bundle), ["prefill"], device="cpu")
    with pytest.raises(RequestError, match="does not hold stage vq_decoder; it holds prefill"):
        backend.load("vq_decoder")


def test_products_of_float32_are_not_rounded_to_tf32() -> None:
    assert cuda_options(captured=True)["use_tf32"] == "0"


def test_integers_under_bf16_are_refused_at_once(planned_bundle: Path) -> None:
    bundle = open_bundle(planned_bundle)
    precision = msgspec.structs.replace(bundle.manifest.precision, weights="int8", activations="bf16")
    mixed = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, precision=precision))
    with pytest.raises(BundleError, match=r"bf16 with weights in int8.*--activations fp16"):
        OrtCudaBackend(mixed, STAGES, device="cpu")


def test_an_empty_state_is_written_without_a_graph(planned_bundle: Path) -> None:
    """A graph would leave out what the stage copies from the host, and it is nothing but that."""
    bundle = open_bundle(planned_bundle)
    backend = OrtCudaBackend(bundle, STAGES, device="cpu")
    backend.device = "cuda"
    captured = {stage: dict(backend._providers(stage))["CUDAExecutionProvider"] for stage in STAGES}
    assert [stage for stage in STAGES if captured[stage]["enable_cuda_graph"] == "0"] == ["prefill"]
    model = inlined(onnx.load(planned_bundle / "prefill.onnx", load_external_data=False))
    assert "position.next" in constant_outputs(model)


def test_every_policy_s_stages_have_kernels_and_no_constant_outputs(planned_bundle: Path) -> None:
    assert not cuda_faults(planned_bundle)


def model_of(*nodes: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    """A model of ``x [1, 4, 8]`` and ``y`` float32."""
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (1, 4, 8)), ("y", None))
    ]
    ones = onnx.numpy_helper.from_array(np.ones(4, np.float32), "ones")
    graph = onnx.helper.make_graph(list(nodes), "graph", values[:1], values[1:], [ones])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "version"),
    [
        ("InstanceNormalization", ["x", "ones", "ones"], {}, 22),
        ("MaxPool", ["x"], {"kernel_shape": [3]}, 22),
    ],
)
def test_a_kernel_without_a_last_version_is_taken_at_its_first_alone(
    operator: str, inputs: list[str], attributes: dict[str, list[int]], version: int
) -> None:
    """So stages are traced to the oldest operators that serve."""
    node = onnx.helper.make_node(operator, inputs, ["y"], **attributes)
    [missing] = without_kernel(model_of(node, opset=24))
    assert missing.startswith(f"{operator} {version} (float")
    assert not without_kernel(model_of(node, opset=21))


def test_a_stage_that_cannot_be_captured_says_which_operators_are_to_blame(
    planned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OrtCudaBackend(open_bundle(planned_bundle), ["line_end.rkv"], device="cpu")
    make = ort.InferenceSession

    def refuse(path: str, options: ort.SessionOptions, **arguments: object) -> ort.InferenceSession:
        """As the CUDA provider would: with a graph not at all, and without one as here, on the CPU."""
        [(_, settings), *_] = arguments["providers"]  # type: ignore[misc]
        if settings["enable_cuda_graph"] == "1":
            raise RuntimeError(
                "all compute graph nodes have not been partitioned to the CUDAExecutionProvider"
            )
        return make(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    backend.device = "cuda"
    with pytest.raises(BundleError, match=r"MaxPool \(2\).*export it again.*--no-cuda-graphs"):
        backend.load("line_end.rkv")


def test_a_run_that_fails_is_a_device_error(planned_bundle: Path) -> None:
    backend = OrtBackend(open_bundle(planned_bundle), ["decode.unfiltered"])
    backend.write("write_slots", np.full(backend.specs["write_slots"].shape, 10_000))
    backend.write("position", np.full(backend.specs["position"].shape, 3))
    with pytest.raises(DeviceError, match=r"failed in stage decode\.unfiltered"):
        backend.run("decode.unfiltered")
