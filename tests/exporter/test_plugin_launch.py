"""What the plugins' enqueue asks of the driver, done by the interpreted kernels: arguments, scratch memory, tables.

Kernels may touch what they were given and nothing else, whatever that holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from linert.graphs.line_attention import reference
from linert.graphs.line_window_attention import reference as window_reference
from linert.graphs.spatial_decay_step import reference as decay_reference
from linert.graphs.spatial_decay_window import reference as decay_window_reference
from linert.runtime.backends.cuda import Device
from linert.runtime.plugins.base import Call, Launch, Operation, TensorKind
from linert.runtime.plugins.contracts import FLOAT_TYPE
from linert.runtime.plugins.kernels import CompiledKernel, DeviceKernels, LoadedKernel
from linert.runtime.plugins.line_attention import LineAttention, LineAttentionLaunch
from linert.runtime.plugins.line_evict import LineEvict
from linert.runtime.plugins.line_window import LineWindowAttention, LineWindowCommit
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStep, SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindow
from tests.emulated_gpu import CAPABILITY, EmulatedDriver
from tests.exporter.test_line_attention_kernels import inputs_of
from tests.exporter.test_line_evict_kernels import NAMES, Case, tensors_of
from tests.exporter.test_line_window_kernels import attention_inputs, commit_inputs, commit_stage
from tests.exporter.test_spatial_decay_kernels import inputs_of as decay_inputs_of
from tests.exporter.test_spatial_decay_kernels import window_inputs_of
from tests.exporter.watched_memory import watched
from tests.graphs.test_line_attention import bundled
from tests.interpreted_kernels import interpreted_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")

TYPES = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool"}
TORCH_TYPES = {name: kind for kind, name in TYPES.items()}
BEYOND = (-1, -(2**31), -(2**63), 9, 10, 1000, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
"""Numbers that no slot, matrix or position has; in less than 64 bits what is left of them."""


def enqueue(operation: Operation, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Launch]:
    """Run an operation as a plugin does, on a copy of ``inputs``; returns its outputs, aliased ones as they are afterwards.

    Raises:
        AssertionError: a kernel touches what it was not given.
    """
    kinds = [TensorKind(TYPES[tensor.dtype], tuple(tensor.shape)) for tensor in inputs]
    launch = operation.launch(kinds)
    kernels = interpreted_kernels(operation, launch, kinds)
    driver = EmulatedDriver(kernels)
    device = Device(driver)
    addresses = [device.allocate(tensor.nbytes) for tensor in inputs]
    for address, tensor in zip(addresses, inputs, strict=True):
        device.upload(address, tensor.numpy())
    shapes = operation.output_shapes([kind.shape for kind in kinds])
    types = [kinds[0].dtype if name == FLOAT_TYPE else name for name in operation.output_types]
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
    with watched() as memory:
        for address, tensor in (*zip(addresses, inputs, strict=True), *zip(places, outputs, strict=True)):
            memory.allow(address, tensor.nbytes)
        memory.allow(scratch, launch.scratch_bytes)
        operation.enqueue(launch, DeviceKernels(loaded, driver), call)
        device.synchronize()
    for place, output in zip(places, outputs, strict=True):
        device.download(place, output.numpy())
    return outputs, launch


LOUD = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")
"""Of a kernel that reckons with anything NumPy says that it overflows."""


def garbage_like(tensors: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Tensors of the same types and shapes that hold any bits, and in places numbers that lie beyond everything."""
    generator = torch.Generator().manual_seed(seed)
    return [_garbage(tensor, generator) for tensor in tensors]


def _garbage(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(256, (max(1, like.nbytes),), generator=generator, dtype=torch.uint8)
    numbers = bits.view(like.dtype).reshape(like.shape)
    if like.dtype is torch.bool:
        return bits.view(torch.int8).ne(0).reshape(like.shape)
    whole = like.dtype in (torch.int32, torch.int64)
    some = torch.tensor(BEYOND if whole else (float("nan"), float("inf"), -float("inf"), -0.0))
    drawn = some[torch.randint(len(some), like.shape, generator=generator)].to(like.dtype)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.5, drawn, numbers)


@pytest.mark.parametrize("slots", [33, 603])
@pytest.mark.parametrize("group", [1, 3])
def test_line_attention(slots: int, group: int) -> None:
    inputs = inputs_of(2, group, slots, 16, torch.float32)
    launch = LineAttentionLaunch.tuned(2, group, slots, 16, "float32")
    assert launch.split == (slots > 100)
    (attended, *state), used = enqueue(LineAttention(), list(inputs.values()))
    assert used == launch
    wanted, after = reference(bundled(inputs))
    torch.testing.assert_close(attended, wanted, atol=3e-6, rtol=0)
    for ours, theirs in zip(state, after, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@LOUD
@pytest.mark.parametrize("slots", [9, 200])
def test_line_attention_on_memory_that_holds_anything(slots: int) -> None:
    like = inputs_of(2, 1, slots, 8, torch.float32)
    for seed in range(20):
        enqueue(LineAttention(), garbage_like(list(like.values()), seed))


@pytest.mark.parametrize("write_slot", BEYOND)
def test_a_token_for_no_slot_is_attended_to_by_nobody(write_slot: int) -> None:
    inputs = inputs_of(2, 1, 9, 8, torch.float32)
    inputs["write_slot"] = torch.tensor([write_slot, 4])
    (attended, *state), _ = enqueue(LineAttention(), list(inputs.values()))
    # The reference has no such slot: an empty one takes its place, and is left as it was.
    more = inputs | {"write_slot": torch.tensor([9, 4])}
    for name in ("k_cache", "v_cache"):
        more[name] = torch.cat([inputs[name], torch.zeros(2, 1, 1, 8)], 2)
    more["scores"] = torch.cat([inputs["scores"], torch.zeros(2, 1)], 1)
    more["slot_pos"] = torch.cat([inputs["slot_pos"], torch.full((2, 1), -1, dtype=torch.int32)], 1)
    more["position"] = torch.tensor([[-1], [16]], dtype=torch.int32)
    wanted, after = reference(bundled(more))
    torch.testing.assert_close(attended, wanted, atol=3e-6, rtol=0)
    for ours, theirs, slots in zip(state, after, (2, 2, 1, 1), strict=True):
        torch.testing.assert_close(ours, theirs.narrow(slots, 0, 9), atol=3e-6, rtol=0)


@pytest.mark.parametrize("rows", [2, 300])
def test_spatial_decay_step(rows: int) -> None:
    inputs = decay_inputs_of(rows, 9, 5, 20, 36, torch.float32)
    launch = SpatialDecayStepLaunch(rows, 9, 5, 20, 36, "float32")
    assert (launch.parts > 1) == (rows == 2)
    tensors = inputs.flat()
    (attended, *line), used = enqueue(SpatialDecayStep(), tensors)
    assert used == launch
    clean = inputs._replace(state=type(inputs.state)(*(part.nan_to_num() for part in inputs.state)))
    wanted, *after = decay_reference(clean)
    torch.testing.assert_close(attended, wanted, atol=3e-6 * wanted.abs().max().item(), rtol=0)
    for ours, theirs in zip(line, after, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs)


@LOUD
def test_a_spatial_decay_step_on_memory_that_holds_anything() -> None:
    like = decay_inputs_of(2, 9, 5, 20, 36, torch.float32).flat()
    for seed in range(20):
        enqueue(SpatialDecayStep(), garbage_like(like, seed))


@pytest.mark.parametrize("beyond", BEYOND)
def test_a_spatial_decay_step_of_no_slot_and_no_matrix(beyond: int) -> None:
    inputs = decay_inputs_of(2, 9, 5, 20, 36, torch.float32)
    inputs = inputs._replace(state=type(inputs.state)(*(part.nan_to_num() for part in inputs.state)))
    slot, matrix = (
        torch.stack([torch.tensor(beyond), indices[1]]) for indices in (inputs.write_slot, inputs.matrix)
    )
    (attended, *line), _ = enqueue(SpatialDecayStep(), inputs._replace(write_slot=slot, matrix=matrix).flat())
    # A row that writes nothing is one that writes what is there; one that reads no matrix, one that gives it no weight.
    there = [part[0, :, :1] for part in inputs.state[:2]]
    k, v = (torch.stack([old, new[1]]) for old, new in zip(there, (inputs.k, inputs.v), strict=True))
    share = inputs.above_weighed * torch.tensor([0.0, 1.0])[:, None, None, None]
    first = torch.stack([torch.tensor(0), inputs.write_slot[1]])
    wanted, *after = decay_reference(inputs._replace(k=k, v=v, write_slot=first, above_weighed=share))
    torch.testing.assert_close(attended, wanted, atol=3e-6 * wanted.abs().max().item(), rtol=0)
    for ours, theirs in zip(line, after, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("slots", [9, 200])
def test_line_window_attention(slots: int) -> None:
    inputs = attention_inputs(2, 2, 3, slots, 16, torch.float32)
    (attended, received, *caches), _ = enqueue(LineWindowAttention(), inputs)
    wanted = window_reference(type(inputs)(*(part.nan_to_num() for part in inputs)))
    torch.testing.assert_close(attended, wanted.attended, atol=3e-6, rtol=0)
    torch.testing.assert_close(received, wanted.received, atol=2e-6, rtol=0)
    for ours, theirs in zip(caches, (inputs.k_cache, inputs.v_cache), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@LOUD
@pytest.mark.parametrize("slots", [9, 200])
def test_line_window_attention_on_memory_that_holds_anything(slots: int) -> None:
    like = attention_inputs(2, 2, 3, slots, 8, torch.float32)
    for seed in range(10):
        enqueue(LineWindowAttention(), garbage_like(like, seed))


@pytest.mark.parametrize("score_max", [False, True])
def test_line_window_commit(score_max: bool) -> None:
    stage = commit_stage((9, 300), 4, torch.float32)
    layers, shared = commit_inputs(stage, score_max=score_max)
    inputs = [*itertools.chain.from_iterable(layers), *shared]
    results, _ = enqueue(LineWindowCommit(2), inputs)
    for spec, ours, theirs in zip(stage.outputs, results, stage(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=spec.name)


@LOUD
def test_a_commit_on_memory_that_holds_anything() -> None:
    layers, shared = commit_inputs(commit_stage((9, 30), 4, torch.float32))
    for seed in range(10):
        enqueue(LineWindowCommit(2), garbage_like([*itertools.chain.from_iterable(layers), *shared], seed))


@pytest.mark.parametrize("beyond", BEYOND)
def test_what_is_committed_to_no_slot_is_not_written(beyond: int) -> None:
    stage = commit_stage((9,), 2, torch.float32)
    layers, shared = commit_inputs(stage)
    slots = shared.write_slots.clone()
    slots[:, 0] = beyond
    ours, _ = enqueue(LineWindowCommit(1), [*layers[0], *shared._replace(write_slots=slots)])
    wanted = stage(*layers[0], *shared)
    for before, after, theirs in zip(layers[0][3:], ours, wanted, strict=True):
        assert torch.equal(after[1:], theirs[1:])
        kept = before[0] if before.dtype is not torch.float32 or before.dim() > 2 else None
        assert kept is None or torch.equal(after[0], kept)


@pytest.mark.parametrize("rows", [2, 20])
def test_spatial_decay_window(rows: int) -> None:
    inputs = window_inputs_of(rows, 3, 9, 5, 20, 36, torch.float32)
    (attended, *line), _ = enqueue(SpatialDecayWindow(), inputs.flat())
    clean = inputs._replace(state=type(inputs.state)(*(part.nan_to_num() for part in inputs.state)))
    wanted, *after = decay_window_reference(clean)
    torch.testing.assert_close(attended, wanted, atol=3e-6 * wanted.abs().max().item(), rtol=0)
    for ours, theirs in zip(line, after, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs)


@LOUD
def test_a_spatial_decay_window_on_memory_that_holds_anything() -> None:
    like = window_inputs_of(2, 3, 9, 5, 20, 36, torch.float32).flat()
    for seed in range(10):
        enqueue(SpatialDecayWindow(), garbage_like(like, seed))


@LOUD
@pytest.mark.parametrize("valid_settings", [False, True])
@pytest.mark.parametrize("policy", NAMES)
def test_a_line_end_on_memory_that_holds_anything(policy: str, valid_settings: bool) -> None:
    case = Case(policy, (3, 4), False, 2, 1, (True, False, False, False), 4, heads=1)
    stage = case.stage
    assert stage.operation is not None
    operation = LineEvict(**stage.operation.attributes)
    like = [tensor for part in tensors_of(case, stage) for tensor in part]
    for seed in range(4):
        garbage = garbage_like(like, seed)
        # Of all images, a line is due.
        garbage[7:9] = like[7:9]
        if valid_settings:
            garbage[:7] = like[:7]
        (write_slots, *_), _ = enqueue(operation, garbage)
        for layer, slots in zip(write_slots, stage.geometry.capacities, strict=True):
            for row in layer.tolist():
                assert len(set(row)) == len(row)
                assert all(0 <= slot < slots for slot in row)


@pytest.mark.parametrize("policy", NAMES)
def test_line_evict(policy: str) -> None:
    # More slots than a program looks at a time.
    case = Case(policy, (3, 12), True, 2, 1, (True, False, False, True), 4)
    stage = case.stage
    assert stage.operation is not None
    operation = LineEvict(**stage.operation.attributes)
    inputs = [tensor for part in tensors_of(case, stage) for tensor in part]
    results, _ = enqueue(operation, inputs)
    for spec, ours, theirs in zip(stage.outputs, results, stage(*inputs), strict=True):
        assert torch.equal(ours, theirs), spec.name


def test_a_table_is_not_written_again_where_a_captured_graph_may_read_it() -> None:
    driver = EmulatedDriver()
    device = Device(driver)
    kernels = DeviceKernels({}, driver)
    target = device.allocate(16)
    numbers = torch.zeros(2, dtype=torch.int64)
    kernels.table([1, 2], target, device.stream)
    device.synchronize()
    with device.capturing() as captured:
        kernels.table([1, 2], target, device.stream)
    kernels.table([3, 4], target, device.stream)
    device.download(target, numbers.numpy())
    assert numbers.tolist() == [3, 4]
    captured[0].launch(device.stream)
    device.download(target, numbers.numpy())
    assert numbers.tolist() == [1, 2]
