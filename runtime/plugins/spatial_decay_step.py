"""SpatialDecayStep as a plugin: how its kernel is launched on a shape.

The operation's tensors are those of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_STEP`.
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
    dtype_faults,
    power_of_two,
    refuse,
)
from linert.runtime.plugins.contracts import SPATIAL_DECAY_STEP, Contract
from linert.runtime.plugins.kernels import DeviceKernels

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
    """The operation of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_STEP`."""

    name: ClassVar[str] = SPATIAL_DECAY_STEP.name
    launch_type: ClassVar[type[Launch]] = SpatialDecayStepLaunch
    contract: ClassVar[Contract] = SPATIAL_DECAY_STEP

    def launch(
        self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()
    ) -> SpatialDecayStepLaunch:
        sizes = self.contract.sizes([kind.shape for kind in inputs])
        return SpatialDecayStepLaunch(
            sizes["R"], sizes["C"], sizes["M"], sizes["D"], sizes["E"], inputs[0].dtype
        )

    def enqueue(self, launch: SpatialDecayStepLaunch, kernels: DeviceKernels, call: Call) -> None:
        pointers = (*call.inputs, call.outputs[0])
        kernels["spatial_decay_step"](
            launch.grid,
            call.stream,
            *(ctypes.c_void_p(address) for address in pointers),
            ctypes.c_int32(launch.slots),
            ctypes.c_int32(launch.matrices),
        )
