"""Makes what travels to a GPU machine: cases with their references, compiled kernels, bundles without weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import msgspec
import torch
from torch import Tensor

from gpu_phases.cases import Case, Values
from gpu_phases.speeds import Fill, Speed, Variant
from linert.exporter.tensorrt.compile import kernels_of
from linert.graphs.line_attention import reference as attention_reference
from linert.graphs.line_window_attention import reference as window_reference
from linert.graphs.spatial_decay import DecayState
from linert.graphs.spatial_decay_step import reference as decay_reference
from linert.graphs.spatial_decay_window import reference as decay_window_reference
from linert.runtime.plugins.base import Launch, Operation, TensorKind
from linert.runtime.plugins.line_attention import LineAttention
from linert.runtime.plugins.line_evict import LineEvict
from linert.runtime.plugins.line_window import LineWindowAttention, LineWindowCommit
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStep
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindow
from tests.exporter.test_line_attention_kernels import TOLERANCE
from tests.exporter.test_line_attention_kernels import inputs_of as attention_inputs
from tests.exporter.test_line_evict_kernels import NAMES
from tests.exporter.test_line_evict_kernels import Case as EvictCase
from tests.exporter.test_line_evict_kernels import tensors_of as evict_inputs
from tests.exporter.test_line_window_kernels import TOLERANCE as WINDOW_TOLERANCE
from tests.exporter.test_line_window_kernels import attention_inputs as window_inputs
from tests.exporter.test_line_window_kernels import commit_inputs, commit_stage
from tests.exporter.test_spatial_decay_kernels import inputs_of as decay_inputs
from tests.exporter.test_spatial_decay_kernels import window_inputs_of as decay_window_inputs
from tests.graphs.test_line_attention import bundled

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def values(tensor: Tensor) -> Values:
    """A tensor as it travels."""
    plain = tensor.detach().contiguous()
    bits = plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain
    return Values(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), bits.numpy().tobytes())


def case(
    name: str,
    operation: Operation,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    tolerance: float,
    capabilities: Sequence[int],
) -> Case:
    """A case with kernels compiled for ``capabilities``."""
    sent, wanted = [values(tensor) for tensor in inputs], [values(tensor) for tensor in outputs]
    launch = operation.launch([one.kind for one in sent], capabilities)
    kernels = kernels_of(launch, capabilities)
    return Case.of(name, operation, launch, kernels, sent, wanted, tolerance)


def attention_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, capabilities: Sequence[int], *, keep_largest: bool
) -> Case:
    """LineAttention on ``(rows, query heads a KV head, slots, head size)``; what nobody wrote is not a number."""
    inputs = attention_inputs(*shape, dtype)
    inputs["score_max"] = torch.tensor(keep_largest)
    for name in ("k_cache", "v_cache"):
        inputs[name][:, 0][inputs["slot_pos"] < 0] = float("nan")
    clean = {name: t.float().nan_to_num() if t.dtype is dtype else t for name, t in inputs.items()}
    attended, after = attention_reference(bundled(clean))
    caches, rows = [], torch.arange(shape[0])
    for cache, new in (("k_cache", "k"), ("v_cache", "v")):
        caches.append(inputs[cache].clone())
        caches[-1][rows, 0, inputs["write_slot"]] = inputs[new][:, 0, 0]
    outputs = [attended.to(dtype), *caches, after.scores, after.slot_pos]
    name = f"LineAttention, {'x'.join(map(str, shape))}, {_name(dtype)}"
    return case(name, LineAttention(), list(inputs.values()), outputs, TOLERANCE[dtype], capabilities)


def decay_case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, capabilities: Sequence[int]
) -> Case:
    """SpatialDecayStep on ``(rows, slots, matrices, key size, value size)``; what weighs nothing is not a number."""
    inputs = decay_inputs(*shape, dtype)
    clean = DecayState(*(part.nan_to_num() for part in inputs.state))
    attended, _, _ = decay_reference(inputs._replace(state=clean))
    lines, rows = [], torch.arange(shape[0])
    for line, new in zip(inputs.state[:2], (inputs.k, inputs.v), strict=True):
        lines.append(line.clone())
        lines[-1][rows, 0, inputs.write_slot] = new[:, 0, 0]
    name = f"SpatialDecayStep, {'x'.join(map(str, shape))}, {_name(dtype)}"
    return case(name, SpatialDecayStep(), inputs.flat(), [attended, *lines], TOLERANCE[dtype], capabilities)


def window_attention_case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, capabilities: Sequence[int]
) -> Case:
    """LineWindowAttention on ``(rows, query heads a KV head, positions, slots, head size)``; what nobody sees is not a number."""
    inputs = window_inputs(*shape, dtype)
    wanted = window_reference(type(inputs)(*(part.float().nan_to_num() for part in inputs)))
    outputs = [wanted.attended.to(dtype), wanted.received, inputs.k_cache, inputs.v_cache]
    name = f"LineWindowAttention, {'x'.join(map(str, shape))}, {_name(dtype)}"
    return case(name, LineWindowAttention(), inputs, outputs, WINDOW_TOLERANCE[dtype], capabilities)


def window_commit_case(
    capacities: tuple[int, ...], width: int, dtype: torch.dtype, capabilities: Sequence[int]
) -> Case:
    """LineWindowCommit of layers of ``capacities`` slots."""
    stage = commit_stage(capacities, width, dtype)
    layers, shared = commit_inputs(stage)
    inputs = [*itertools.chain.from_iterable(layers), *shared]
    name = f"LineWindowCommit, {width} into {capacities}, {_name(dtype)}"
    return case(name, LineWindowCommit(len(capacities)), inputs, stage(*inputs), 1e-6, capabilities)


def decay_window_case(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, capabilities: Sequence[int]
) -> Case:
    """SpatialDecayWindow on ``(rows, positions, slots, matrices, key size, value size)``; what weighs nothing is not a number."""
    inputs = decay_window_inputs(*shape, dtype)
    clean = DecayState(*(part.nan_to_num() for part in inputs.state))
    attended, _, _ = decay_window_reference(inputs._replace(state=clean))
    at = tuple(inputs.place.flatten(0, 1).unbind(-1))
    lines = [
        line.index_put(at, new.flatten(0, 1))
        for line, new in zip(inputs.state[:2], (inputs.k, inputs.v), strict=True)
    ]
    name = f"SpatialDecayWindow, {'x'.join(map(str, shape))}, {_name(dtype)}"
    outputs = [attended, *lines]
    return case(name, SpatialDecayWindow(), inputs.flat(), outputs, TOLERANCE[dtype], capabilities)


def evict_case(wish: EvictCase, capabilities: Sequence[int]) -> Case:
    """LineEvict of a policy; whole numbers and zeros alone come out, so that all must be equal."""
    stage = wish.stage
    assert stage.operation is not None
    inputs = [tensor for part in evict_inputs(wish, stage) for tensor in part]
    name = f"LineEvict, {wish.policy}, budgets of {wish.budgets} lines"
    return case(name, LineEvict(**stage.operation.attributes), inputs, stage(*inputs), 0.0, capabilities)


def all_cases(capabilities: Sequence[int], *, few: bool = False) -> Iterator[Case]:
    """The cases of phase kernels: whole and in parts, one query head a KV head and several, every policy that has a kernel.

    Args:
        few: the least that has every operation in it.
    """
    for dtype in DTYPES[-1:] if few else DTYPES:
        shapes = [(2, 1, 33, 16)] if few else [(264, 1, 17, 64), (6, 1, 601, 64), (12, 4, 145, 128)]
        for number, shape in enumerate(shapes):
            yield attention_case(shape, dtype, capabilities, keep_largest=number == 1)
        for sizes in [(2, 5, 2, 8, 8)] if few else [(264, 9, 2, 32, 32), (6, 25, 5, 64, 64)]:
            yield decay_case(sizes, dtype, capabilities)
        for window in (
            [(2, 1, 3, 33, 16)] if few else [(6, 1, 8, 601, 64), (264, 1, 4, 97, 64), (8, 4, 8, 145, 128)]
        ):
            yield window_attention_case(window, dtype, capabilities)
        yield window_commit_case((9, 30) if few else (145, 601), 3 if few else 8, dtype, capabilities)
        for lines in [(2, 3, 9, 2, 8, 8)] if few else [(6, 8, 25, 24, 64, 64), (264, 4, 9, 2, 32, 32)]:
            yield decay_window_case(lines, dtype, capabilities)
    flags = (True, False, False, True)
    for policy in ("linear",) if few else NAMES:
        yield evict_case(EvictCase(policy, (3, 4), True, 2, 1, flags, 4), capabilities)
    if not few:
        # More slots than a program looks at a time, and rows that choose for themselves.
        yield evict_case(
            EvictCase("linear", (12, 20), False, 2, 1, (False, False, False, False), 5), capabilities
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


HEADS, HEAD_DIM, LAYERS = 20, 64, 36
"""Of LlamaGen-XL, and of LASADGen in its size."""

WAYS = [(warps, warps * of_warp) for warps in (1, 2, 4) for of_warp in (256, 512, 1024)]
"""Warps of a program of LineAttention, and numbers of K that it reads before it reckons."""


def all_speeds(capabilities: Sequence[int], *, few: bool = False) -> Iterator[Speed]:
    """The shapes of phase speeds: batches of 1, 64 and 256 guided images, lines of 24 tokens, 4 and 25 of them in the buffer."""
    for batch in (64, 256, 1)[: 1 if few else 3]:
        rows = 2 if few else 2 * batch * HEADS
        for slots in (33,) if few else (97, 601):
            yield attention_speed(batch, rows, slots, capabilities, few=few)
        yield decay_speed(batch, rows, capabilities, few=few)
        for slots in (33,) if few else (97, 601):
            yield evict_speed(batch, slots, capabilities, few=few)


def attention_speed(batch: int, rows: int, slots: int, capabilities: Sequence[int], *, few: bool) -> Speed:
    """LineAttention in fp16 with every slot visible: reads all keys and values."""
    cache = Fill("float16", (rows, 1, slots, HEAD_DIM))
    new = Fill("float16", (rows, 1, 1, HEAD_DIM))
    inputs = (
        *(new, new, new, cache, cache, Fill("float32", (rows, slots))),
        Fill("int32", (rows, slots), 0, slots, counted=True),
        Fill("int64", (rows,), 0, slots),
        *[Fill("int32", (rows, 1), slots, slots + 1)] * 2,
        Fill("bool", (), 0, 1),
    )
    return _speed(
        f"LineAttention, batch {batch}, {slots} slots",
        LineAttention(),
        inputs,
        WAYS[:2] if few else WAYS,
        read_bytes=2 * cache.nbytes,
        barred=batch >= 64,
        capabilities=capabilities,
    )


def decay_speed(batch: int, rows: int, capabilities: Sequence[int], *, few: bool) -> Speed:
    """SpatialDecayStep in fp16 in the middle of a row of 24 tokens: reads one matrix and the row's keys and values."""
    slots, matrices = 25, 24
    line = Fill("float16", (rows, 1, slots, HEAD_DIM))
    new = Fill("float16", (rows, 1, 1, HEAD_DIM))
    inputs = (
        *(new, new, new, line, line, Fill("float32", (rows, matrices, HEAD_DIM, HEAD_DIM))),
        *(Fill("int64", (rows,), 0, slots), Fill("int64", (rows,), 0, matrices)),
        *(Fill("float32", (rows, 1, 1, slots)), Fill("float32", (rows, 1, 1, 1))),
    )
    return _speed(
        f"SpatialDecayStep, batch {batch}",
        SpatialDecayStep(),
        inputs,
        [],
        read_bytes=rows * 4 * HEAD_DIM**2 + 2 * line.nbytes,
        barred=batch >= 64,
        capabilities=capabilities,
    )


def evict_speed(batch: int, slots: int, capabilities: Sequence[int], *, few: bool) -> Speed:
    """LineEvict of the policy linear, all layers: reads scores and positions."""
    layers, heads, width = (2, 1, 24) if few else (LAYERS, HEADS, 24)
    sequences = 2 if few else 2 * batch
    rows = sequences * heads
    operation = LineEvict(
        layers=layers,
        line_width=width,
        lines=24,
        prefix_len=1,
        kv_heads=heads,
        branches=2,
        importance=0,
        carries_scores=0,
    )
    scores = Fill("float32", (rows, slots))
    numbers = [(width, width + 1), (min(16, slots - width - 1), 17), (0, 1), (0, 1), (0, 1), (0, 1)]
    inputs = (
        Fill("int64", (layers,), slots, slots + 1),
        *(Fill("int64", (), low, max(low + 1, high)) for low, high in numbers),
        Fill("int64", (sequences,), slots, slots + 1),
        Fill("int64", (sequences,), 0, 1),
        Fill("int64", (layers, rows, width), 1, 2),
        *[scores] * layers,
        *[Fill("int32", (rows, slots), 0, slots, counted=True)] * layers,
    )
    return _speed(
        f"LineEvict, batch {batch}, {slots} slots",
        operation,
        inputs,
        [],
        read_bytes=2 * layers * scores.nbytes,
        barred=False,
        capabilities=capabilities,
    )


def _speed(
    name: str,
    operation: Operation,
    inputs: Sequence[Fill],
    ways: Sequence[tuple[int, int]],
    *,
    read_bytes: int,
    barred: bool,
    capabilities: Sequence[int],
) -> Speed:
    """The launch that a build takes, and others with so many warps and numbers at a time."""
    usual = operation.launch([TensorKind(fill.dtype, fill.shape) for fill in inputs], capabilities)
    launches: dict[str, Launch] = {_label(usual): usual}
    for warps, tile in ways:
        other = replace(usual, warps=warps, tile=tile)  # type: ignore[type-var]
        launches.setdefault(_label(other), other)
    variants = [
        Variant(label, msgspec.to_builtins(launch), kernels_of(launch, capabilities))
        for label, launch in launches.items()
    ]
    attributes = asdict(operation)  # type: ignore[call-overload]
    return Speed(
        name, operation.name, attributes, tuple(inputs), tuple(variants), read_bytes, barred, _label(usual)
    )


def _label(launch: Launch) -> str:
    told = msgspec.to_builtins(launch)
    return f"{told['warps']} warps, tile {told['tile']}" if "tile" in told else "as built"
