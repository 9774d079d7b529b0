"""LineAttention as a plugin: how its kernels are launched on a shape.

The exporter compiles kernels for a :class:`LineAttentionLaunch` and the plugin launches them by it, so that both see the
same numbers. The operation's tensors are those of :data:`linert.runtime.plugins.contracts.LINE_ATTENTION`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from linert.runtime.plugins.base import (
    Call,
    Launch,
    StepOperation,
    TensorKind,
    aligned,
    dtype_faults,
    power_of_two,
    refuse,
)
from linert.runtime.plugins.contracts import FLOAT_TYPES, LINE_ATTENTION, Contract
from linert.runtime.plugins.kernels import DeviceKernels
from linert.runtime.plugins.tuning import tuning_of

COMBINED = ("scores", "slot_pos", "fresh_from", "score_max")
"""Inputs that the second kernel reads, where slots are shared by programs."""

MAX_SLOTS = 8192
MAX_GROUP = 16
MAX_HEAD = 256

VECTOR_BYTES = 16
"""What a thread reads at once at most."""

LEAST_VECTOR = 2
HEADS_OF_THREAD = 16
"""Numbers of a key, times query heads, that a thread reads at once: every query head needs registers of its own."""

WARPS_OF_GPU = 1056
"""Warps that fill a large GPU, eight a multiprocessor. Slots of fewer rows are shared by programs."""

LEAST_PART = 64
"""Slots below which a part is not worth a program."""

SCORED_BY_WARP = 512
"""Slots times query heads that a warp accounts for at a time."""

MAX_SCORED = 1024

COMBINED_BY_WARP = 128
"""Slots that a warp accounts for where they were shared by programs."""

SUMS_OF_THREAD = 32
"""Numbers of the programs' sums that a thread reads at once."""

WARP = 32
MAX_WARPS = 16


@dataclass(frozen=True)
class LineAttentionLaunch:
    """Launch parameters of one shape.

    ``warps``: of a program. ``tile``: numbers of K, times query heads, that a warp reads at most before it reckons. :meth:`tuned` knows
    good ones.

    Raises:
        ValueError: the kernels cannot do the shape; the message says which side of it, and what they can.
    """

    rows: int
    group: int
    slots: int
    head_dim: int
    dtype: str
    warps: int
    tile: int

    @classmethod
    def tuned(
        cls,
        rows: int,
        group: int,
        slots: int,
        head_dim: int,
        dtype: str,
        capabilities: Sequence[int] = (),
    ) -> LineAttentionLaunch:
        """The launch of a shape on GPUs of ``capabilities`` (80 means 8.0), by what was measured there.

        Raises:
            ValueError: as the class.
        """
        refuse("LineAttention", _shape_faults(rows, group, slots, head_dim, dtype))
        found = tuning_of(capabilities, power_of_two(head_dim), dtype)
        warps = max(found.warps, _least_warps(group, head_dim, dtype))
        return cls(rows, group, slots, head_dim, dtype, warps, found.tile)

    def __post_init__(self) -> None:
        faults = _shape_faults(self.rows, self.group, self.slots, self.head_dim, self.dtype)
        if not faults:
            least = _least_warps(self.group, self.head_dim, self.dtype)
            if self.warps not in (1, 2, 4, 8, MAX_WARPS) or self.warps < least:
                faults.append(f"{self.warps} warps; can be a power of two from {least} to {MAX_WARPS}")
            if self.tile < 1:
                faults.append(f"a tile of {self.tile}; must be at least 1")
        refuse("LineAttention", faults)

    @property
    def group_pad(self) -> int:
        return power_of_two(self.group)

    @property
    def head_pad(self) -> int:
        return power_of_two(self.head_dim)

    @property
    def vector(self) -> int:
        """Numbers of a key that a thread reads at once."""
        return _vector(self.group, self.head_dim, self.dtype)

    @property
    def lanes(self) -> int:
        """Slots that a program reads at once."""
        return WARP * self.warps * self.vector // self.head_pad

    @property
    def repeats(self) -> int:
        """How often it does so before it reckons.

        Triton keeps the positions of slots beside their keys while these are fewer than threads.
        """
        most = min(self.head_pad // self.vector // 2, -(-self.slots // self.lanes))
        wanted = self.tile // (WARP * self.vector * self.group_pad)
        return 1 << max(0, min(most, wanted).bit_length() - 1)

    @property
    def block(self) -> int:
        """Slots that a program works on at a time."""
        return self.lanes * self.repeats

    @property
    def part_slots(self) -> int:
        """Slots of a part; a multiple of the block where there are several parts."""
        programs = WARPS_OF_GPU // self.warps
        wanted = min(-(-programs // self.rows), -(-self.slots // LEAST_PART))
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
    def scored(self) -> int:
        """Slots that :func:`attend` accounts for at a time."""
        most = min(MAX_SCORED, self.warps * SCORED_BY_WARP // self.group_pad)
        return min(most, power_of_two(self.slots))

    @property
    def combined(self) -> int:
        """Slots that a program of :func:`combine` accounts for."""
        return min(self.scored, self.warps * COMBINED_BY_WARP)

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
        return self.rows, -(-self.slots // self.combined), 1

    def constants(self, kernel: str) -> dict[str, int]:
        """Compile-time parameters of ``kernel`` (``attend`` or ``combine``)."""
        shape = {"G": self.group, "G_PAD": self.group_pad, "D": self.head_dim, "D_PAD": self.head_pad}
        if kernel == "attend":
            return shape | {
                "VECTOR": self.vector,
                "LANES": self.lanes,
                "REPEATS": self.repeats,
                "SCORED": self.scored,
                "SPLIT": int(self.split),
            }
        parts_pad = power_of_two(self.parts)
        at_once = self.warps * WARP * SUMS_OF_THREAD // (self.group_pad * self.head_pad)
        return shape | {
            "PARTS_PAD": parts_pad,
            "PARTS_AT_ONCE": max(1, min(parts_pad, at_once)),
            "SCORED": self.combined,
        }


def _shape_faults(rows: int, group: int, slots: int, head_dim: int, dtype: str) -> list[str]:
    faults = dtype_faults(dtype)
    if not 1 <= slots <= MAX_SLOTS:
        faults.append(f"{slots} slots; can be 1 to {MAX_SLOTS}")
    if not 1 <= group <= MAX_GROUP:
        faults.append(f"{group} query heads a KV head; can be 1 to {MAX_GROUP}")
    if not 4 <= head_dim <= MAX_HEAD or head_dim % 4:
        faults.append(f"heads of {head_dim}; can be a multiple of 4 up to {MAX_HEAD}")
    if rows < 1:
        faults.append(f"{rows} rows; must be at least 1")
    return faults


def _vector(group: int, head_dim: int, dtype: str) -> int:
    """Numbers of a key that a thread reads at once: a divisor of the head size."""
    fewer = max(LEAST_VECTOR, HEADS_OF_THREAD // power_of_two(group))
    return min(VECTOR_BYTES // FLOAT_TYPES[dtype], fewer, head_dim & -head_dim)


def _least_warps(group: int, head_dim: int, dtype: str) -> int:
    """Warps that read a whole key at once."""
    return max(1, power_of_two(head_dim) // (WARP * _vector(group, head_dim, dtype)))


@dataclass(frozen=True)
class LineAttention(StepOperation):
    """The operation of :data:`linert.runtime.plugins.contracts.LINE_ATTENTION`."""

    name: ClassVar[str] = LINE_ATTENTION.name
    launch_type: ClassVar[type[Launch]] = LineAttentionLaunch
    contract: ClassVar[Contract] = LINE_ATTENTION

    def launch(self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()) -> LineAttentionLaunch:
        sizes = self.contract.sizes([kind.shape for kind in inputs])
        return LineAttentionLaunch.tuned(
            sizes["R"], sizes["G"], sizes["C"], sizes["D"], inputs[0].dtype, capabilities
        )

    def enqueue(self, launch: LineAttentionLaunch, kernels: DeviceKernels, call: Call) -> None:
        at = {
            name: ctypes.c_void_p(address)
            for name, address in zip(self.contract.inputs, call.inputs, strict=True)
        }
        results = (
            ctypes.c_void_p(call.outputs[0]),
            ctypes.c_void_p(call.scratch),
            ctypes.c_void_p(call.scratch + 4 * launch.logits_floats),
        )
        slots, of_part = ctypes.c_int32(launch.slots), ctypes.c_int32(launch.part_slots)
        kernels["attend"](launch.attend_grid, call.stream, *at.values(), *results, slots, of_part)
        if launch.split:
            read = (at[name] for name in COMBINED)
            parts = ctypes.c_int32(launch.parts)
            kernels["combine"](launch.combine_grid, call.stream, *read, *results, slots, parts)
