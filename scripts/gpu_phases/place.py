"""Where a phase runs: on the GPU at hand, or rehearsed in host memory with an emulated driver."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpu_phases.outcome import NotRunError
from linert.runtime.backends.cuda import Device
from linert.runtime.errors import LinertError
from linert.runtime.plugins.base import Launch, Operation, TensorKind

ROOT = Path(__file__).parents[2]


@dataclass
class Place:
    """What phases share.

    ``carried``: the folder that ``scripts/gpu_prepare.py`` made. ``out``: where results go. ``rehearsal``: on the CPU, with the
    tests' emulated driver and interpreted kernels.
    """

    carried: Path
    out: Path
    rehearsal: bool = False

    @cached_property
    def device(self) -> Device:
        """The GPU, or what stands for it.

        Raises:
            NotRunError: there is none.
        """
        try:
            return Device(self._emulated_driver if self.rehearsal else None)
        except LinertError as error:
            raise NotRunError(str(error)) from error

    @cached_property
    def _emulated_driver(self) -> Any:
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.emulated_gpu import EmulatedDriver

        return EmulatedDriver()

    def announce(self, operation: Operation, launch: Launch, kinds: Sequence[TensorKind]) -> None:
        """Say which kernels are loaded next: in a rehearsal they are interpreted, and have to be made for the launch."""
        if self.rehearsal:
            from tests.interpreted_kernels import interpreted_kernels

            self._emulated_driver.kernels.update(interpreted_kernels(operation, launch, kinds))

    def prepared(self, name: str) -> Path:
        """A file that was prepared beforehand.

        Raises:
            NotRunError: it was not.
        """
        path = self.carried / name
        if not path.exists():
            raise NotRunError(f"not prepared: python scripts/gpu_prepare.py --out {self.carried}")
        return path
