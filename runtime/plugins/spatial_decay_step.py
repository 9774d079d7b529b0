"""SpatialDecayStep as a plugin: its tensors, and how its kernel is launched on a shape.

Axes: R = sequences x heads, C = slots of the line in progress, M = matrices of a state, D = key size, E = value size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from linert.runtime.plugins.base import (
    HELD,
    Call,
    Launch,
    StepOperation,
    TensorKind,
    dtype_faults,
    power_of_two,
    refuse,
)
from linert.runtime.plugins.kernels import DeviceKernels

INPUTS = {
    "q": HELD,
    "k": HELD,
    "v": HELD,
    "k_line": HELD,
    "v_line": HELD,
    "above": "float32",
    "write_slot": "int64",
    "matrix": "int64",
    "weighed": "float32",
    "above_weighed": "float32",
}
"""Type of each input (see :mod:`linert.graphs.spatial_decay_step`)."""

ALIASED = ("k_line", "v_line")
"""Inputs that the outputs behind the first are written over."""

MAX_SLOTS = 8192
MAX_HEAD = 256

TILE = 2048
"""Numbers of keys, values or a matrix that a program works on at a time."""

PROGRAMS = 264
"""Programs that fill a large GPU: two a multiprocessor. Values of fewer rows are split."""

LEAST_PART = 16
"""Values below which a part is not worth a program: 64 bytes of a matrix's row."""

WARPS = 4


@dataclass(frozen=True)
class SpatialDecayStepLaunch:
    """Launch parameters of one shape.

    Raises:
        ValueError: the kernel cannot do the shape; the message says which side of it, and what it can.
    """

    rows: int
    slots: int
    matrices: int
    key_dim: int
    value_dim: int
    dtype: str

    def __post_init__(self) -> None:
        faults = dtype_faults(self.dtype)
        if not 1 <= self.slots <= MAX_SLOTS:
            faults.append(f"{self.slots} slots; can be 1 to {MAX_SLOTS}")
        for name, size in (("keys", self.key_dim), ("values", self.value_dim)):
            if not 1 <= size <= MAX_HEAD:
                faults.append(f"{name} of {size}; can be 1 to {MAX_HEAD}")
        if min(self.rows, self.matrices) < 1:
            faults.append(f"{self.rows} rows of {self.matrices} matrices; must be at least 1")
        refuse("SpatialDecayStep", faults)

    @property
    def key_pad(self) -> int:
        return power_of_two(self.key_dim)

    @property
    def part_values(self) -> int:
        """Values of a part; a power of two."""
        whole = power_of_two(self.value_dim)
        wanted = power_of_two(-(-PROGRAMS // self.rows))
        return max(min(whole, LEAST_PART), whole // wanted)

    @property
    def parts(self) -> int:
        """1 where there are rows enough to fill a GPU."""
        return -(-self.value_dim // self.part_values)

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows, self.parts, 1

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time parameters of the kernel."""
        return {
            "D": self.key_dim,
            "D_PAD": self.key_pad,
            "E": self.value_dim,
            "E_PART": self.part_values,
            "SLOTS_BLOCK": max(1, min(power_of_two(self.slots), TILE // self.key_pad)),
            "D_BLOCK": min(self.key_pad, max(1, TILE // self.part_values)),
        }


@dataclass(frozen=True)
class SpatialDecayStep(StepOperation):
    """Write a token into the line in progress, and read the line, the prefix and what is above."""

    name: ClassVar[str] = "SpatialDecayStep"
    launch_type: ClassVar[type[Launch]] = SpatialDecayStepLaunch

    inputs: ClassVar[Mapping[str, str]] = INPUTS
    like: ClassVar[str] = "v"
    aliased: ClassVar[tuple[str, ...]] = ALIASED

    def launch(
        self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()
    ) -> SpatialDecayStepLaunch:
        kinds = dict(zip(INPUTS, inputs, strict=True))
        rows, matrices, key_dim, value_dim = kinds["above"].shape
        slots = kinds["k_line"].shape[2]
        return SpatialDecayStepLaunch(rows, slots, matrices, key_dim, value_dim, kinds["q"].dtype)

    def enqueue(self, launch: SpatialDecayStepLaunch, kernels: DeviceKernels, call: Call) -> None:
        pointers = (*call.inputs, call.outputs[0])
        kernels["spatial_decay_step"](
            launch.grid,
            call.stream,
            *(ctypes.c_void_p(address) for address in pointers),
            ctypes.c_int32(launch.slots),
            ctypes.c_int32(launch.matrices),
        )
