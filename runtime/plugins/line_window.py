"""LineWindowAttention and LineWindowCommit as plugins: how their kernels are launched on a shape.

The operations' tensors are those of :data:`linert.runtime.plugins.contracts.LINE_WINDOW_ATTENTION`,
:data:`~linert.runtime.plugins.contracts.LINE_WINDOW_COMMIT_LAYER` and
:data:`~linert.runtime.plugins.contracts.LINE_WINDOW_COMMIT_SHARED`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from linert.runtime.plugins.base import (
    Call,
    Launch,
    Operation,
    StepOperation,
    TensorKind,
    aligned,
    dtype_faults,
    power_of_two,
    refuse,
)
from linert.runtime.plugins.contracts import (
    FLOAT_TYPES,
    LINE_ATTENTION,
    LINE_WINDOW_ATTENTION,
    LINE_WINDOW_COMMIT,
    LINE_WINDOW_COMMIT_LAYER,
    LINE_WINDOW_COMMIT_REPLACED,
    LINE_WINDOW_COMMIT_SHARED,
    Contract,
)
from linert.runtime.plugins.kernels import DeviceKernels

MAX_SLOTS = 8192
MAX_HEAD = 256
MAX_QUERIES = 64
"""Positions times query heads that a program holds."""

LEAST_SIDE = 16
"""Of the matrices that tensor cores multiply."""

TILE_BYTES = 4096
"""Of keys that a program reckons with at a time: more of them do not fit into registers."""

SUMS_BYTES = 1024
"""Of the queries, and so of the sums of values in float32, that a warp holds."""

LEAST_WARPS, MOST_WARPS = 8, 16

PROGRAMS = 264
"""Programs that fill a large GPU: two a multiprocessor. Entries of fewer rows are shared by programs."""

LEAST_PART = 64
"""Entries below which a part is not worth a program."""

MAX_SCORED = 256
"""Entries that a program of the second kernel, or of the commit, accounts for."""

WARPS = 4
"""Of programs that multiply no matrices."""


@dataclass(frozen=True)
class LineWindowAttentionLaunch:
    """Launch parameters of one shape.

    Raises:
        ValueError: the kernels cannot do the shape; the message says which side of it, and what they can.
    """

    rows: int
    group: int
    width: int
    slots: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        faults = _shape_faults(self.rows, self.slots, self.head_dim, self.dtype)
        if not 1 <= self.queries <= MAX_QUERIES:
            faults.append(
                f"windows of {self.width} positions with {self.group} query heads a KV head; can be {MAX_QUERIES} queries in all"
            )
        refuse(LINE_WINDOW_ATTENTION.name, faults)

    @property
    def queries(self) -> int:
        return self.group * self.width

    @property
    def queries_pad(self) -> int:
        return max(LEAST_SIDE, power_of_two(self.queries))

    @property
    def head_pad(self) -> int:
        return max(LEAST_SIDE, power_of_two(self.head_dim))

    @property
    def entries(self) -> int:
        """Slots, and the positions of the window behind them."""
        return self.slots + self.width

    @property
    def block(self) -> int:
        """Entries that are reckoned at a time."""
        return max(LEAST_SIDE, TILE_BYTES // (FLOAT_TYPES[self.dtype] * self.head_pad))

    def warps(self, kernel: str) -> int:
        """Of a program of ``kernel``."""
        if kernel != "attend_window":
            return WARPS
        wanted = FLOAT_TYPES[self.dtype] * self.queries_pad * self.head_pad // SUMS_BYTES
        return min(MOST_WARPS, max(LEAST_WARPS, wanted))

    @property
    def part_entries(self) -> int:
        """Entries of a part; a multiple of the block."""
        wanted = max(1, min(-(-PROGRAMS // self.rows), -(-self.entries // LEAST_PART)))
        return -(-self.entries // (wanted * self.block)) * self.block

    @property
    def parts(self) -> int:
        return -(-self.entries // self.part_entries)

    @property
    def scored(self) -> int:
        """Entries that a program of the second kernel accounts for."""
        width = power_of_two(self.width)
        return min(max(LEAST_SIDE, MAX_SCORED * 8 // width), MAX_SCORED, power_of_two(self.entries))

    @property
    def logits_floats(self) -> int:
        """Float32 scratch of the logits, with what aligns the scratch behind it."""
        return aligned(self.rows * self.queries * self.entries)

    @property
    def partial_floats(self) -> int:
        """Float32 scratch of the parts' results."""
        return self.rows * self.parts * self.queries_pad * (self.head_pad + 2)

    @property
    def scratch_bytes(self) -> int:
        return 4 * (self.logits_floats + self.partial_floats)

    @property
    def attend_grid(self) -> tuple[int, int, int]:
        return self.rows, self.parts, 1

    @property
    def combine_grid(self) -> tuple[int, int, int]:
        return self.rows, -(-self.entries // self.scored), 1

    def constants(self, kernel: str) -> dict[str, int]:
        """Compile-time parameters of ``kernel`` (``attend_window`` or ``combine_window``)."""
        shape = {"G": self.group, "T": self.width, "Q_PAD": self.queries_pad}
        shape |= {"D": self.head_dim, "D_PAD": self.head_pad}
        if kernel == "attend_window":
            return shape | {"BLOCK": self.block, "WIDENED": 0}
        return shape | {"T_PAD": power_of_two(self.width), "SCORED": self.scored}


def _shape_faults(rows: int, slots: int, head_dim: int, dtype: str) -> list[str]:
    faults = dtype_faults(dtype)
    if not 1 <= slots <= MAX_SLOTS:
        faults.append(f"{slots} slots; can be 1 to {MAX_SLOTS}")
    if not 1 <= head_dim <= MAX_HEAD:
        faults.append(f"heads of {head_dim}; can be 1 to {MAX_HEAD}")
    if rows < 1:
        faults.append(f"{rows} rows; must be at least 1")
    return faults


@dataclass(frozen=True)
class LineWindowAttention(StepOperation):
    """The operation of :data:`linert.runtime.plugins.contracts.LINE_WINDOW_ATTENTION`."""

    name: ClassVar[str] = LINE_WINDOW_ATTENTION.name
    launch_type: ClassVar[type[Launch]] = LineWindowAttentionLaunch
    contract: ClassVar[Contract] = LINE_WINDOW_ATTENTION

    def launch(
        self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()
    ) -> LineWindowAttentionLaunch:
        sizes = self.contract.sizes([kind.shape for kind in inputs])
        return LineWindowAttentionLaunch(
            sizes["R"], sizes["G"], sizes["T"], sizes["C"], sizes["D"], inputs[0].dtype
        )

    def enqueue(self, launch: LineWindowAttentionLaunch, kernels: DeviceKernels, call: Call) -> None:
        scratch = (
            ctypes.c_void_p(call.scratch),
            ctypes.c_void_p(call.scratch + 4 * launch.logits_floats),
        )
        inputs, outputs = (
            [ctypes.c_void_p(address) for address in addresses]
            for addresses in (call.inputs, call.outputs[: len(self.contract.results)])
        )
        slots = ctypes.c_int32(launch.slots)
        of_part, parts = ctypes.c_int32(launch.part_entries), ctypes.c_int32(launch.parts)
        kernels["attend_window"](launch.attend_grid, call.stream, *inputs, *scratch, slots, of_part)
        kernels["combine_window"](launch.combine_grid, call.stream, *outputs, *scratch, slots, parts)


@dataclass(frozen=True)
class LineWindowCommitLaunch:
    """Launch parameters of one model: ``slots`` of each layer.

    Raises:
        ValueError: the kernel cannot do that; the message says what it can.
    """

    slots: tuple[int, ...]
    rows: int
    width: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        faults = [
            fault
            for slots in sorted(set(self.slots))
            for fault in _shape_faults(self.rows, slots, self.head_dim, self.dtype)
        ]
        if not 1 <= self.width <= MAX_QUERIES:
            faults.append(f"windows of {self.width} positions; can be 1 to {MAX_QUERIES}")
        refuse(LINE_WINDOW_COMMIT, faults)

    @property
    def scored(self) -> int:
        """Slots that a program accounts for."""
        return min(MAX_SCORED, power_of_two(max(self.slots)))

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Of each layer."""
        return [(self.rows, -(-slots // self.scored), 1) for slots in self.slots]

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time parameters of the kernel."""
        head_pad = power_of_two(self.head_dim)
        return {"T": self.width, "D": self.head_dim, "D_PAD": head_pad, "SCORED": self.scored}


@dataclass(frozen=True)
class LineWindowCommit(Operation):
    """The operation of :data:`linert.runtime.plugins.contracts.LINE_WINDOW_COMMIT`, one launch a layer."""

    layers: int

    name: ClassVar[str] = LINE_WINDOW_COMMIT
    launch_type: ClassVar[type[Launch]] = LineWindowCommitLaunch

    @property
    def input_types(self) -> tuple[str, ...]:
        layer = tuple(operand.dtype for operand in LINE_WINDOW_COMMIT_LAYER.values())
        return (*layer * self.layers, *(operand.dtype for operand in LINE_WINDOW_COMMIT_SHARED.values()))

    @property
    def output_types(self) -> tuple[str, ...]:
        return tuple(LINE_WINDOW_COMMIT_LAYER[name].dtype for name in LINE_ATTENTION.replaced) * self.layers

    def output_shapes(self, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(inputs[self._before(number)]) for number in range(len(self.output_types))]

    def aliased_input(self, output: int) -> int:
        kind = LINE_ATTENTION.replaced[output % len(LINE_ATTENTION.replaced)]
        return self._before(output) if kind in LINE_WINDOW_COMMIT_REPLACED else -1

    def _before(self, output: int) -> int:
        """The input that an output replaces."""
        layer, kind = divmod(output, len(LINE_ATTENTION.replaced))
        names = list(LINE_WINDOW_COMMIT_LAYER)
        return layer * len(names) + names.index(LINE_ATTENTION.replaced[kind])

    def launch(
        self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()
    ) -> LineWindowCommitLaunch:
        rows, _, width, head_dim = inputs[0].shape
        caches = [inputs[self._before(len(LINE_ATTENTION.replaced) * n)] for n in range(self.layers)]
        slots = tuple(cache.shape[2] for cache in caches)
        return LineWindowCommitLaunch(slots, rows, width, head_dim, inputs[0].dtype)

    def enqueue(self, launch: LineWindowCommitLaunch, kernels: DeviceKernels, call: Call) -> None:
        size = len(LINE_WINDOW_COMMIT_LAYER)
        write_slots, *shared = call.inputs[self.layers * size :]
        of_layer = 8 * launch.rows * launch.width
        slot_pos = call.outputs[len(LINE_ATTENTION.replaced) - 1 :: len(LINE_ATTENTION.replaced)]
        for layer, (grid, slots) in enumerate(zip(launch.grids, launch.slots, strict=True)):
            pointers = (
                *call.inputs[layer * size : (layer + 1) * size],
                write_slots + layer * of_layer,
                *shared,
                slot_pos[layer],
            )
            kernels["commit_window"](
                grid,
                call.stream,
                *(ctypes.c_void_p(address) for address in pointers),
                ctypes.c_int32(slots),
            )
