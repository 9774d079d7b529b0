"""LineEvict as a plugin: a line's end for all layers in one launch.

The operation's tensors are those of :data:`linert.runtime.plugins.contracts.LINE_EVICT_INPUTS`, and the state's of every layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from linert.runtime.plugins.base import Call, Launch, Operation, TensorKind, aligned, power_of_two, refuse
from linert.runtime.plugins.contracts import LINE_EVICT, LINE_EVICT_INPUTS
from linert.runtime.plugins.kernels import DeviceKernels

BLOCK = 128
"""Slots that a program looks at together, four a thread."""

WARPS = 1
"""Of a program: nobody waits for another warp."""

PROGRAMS = 4096
"""Programs that fill a large GPU: more rows and layers are taken by the same ones, one after another."""

LEAST_NEIGHBOURS = 1024
"""Positions that pooled attention looks at in a round where slots are few."""

POOLED = 4
"""The importance for which neighbours are looked for (:class:`linert.graphs.line_evict.Importance`)."""

ADDRESSES = 5
"""Numbers a layer in the table: its slots, and where its scores, its positions and the new ones of both lie."""

MAX_SLOTS = 8192


@dataclass(frozen=True)
class LineEvictLaunch:
    """Launch parameters of one stage: ``slots`` of each layer, the rest as :class:`LineEvict`.

    Raises:
        ValueError: the kernel cannot do that; the message says what it can.
    """

    slots: tuple[int, ...]
    rows: int
    line_width: int
    lines: int
    prefix_len: int
    kv_heads: int
    branches: int
    importance: int
    carries_scores: int

    def __post_init__(self) -> None:
        faults = []
        if not all(self.line_width <= slots <= MAX_SLOTS for slots in self.slots):
            faults.append(f"{self.slots} slots; can be a line's {self.line_width} to {MAX_SLOTS}")
        if self.rows < 1 or self.rows % (self.kv_heads * self.branches):
            faults.append(f"{self.rows} rows; must be a multiple of {self.kv_heads} heads x {self.branches}")
        refuse(LINE_EVICT, faults)

    @property
    def layers(self) -> int:
        return len(self.slots)

    @property
    def most_slots(self) -> int:
        return max(self.slots)

    @property
    def slots_pad(self) -> int:
        return -(-self.most_slots // BLOCK) * BLOCK

    @property
    def grid(self) -> tuple[int, int, int]:
        return min(self.rows * self.layers, PROGRAMS), 1, 1

    @property
    def neighbours(self) -> int:
        """Positions that pooled attention looks at in a round: more where there are more slots, so that the work of a round grows
        as these do."""
        return max(LEAST_NEIGHBOURS, self.slots_pad)

    @property
    def scratch_words(self) -> int:
        """32-bit numbers that all programs need."""
        of_pooling = self.slots_pad + self.neighbours if self.importance == POOLED else 0
        return self.grid[0] * (self.slots_pad + of_pooling)

    @property
    def table_bytes(self) -> int:
        return aligned(8 * ADDRESSES * self.layers)

    @property
    def scratch_bytes(self) -> int:
        """The table, and what programs lay out."""
        return self.table_bytes + 4 * self.scratch_words

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time parameters of the kernel."""
        return {
            "HEADS": self.kv_heads,
            "BRANCHES": self.branches,
            "PREFIX": self.prefix_len,
            "W": self.line_width,
            "W_PAD": power_of_two(self.line_width),
            "LINES": self.lines,
            "KIND": self.importance,
            "CARRIES": self.carries_scores,
            "SLOTS_PAD": self.slots_pad,
            "NEIGHBOURS": self.neighbours,
            "BLOCK": BLOCK,
        }

    def table(self, *addresses: Sequence[int]) -> list[int]:
        """The table's numbers from the addresses of every layer's scores, positions, new scores and new positions."""
        return [number for row in zip(self.slots, *addresses, strict=True) for number in row]


@dataclass(frozen=True)
class LineEvict(Operation):
    """Choose the slots that the next line overwrites and evict what they hold.

    ``branches``: 2 where unconditional rows follow the conditional ones. ``importance``: a number of
    :class:`linert.graphs.line_evict.Importance`.
    """

    name: ClassVar[str] = LINE_EVICT
    launch_type: ClassVar[type[Launch]] = LineEvictLaunch

    layers: int = 0
    line_width: int = 0
    lines: int = 0
    prefix_len: int = 0
    kv_heads: int = 0
    branches: int = 0
    importance: int = 0
    carries_scores: int = 0

    @property
    def input_types(self) -> tuple[str, ...]:
        numbers = (operand.dtype for operand in LINE_EVICT_INPUTS.values())
        return (*numbers, *("float32",) * self.layers, *("int32",) * self.layers)

    @property
    def output_types(self) -> tuple[str, ...]:
        scores = () if self.carries_scores else ("float32",) * self.layers
        return "int64", "int64", *scores, *("int32",) * self.layers

    def output_shapes(self, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        layers = self._layers(inputs)
        rows = layers[0][0]
        scores = [] if self.carries_scores else layers
        sequences = (rows // self.kv_heads,)
        return [(self.layers, rows, self.line_width), sequences, *scores, *layers]

    def launch(self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()) -> LineEvictLaunch:
        layers = self._layers([kind.shape for kind in inputs])
        return LineEvictLaunch(
            tuple(slots for _, slots in layers),
            layers[0][0],
            self.line_width,
            self.lines,
            self.prefix_len,
            self.kv_heads,
            self.branches,
            self.importance,
            self.carries_scores,
        )

    def _layers(self, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """``(rows, slots)`` of each layer."""
        return [tuple(shape) for shape in inputs[-self.layers :]]

    def enqueue(self, launch: LineEvictLaunch, kernels: DeviceKernels, call: Call) -> None:
        layers, inputs, scratch = self.layers, call.inputs, call.scratch
        settings, state = inputs[: len(LINE_EVICT_INPUTS)], inputs[len(LINE_EVICT_INPUTS) :]
        (write_slots, line), after = call.outputs[:2], call.outputs[2:]
        scores_after = [0] * layers if self.carries_scores else after[:layers]
        table = launch.table(state[:layers], state[layers:], scores_after, after[-layers:])
        kernels.table(table, scratch, call.stream)
        pointers = (scratch, *settings, write_slots, line, scratch + launch.table_bytes)
        numbers = (launch.rows, launch.layers)
        kernels["line_evict"](
            launch.grid,
            call.stream,
            *(ctypes.c_void_p(pointer) for pointer in pointers),
            *(ctypes.c_int32(number) for number in numbers),
        )
