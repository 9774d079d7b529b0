"""What the plugins' enqueue asks of the driver, done by the interpreted kernels: arguments, scratch memory, tables."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from exporter.tensorrt import line_attention_kernels, line_evict_kernels, spatial_decay_step_kernels
from exporter.tensorrt.compile import ALIGNMENT
from graphs.line_attention import reference
from graphs.spatial_decay_step import reference as decay_reference
from runtime.cuda import Device
from runtime.plugins.base import Call, Launch, Operation, TensorKind
from runtime.plugins.kernels import CompiledKernel, DeviceKernels, LoadedKernel
from runtime.plugins.line_attention import LineAttention, LineAttentionLaunch
from runtime.plugins.line_evict import LineEvict
from runtime.plugins.spatial_decay_step import INPUTS, SpatialDecayStep, SpatialDecayStepLaunch
from tests.emulated_gpu import CAPABILITY, EmulatedDriver, Kernel
from tests.exporter.test_line_attention_kernels import inputs_of
from tests.exporter.test_line_evict_kernels import NAMES, Case, tensors_of
from tests.exporter.test_spatial_decay_step_kernels import inputs_of as decay_inputs_of
from tests.graphs.test_line_attention import bundled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")

TYPES = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool"}
TORCH_TYPES = {name: kind for kind, name in TYPES.items()}


def interpreted(function: Any, types: Mapping[str, torch.dtype], constants: Mapping[str, int]) -> Kernel:
    """A kernel as the emulated driver takes it; ``types`` of what pointers point to, other parameters are int32."""
    names = [name for name in inspect.signature(function.fn).parameters if name not in constants]

    def launch(grid: tuple[int, int, int], parameters: Sequence[int]) -> Callable[[], None]:
        values = []
        for number, name in enumerate(names):
            if name in types:
                address = ctypes.c_void_p.from_address(parameters[number]).value or 0
                # Kernels are compiled with this promise.
                assert address % ALIGNMENT == 0
                # The interpreter takes of a tensor its address and type.
                memory = (ctypes.c_char * 8).from_address(address)
                values.append(torch.frombuffer(memory, dtype=types[name], count=1))
            else:
                values.append(ctypes.c_int32.from_address(parameters[number]).value)
        return lambda: function[grid](*values, **constants)

    return launch


def enqueue(
    operation: Operation, kernels: Mapping[str, Kernel], inputs: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Launch]:
    """Run an operation as a plugin does, on a copy of ``inputs``; returns its outputs, aliased ones as they are afterwards."""
    driver = EmulatedDriver(kernels)
    device = Device(driver)
    kinds = [TensorKind(TYPES[tensor.dtype], tuple(tensor.shape)) for tensor in inputs]
    launch = operation.launch(kinds)
    addresses = [device.allocate(tensor.nbytes) for tensor in inputs]
    for address, tensor in zip(addresses, inputs, strict=True):
        device.upload(address, tensor.numpy())
    shapes = operation.output_shapes([kind.shape for kind in kinds])
    types = [kinds[0].dtype if name == "held" else name for name in operation.output_types]
    outputs = [torch.zeros(shape, dtype=TORCH_TYPES[kind]) for shape, kind in zip(shapes, types, strict=True)]
    sources = [operation.aliased_input(number) for number in range(len(outputs))]
    places = [
        addresses[source] if source >= 0 else device.allocate(output.nbytes)
        for source, output in zip(sources, outputs, strict=True)
    ]
    loaded = {
        name: LoadedKernel(CompiledKernel(name, 4, 0, 2, {}, b""), driver, CAPABILITY) for name in kernels
    }
    scratch = device.allocate(launch.scratch_bytes)
    call = Call(addresses, places, scratch, device.stream)
    operation.enqueue(launch, DeviceKernels(loaded, driver), call)
    for place, output in zip(places, outputs, strict=True):
        device.download(place, output.numpy())
    return outputs, launch


@pytest.mark.parametrize("slots", [33, 603])
@pytest.mark.parametrize("group", [1, 3])
def test_line_attention(slots: int, group: int) -> None:
    inputs = inputs_of(2, group, slots, 16, torch.float32)
    launch = LineAttentionLaunch(2, group, slots, 16, "float32")
    assert launch.split == (slots > 100)
    pointers = {name: tensor.dtype for name, tensor in inputs.items()} | dict.fromkeys(
        ("attended", "logits", "partial"), torch.float32
    )
    kernels = {
        name: interpreted(getattr(line_attention_kernels, name), pointers, launch.constants(name))
        for name in ("attend", "combine")
    }
    (attended, *state), used = enqueue(LineAttention(), kernels, list(inputs.values()))
    assert used == launch
    wanted, after = reference(bundled(inputs))
    torch.testing.assert_close(attended, wanted, atol=3e-6, rtol=0)
    for ours, theirs in zip(state, after, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("rows", [2, 300])
def test_spatial_decay_step(rows: int) -> None:
    inputs = decay_inputs_of(rows, 9, 5, 20, 36, torch.float32)
    launch = SpatialDecayStepLaunch(rows, 9, 5, 20, 36, "float32")
    assert (launch.parts > 1) == (rows == 2)
    tensors = inputs.flat()
    names = (*INPUTS, "attended")
    pointers = dict(zip(names, [tensor.dtype for tensor in (*tensors, inputs.v)], strict=True))
    kernel = interpreted(spatial_decay_step_kernels.spatial_decay_step, pointers, launch.constants)
    (attended, *line), used = enqueue(SpatialDecayStep(), {"spatial_decay_step": kernel}, tensors)
    assert used == launch
    clean = inputs._replace(state=type(inputs.state)(*(part.nan_to_num() for part in inputs.state)))
    wanted, *after = decay_reference(clean)
    torch.testing.assert_close(attended, wanted, atol=3e-6 * wanted.abs().max().item(), rtol=0)
    for ours, theirs in zip(line, after, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs)


@pytest.mark.parametrize("policy", NAMES)
def test_line_evict(policy: str) -> None:
    # More slots than a program looks at a time.
    case = Case(policy, (3, 12), True, 2, 1, (True, False, False, True), 4)
    stage = case.stage
    attributes = stage.plugin_attributes()
    assert attributes is not None
    operation = LineEvict(**attributes)
    inputs = [tensor for part in tensors_of(case, stage) for tensor in part]
    kinds = [TensorKind(TYPES[tensor.dtype], tuple(tensor.shape)) for tensor in inputs]
    names = ("table", *(spec.name for spec in stage.inputs[:8]), "write_slots")
    pointers = dict.fromkeys(names, torch.int64) | {"keys": torch.float32, "ranks": torch.int32}
    kernel = interpreted(line_evict_kernels.line_evict, pointers, operation.launch(kinds).constants)
    found, _ = enqueue(operation, {"line_evict": kernel}, inputs)
    for spec, ours, theirs in zip(stage.outputs, found, stage(*inputs), strict=True):
        assert torch.equal(ours, theirs), spec.name


def test_a_table_is_not_written_again_where_a_captured_graph_may_read_it() -> None:
    driver = EmulatedDriver()
    device = Device(driver)
    kernels = DeviceKernels({}, driver)
    target = device.allocate(16)
    found = torch.zeros(2, dtype=torch.int64)
    kernels.table([1, 2], target, device.stream)
    device.synchronize()
    with device.capturing() as captured:
        kernels.table([1, 2], target, device.stream)
    kernels.table([3, 4], target, device.stream)
    device.download(target, found.numpy())
    assert found.tolist() == [3, 4]
    captured[0].launch(device.stream)
    device.download(target, found.numpy())
    assert found.tolist() == [1, 2]
