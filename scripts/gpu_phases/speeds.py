"""Phase speeds: each operation at LlamaGen-XL's and LASADGen-XL's shapes, with a few ways to launch it, against copy bandwidth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gpu_phases.cases import read_carried
from gpu_phases.outcome import Check, NotRunError, Outcome, Recorder
from gpu_phases.place import Place
from linert.runtime.backends.cuda import Device
from linert.runtime.plugins import OPERATIONS
from linert.runtime.plugins.base import Call, Launch, Operation, TensorKind
from linert.runtime.plugins.kernels import DeviceKernels, KernelSet, LoadedKernel
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from linert.runtime.plugins.tuning import Tuning, write_tunings

FILE = "speeds.msgpack.z"
TABLE = "tuning.json"

SHARE_OF_COPY = 0.70
"""Of the measured copy bandwidth that the kernels of a step have to reach at batch 64 and above."""

SHARE_OF_STANDARD = 0.5
"""Of the time of the same in PyTorch's operators that LineAttention may take."""

BEYOND_CACHE = 256 << 20
"""Bytes that are gone through before any is read again: several times what a GPU's cache holds."""

LAUNCHES, REPLAYS = 24, 7
PATTERN = 16 << 20
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


class Fill(msgspec.Struct, frozen=True):
    """An input that is made on the spot: whole numbers from ``low`` up to ``high`` (a count along the last axis where ``counted``),
    or normal numbers where both are 0."""

    dtype: str
    shape: tuple[int, ...]
    low: int = 0
    high: int = 0
    counted: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Variant(msgspec.Struct, frozen=True):
    """One way to launch: what differs in words, the launch, and its kernels."""

    label: str
    launch: dict[str, Any]
    kernels: KernelSet


class Speed(msgspec.Struct, frozen=True):
    """An operation on one shape.

    ``read_bytes``: what it has to read from memory. ``barred``: whether :data:`SHARE_OF_COPY` is asked of it. ``chosen``: the
    variant that a build takes today.
    """

    name: str
    operation: str
    attributes: dict[str, int]
    inputs: tuple[Fill, ...]
    variants: tuple[Variant, ...]
    read_bytes: int
    barred: bool
    chosen: str

    @property
    def kinds(self) -> list[TensorKind]:
        return [TensorKind(fill.dtype, fill.shape) for fill in self.inputs]


def checks(place: Place, recorder: Recorder) -> Iterator[tuple[str, Check]]:
    """Every shape, then the table of what was best."""
    speeds = read_carried(place.prepared(FILE), Speed)
    times: dict[str, dict[Layout, float]] = {}
    bandwidth = cache(lambda: place.device.copy_bandwidth(1 << (20 if place.rehearsal else 28)))
    for speed in speeds:
        yield speed.name, lambda speed=speed: measured(place, speed, bandwidth(), times)
    yield "the best layout", lambda: write_table(place.out / TABLE, place.device.capability, times)
    for batch, slots in ((64, 97), (64, 601)):
        yield (
            f"LineAttention against PyTorch's operators, batch {batch}, {slots} slots",
            lambda batch=batch, slots=slots: against_standard(place, batch, slots),
        )


class Layout(NamedTuple):
    """How programs of LineAttention are laid out on a head size and a type; see :mod:`linert.runtime.plugins.tuning`."""

    head_pad: int
    dtype: str
    warps: int
    tile: int


def measured(
    place: Place, speed: Speed, bandwidth: float, layouts: dict[str, dict[Layout, float]]
) -> Outcome:
    """Microseconds of each variant, over buffers that are larger than any cache; those of LineAttention on many rows go into ``layouts``."""
    device = place.device
    kind = OPERATIONS[speed.operation]
    operation = kind(**speed.attributes)
    sets = min(LAUNCHES, -(-BEYOND_CACHE // sum(fill.nbytes for fill in speed.inputs)))
    buffers = [_Buffers(device, operation, speed) for _ in range(1 if place.rehearsal else sets)]
    times = {}
    try:
        for variant in speed.variants:
            launch = msgspec.convert(variant.launch, kind.launch_type)
            place.announce(operation, launch, speed.kinds)
            times[variant.label] = microseconds(
                device,
                operation,
                launch,
                variant.kernels,
                buffers,
                launches=2 if place.rehearsal else LAUNCHES,
            )
    finally:
        for some in buffers:
            some.free()
    label = min(times, key=lambda name: times[name])
    launches = [msgspec.convert(variant.launch, kind.launch_type) for variant in speed.variants]
    if speed.barred:
        # Where a launch alone takes longer than the work, layouts do not matter.
        layouts[speed.name] = {
            Layout(launch.head_pad, launch.dtype, launch.warps, launch.tile): times[variant.label]
            for launch, variant in zip(launches, speed.variants, strict=True)
            if isinstance(launch, LineAttentionLaunch)
        }
    share = {name: speed.read_bytes / (us * 1e-6) / bandwidth for name, us in times.items()}
    failed = speed.barred and share[speed.chosen] < SHARE_OF_COPY and not place.rehearsal
    text = (
        f"{times[speed.chosen]:.1f} us, {share[speed.chosen]:.0%} of a copy ({speed.chosen}); best {times[label]:.1f} us, "
        f"{share[label]:.0%} ({label})"
    )
    figures = {"us": times, "share_of_copy": share, "bytes": speed.read_bytes, "sets": len(buffers)}
    status = "failed" if failed else "passed" if speed.barred else "measured"
    return Outcome("", status, text, figures)


class _Buffers:
    """Memory for one call of an operation, filled."""

    def __init__(self, device: Device, operation: Operation, speed: Speed) -> None:
        self.device = device
        self.inputs = [_filled(device, fill, seed) for seed, fill in enumerate(speed.inputs)]
        shapes = operation.output_shapes([fill.shape for fill in speed.inputs])
        self.outputs, self.own = [], []
        for number, shape in enumerate(shapes):
            source = operation.aliased_input(number)
            if source >= 0:
                self.outputs.append(self.inputs[source])
            else:
                self.own.append(device.allocate(8 * math.prod(shape)))
                self.outputs.append(self.own[-1])

    def free(self) -> None:
        for address in (*self.inputs, *self.own):
            self.device.free(address)


def _filled(device: Device, fill: Fill, seed: int) -> int:
    """Memory with what ``fill`` says; large ones repeat a pattern."""
    generator = np.random.default_rng(seed)
    address = device.allocate(fill.nbytes)
    item = ITEM_BYTES[fill.dtype]
    count = min(math.prod(fill.shape), PATTERN // item)
    last = fill.shape[-1] if fill.shape else 1
    if fill.counted:
        values = np.broadcast_to(np.arange(fill.low, fill.low + last), fill.shape).reshape(-1)
        count = len(values)
    elif fill.high:
        values = generator.integers(fill.low, fill.high, count)
    else:
        values = generator.standard_normal(count, np.float32)
    if fill.dtype == "bfloat16":
        array = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        array = values.astype(fill.dtype)
    device.upload(address, array)
    done, size = array.nbytes, fill.nbytes
    while done < size:
        device.copy(address + done, address, min(done, size - done))
        done += min(done, size - done)
    device.synchronize()
    return address


def microseconds(
    device: Device,
    operation: Operation,
    launch: Launch,
    kernels: KernelSet,
    buffers: Sequence[_Buffers],
    *,
    launches: int,
) -> float:
    """Of one call: the median of graphs that hold ``launches`` of them, going through ``buffers`` in turn."""
    capability = device.capability
    loaded = {
        name: LoadedKernel(kernel, device.driver, capability) for name, kernel in kernels.kernels.items()
    }
    ready = DeviceKernels(loaded, device.driver)
    scratch = device.allocate(launch.scratch_bytes)

    def enqueue() -> None:
        for number in range(launches):
            some = buffers[number % len(buffers)]
            operation.enqueue(launch, ready, Call(some.inputs, some.outputs, scratch, device.stream))

    try:
        enqueue()
        with device.capturing() as captured:
            enqueue()
        [graph] = captured
        times = [device.milliseconds(lambda: graph.launch(device.stream)) for _ in range(REPLAYS)]
        graph.close()
    finally:
        device.free(scratch)
    return float(np.median(times[1:])) * 1e3 / launches


def write_table(path: Path, capability: int, times: Mapping[str, Mapping[Layout, float]]) -> Outcome:
    """Write the layout that is best over all shapes, for each head size and type, as the build's table has them.

    Of a layout counts the mean over shapes of how much longer than each shape's best it takes (geometric, so that no shape
    counts for more); shapes that a layout was not measured on leave it out.
    """
    shapes = [layouts for layouts in times.values() if layouts]
    if not shapes:
        raise NotRunError("nothing was measured")
    everywhere = set.intersection(*(set(layouts) for layouts in shapes))
    over_best = {
        layout: math.prod(layouts[layout] / min(layouts.values()) for layouts in shapes) ** (1 / len(shapes))
        for layout in everywhere
    }
    chosen: dict[tuple[int, str], Layout] = {}
    for layout in sorted(over_best, key=lambda layout: over_best[layout]):
        chosen.setdefault((layout.head_pad, layout.dtype), layout)
    write_tunings([Tuning(capability, *layout) for layout in chosen.values()], path)
    text = "; ".join(
        f"heads of {one.head_pad} in {one.dtype}: {one.warps} warps, tile {one.tile}, {over_best[one]:.2f} x each shape's best"
        for one in chosen.values()
    )
    return Outcome("", "measured", f"{text}: {path}, to be put in the place of runtime/plugins/{TABLE}")


def against_standard(place: Place, batch: int, slots: int) -> Outcome:
    """LineAttention compiled on the spot, beside the same in PyTorch's operators."""
    if place.rehearsal:
        raise NotRunError("PyTorch's operators are timed on a GPU alone")
    try:
        import torch
        from triton.testing import do_bench_cudagraph
    except ImportError as error:
        raise NotRunError(f"{error.name} is not installed") from error
    if not torch.cuda.is_available():
        raise NotRunError(f"PyTorch {torch.__version__} sees no CUDA device")
    from linert.exporter.tensorrt.launch import line_attention
    from linert.graphs.line_attention import accumulate
    from tests.exporter.test_line_attention_kernels import inputs_of
    from tests.graphs.test_line_attention import bundled

    rows, head = 2 * batch * 20, 64
    made = {name: t.cuda() for name, t in inputs_of(rows, 1, slots, head, torch.float16).items()}
    inputs = bundled(made)
    state, every = inputs.state, torch.arange(rows, device="cuda")

    def standard() -> torch.Tensor:
        state.k_cache[every, 0, inputs.write_slot] = inputs.k[:, 0, 0]
        state.v_cache[every, 0, inputs.write_slot] = inputs.v[:, 0, 0]
        state.slot_pos[every, inputs.write_slot] = inputs.position[:, 0]
        logits = (inputs.q @ state.k_cache.mT).float()
        probs = logits.masked_fill((state.slot_pos < 0)[:, None, None], float("-inf")).softmax(-1)
        state.scores.copy_(accumulate(state.scores, probs.mean((1, 2)), state.slot_pos, inputs.accounting))
        return probs.half() @ state.v_cache

    fused = do_bench_cudagraph(lambda: line_attention(inputs), return_mode="median")
    plain = do_bench_cudagraph(standard, return_mode="median")
    ratio = fused / plain
    text = f"{fused * 1e3:.1f} us, {ratio:.2f} x PyTorch's operators"
    return Outcome(
        "", "passed" if ratio <= SHARE_OF_STANDARD else "failed", text, {"ms": fused, "standard_ms": plain}
    )
