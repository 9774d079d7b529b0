"""SpatialDecayWindow as a plugin: how its kernel is launched on a shape.

The operation's tensors are those of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_WINDOW`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from linert.runtime.plugins.base import Call, Launch, StepOperation, TensorKind, power_of_two, refuse
from linert.runtime.plugins.contracts import SPATIAL_DECAY_WINDOW, Contract
from linert.runtime.plugins.kernels import DeviceKernels
from linert.runtime.plugins.spatial_decay_step import TILE, SpatialDecayStepLaunch

MAX_WIDTH = 64


@dataclass(frozen=True)
class SpatialDecayWindowLaunch:
    """Launch parameters of one shape: those of ``step``, of ``width`` positions.

    Raises:
        ValueError: the kernel cannot do the shape; the message says which side of it, and what it can.
    """

    step: SpatialDecayStepLaunch
    width: int

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_WIDTH:
            refuse(SPATIAL_DECAY_WINDOW.name, [f"windows of {self.width} positions; can be 1 to {MAX_WIDTH}"])

    @property
    def scratch_bytes(self) -> int:
        return 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.step.grid

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time parameters of the kernel."""
        step, width = self.step, power_of_two(self.width)
        # Products of queries with keys and with values are held at once, for every position.
        side = max(step.key_pad, step.part_values)
        slots_block = max(1, min(power_of_two(step.slots), TILE * 2 // (side * width)))
        return step.constants | {"T": self.width, "T_PAD": width, "SLOTS_BLOCK": slots_block}


@dataclass(frozen=True)
class SpatialDecayWindow(StepOperation):
    """The operation of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_WINDOW`."""

    name: ClassVar[str] = SPATIAL_DECAY_WINDOW.name
    launch_type: ClassVar[type[Launch]] = SpatialDecayWindowLaunch
    contract: ClassVar[Contract] = SPATIAL_DECAY_WINDOW

    def launch(
        self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()
    ) -> SpatialDecayWindowLaunch:
        sizes = self.contract.sizes([kind.shape for kind in inputs])
        step = SpatialDecayStepLaunch(
            sizes["R"], sizes["C"], sizes["M"], sizes["D"], sizes["E"], inputs[0].dtype
        )
        return SpatialDecayWindowLaunch(step, sizes["T"])

    def enqueue(self, launch: SpatialDecayWindowLaunch, kernels: DeviceKernels, call: Call) -> None:
        pointers = (*call.inputs, call.outputs[0])
        kernels["spatial_decay_window"](
            launch.grid,
            call.stream,
            *(ctypes.c_void_p(address) for address in pointers),
            ctypes.c_int32(launch.step.slots),
            ctypes.c_int32(launch.step.matrices),
        )
