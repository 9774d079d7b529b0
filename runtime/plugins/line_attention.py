"""LineAttention as a plugin: its tensors, and how its kernels are launched on a shape.

The exporter compiles kernels for a :class:`LineAttentionLaunch` and the plugin launches them by it, so that both see the
same numbers. Axes: R = sequences x KV heads, G = query heads of a KV head, C = slots, D = head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runtime.plugins.base import (
    HELD,
    Call,
    Launch,
    StepOperation,
    TensorKind,
    aligned,
    dtype_faults,
    power_of_two,
    refuse,
)
from runtime.plugins.kernels import DeviceKernels

INPUTS = {
    "q": HELD,
    "k": HELD,
    "v": HELD,
    "k_cache": HELD,
    "v_cache": HELD,
    "scores": "float32",
    "slot_pos": "int32",
    "write_slot": "int64",
    "position": "int32",
    "fresh_from": "int32",
    "score_max": "bool",
}
"""Type of each input (see :mod:`graphs.line_attention`)."""

ALIASED = ("k_cache", "v_cache", "scores", "slot_pos")
"""Inputs that the outputs behind the first are written over."""

MAX_SLOTS = 8192
MAX_GROUP = 16
MAX_HEAD = 256

TILE = 4096
"""Numbers of K that a program works on at a time."""

PROGRAMS = 264
"""Programs that fill a large GPU: two a multiprocessor. Fewer rows are split."""

LEAST_PART = 64
"""Slots below which a part is not worth a program."""

WARPS = 4


@dataclass(frozen=True)
class LineAttentionLaunch:
    """Launch parameters of one shape.

    Raises:
        ValueError: the kernels cannot do the shape; the message says which side of it, and what they can.
    """

    rows: int
    group: int
    slots: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        faults = dtype_faults(self.dtype)
        if not 1 <= self.slots <= MAX_SLOTS:
            faults.append(f"{self.slots} slots; can be 1 to {MAX_SLOTS}")
        if not 1 <= self.group <= MAX_GROUP:
            faults.append(f"{self.group} query heads a KV head; can be 1 to {MAX_GROUP}")
        if not 4 <= self.head_dim <= MAX_HEAD or self.head_dim % 4:
            faults.append(f"heads of {self.head_dim}; can be a multiple of 4 up to {MAX_HEAD}")
        if self.rows < 1:
            faults.append(f"{self.rows} rows; must be at least 1")
        refuse("LineAttention", faults)

    @property
    def group_pad(self) -> int:
        return power_of_two(self.group)

    @property
    def head_pad(self) -> int:
        return power_of_two(self.head_dim)

    @property
    def block(self) -> int:
        """Slots that a program works on at a time."""
        return max(16, min(128, TILE // (self.group_pad * self.head_pad)))

    @property
    def part_slots(self) -> int:
        """Slots of a part; a multiple of the block where there are several parts."""
        wanted = min(-(-PROGRAMS // self.rows), -(-self.slots // LEAST_PART))
        if wanted <= 1:
            return self.slots
        return min(self.slots, -(-self.slots // (wanted * self.block)) * self.block)

    @property
    def parts(self) -> int:
        """1 where there are rows enough to fill a GPU, or slots too few to share."""
        return -(-self.slots // self.part_slots)

    @property
    def split(self) -> bool:
        return self.parts > 1

    @property
    def logits_floats(self) -> int:
        """Float32 scratch of the logits, with what aligns the scratch behind it."""
        return aligned(self.rows * self.group * self.slots)

    @property
    def partial_floats(self) -> int:
        """Float32 scratch of the parts' results."""
        return self.rows * self.parts * self.group_pad * (self.head_pad + 2) if self.split else 0

    @property
    def scratch_bytes(self) -> int:
        return 4 * (self.logits_floats + self.partial_floats)

    @property
    def attend_grid(self) -> tuple[int, int, int]:
        return self.rows, self.parts, 1

    @property
    def combine_grid(self) -> tuple[int, int, int]:
        return self.rows, -(-self.slots // self.block), 1

    def constants(self, kernel: str) -> dict[str, int]:
        """Compile-time parameters of ``kernel`` (``attend`` or ``combine``)."""
        found = {
            "G": self.group,
            "G_PAD": self.group_pad,
            "D": self.head_dim,
            "D_PAD": self.head_pad,
            "BLOCK": self.block,
        }
        return found | {"SPLIT": int(self.split)} if kernel == "attend" else found


@dataclass(frozen=True)
class LineAttention(StepOperation):
    """Write a token into its slots, attend over the line buffer, account for the attention."""

    name: ClassVar[str] = "LineAttention"
    launch_type: ClassVar[type[Launch]] = LineAttentionLaunch

    inputs: ClassVar[Mapping[str, str]] = INPUTS
    like: ClassVar[str] = "q"
    aliased: ClassVar[tuple[str, ...]] = ALIASED

    def launch(self, inputs: Sequence[TensorKind]) -> LineAttentionLaunch:
        kinds = dict(zip(INPUTS, inputs, strict=True))
        rows, _, group, head_dim = kinds["q"].shape
        return LineAttentionLaunch(rows, group, kinds["scores"].shape[1], head_dim, kinds["q"].dtype)

    def enqueue(self, launch: LineAttentionLaunch, kernels: DeviceKernels, call: Call) -> None:
        at = {name: ctypes.c_void_p(address) for name, address in zip(INPUTS, call.inputs, strict=True)}
        results = (
            ctypes.c_void_p(call.outputs[0]),
            ctypes.c_void_p(call.scratch),
            ctypes.c_void_p(call.scratch + 4 * launch.logits_floats),
        )
        slots, of_part = ctypes.c_int32(launch.slots), ctypes.c_int32(launch.part_slots)
        kernels["attend"](launch.attend_grid, call.stream, *at.values(), *results, slots, of_part)
        if launch.split:
            read = (at[name] for name in ("scores", "slot_pos", "fresh_from", "score_max"))
            parts = ctypes.c_int32(launch.parts)
            kernels["combine"](launch.combine_grid, call.stream, *read, *results, slots, parts)
