"""Cases of the plugins' operations that travel to a GPU machine: inputs, compiled kernels, and what must come out.

Running one needs numpy, msgspec and the CUDA driver; making them (scripts/gpu_prepare.py) needs PyTorch and Triton.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gpu_phases.place import Place
from linert.runtime.plugins import OPERATIONS
from linert.runtime.plugins.base import Call, Launch, Operation, TensorKind
from linert.runtime.plugins.kernels import DeviceKernels, KernelSet, LoadedKernel

FILE = "cases.msgpack.z"
ThingT = TypeVar("ThingT", bound=msgspec.Struct)

ITEM = {
    "float32": np.float32,
    "float16": np.float16,
    # numpy has no such type: the bits.
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


class Values(msgspec.Struct, frozen=True):
    """A tensor: its dtype by name, its shape, its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def kind(self) -> TensorKind:
        return TensorKind(self.dtype, self.shape)

    @property
    def array(self) -> np.ndarray:
        """A copy as numpy has it; the bits of bfloat16."""
        return np.frombuffer(self.data, ITEM[self.dtype]).reshape(self.shape).copy()


class Case(msgspec.Struct, frozen=True):
    """One call of an operation.

    ``kernels``: compiled for the launch. ``outputs``: what must come out. Where an output lies over an input its data is
    the zlib-compressed exclusive or with that input, of which next to nothing is left. ``tolerance``: of floating-point outputs, relative to the largest number of each (at least 1); whole numbers and
    what is copied must be equal.
    """

    name: str
    operation: str
    attributes: dict[str, int]
    launch: dict[str, Any]
    kernels: KernelSet
    inputs: tuple[Values, ...]
    outputs: tuple[Values, ...]
    tolerance: float

    @staticmethod
    def of(
        name: str,
        operation: Operation,
        launch: Launch,
        kernels: KernelSet,
        inputs: Sequence[Values],
        outputs: Sequence[Values],
        tolerance: float,
    ) -> Case:
        """A case of ``operation`` with its ``launch``."""
        changed = []
        for number, output in enumerate(outputs):
            source = operation.aliased_input(number)
            data = output.data if source < 0 else zlib.compress(_xor(output.data, inputs[source].data))
            changed.append(Values(output.dtype, output.shape, data))
        return Case(
            name,
            operation.name,
            asdict(operation),  # type: ignore[call-overload]
            msgspec.to_builtins(launch),
            kernels,
            tuple(inputs),
            tuple(changed),
            tolerance,
        )

    def wanted(self) -> list[Values]:
        """What must come out."""
        operation, _ = self.made()
        outputs = []
        for number, output in enumerate(self.outputs):
            source = operation.aliased_input(number)
            data = output.data
            if source >= 0:
                data = _xor(zlib.decompress(data), self.inputs[source].data)
            outputs.append(Values(output.dtype, output.shape, data))
        return outputs

    def made(self) -> tuple[Operation, Launch]:
        """The operation and its launch."""
        kind = OPERATIONS[self.operation]
        return kind(**self.attributes), msgspec.convert(self.launch, kind.launch_type)


def _xor(one: bytes, other: bytes) -> bytes:
    return (np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).tobytes()


def write_carried(path: Path, things: Sequence[msgspec.Struct]) -> None:
    """Write what travels, compressed: kernels as text are a fifth of their size then."""
    path.write_bytes(zlib.compress(msgspec.msgpack.encode(things)))


def read_carried(path: Path, kind: type[ThingT]) -> list[ThingT]:
    """Read what :func:`write_carried` wrote of ``kind``."""
    return msgspec.msgpack.decode(zlib.decompress(path.read_bytes()), type=list[kind])  # type: ignore[valid-type]


class Prepared:
    """A case on a device: its memory, its loaded kernels, its launch.

    Args:
        form: ``machine code``, or ``text`` for the PTX that the driver compiles.
    """

    def __init__(self, place: Place, case: Case, form: str) -> None:
        self.case, self.device = case, place.device
        self.operation, self.launch = case.made()
        place.announce(self.operation, self.launch, [values.kind for values in case.inputs])
        device = self.device
        # No kernel is compiled for so old a GPU: its text is taken.
        capability = device.capability if form == "machine code" else 0
        if form == "machine code" and not place.rehearsal:
            lacking = [n for n, k in case.kernels.kernels.items() if k.image(capability) == k.ptx]
            if lacking:
                raise AssertionError(f"no machine code for SM{capability} of {', '.join(lacking)}")
        loaded = {
            name: LoadedKernel(kernel, device.driver, capability)
            for name, kernel in case.kernels.kernels.items()
        }
        self.kernels = DeviceKernels(loaded, device.driver)
        self.inputs = [device.allocate(len(values.data)) for values in case.inputs]
        self.wanted = case.wanted()
        self.outputs = [self._output(number, values) for number, values in enumerate(self.wanted)]
        self.scratch = device.allocate(self.launch.scratch_bytes)

    def _output(self, number: int, values: Values) -> int:
        source = self.operation.aliased_input(number)
        return self.inputs[source] if source >= 0 else self.device.allocate(len(values.data))

    def upload(self) -> None:
        """Lay out the inputs; poison what is to be written."""
        for address, values in zip(self.outputs, self.wanted, strict=True):
            self.device.upload(address, np.full(len(values.data), 0xA5, np.uint8))
        for address, values in zip(self.inputs, self.case.inputs, strict=True):
            self.device.upload(address, values.array)
        self.device.upload(self.scratch, np.full(max(1, self.launch.scratch_bytes), 0xFF, np.uint8))

    def enqueue(self) -> None:
        """Ask for the operation, as a plugin does."""
        call = Call(self.inputs, self.outputs, self.scratch, self.device.stream)
        self.operation.enqueue(self.launch, self.kernels, call)

    def compare(self) -> float:
        """The largest error of what came out, relative to each output's largest number.

        Raises:
            AssertionError: an output is off by more than the case's tolerance, or differs where it must be equal.
        """
        worst = 0.0
        for number, (address, wanted) in enumerate(zip(self.outputs, self.wanted, strict=True)):
            came = np.zeros_like(wanted.array)
            self.device.download(address, came)
            error = difference(wanted.dtype, came, wanted.array)
            exact = wanted.dtype.startswith(("int", "bool"))
            if not error <= (0 if exact else self.case.tolerance):
                raise AssertionError(f"output {number} ({wanted.dtype} {wanted.shape}) is off by {error:.2e}")
            worst = max(worst, error)
        return worst

    def free(self) -> None:
        """Give the memory back."""
        for address in {*self.inputs, *self.outputs, self.scratch}:
            self.device.free(address)


def difference(dtype: str, came: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference relative to the largest number wanted (at least 1); NaN has to stand where NaN stands."""
    if dtype == "bfloat16":
        came, wanted = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (came, wanted))
    came, wanted = came.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isnan(came), np.isnan(wanted)):
        return float("inf")
    there = ~np.isnan(wanted)
    if not there.any():
        return 0.0
    scale = max(1.0, float(np.abs(wanted[there]).max()))
    return float(np.abs(came[there] - wanted[there]).max()) / scale
