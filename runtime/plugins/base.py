"""What an operation has to say of itself to become a plugin, in terms that need no TensorRT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from linert.runtime.plugins.contracts import FLOAT_TYPES, Contract
from linert.runtime.plugins.kernels import DeviceKernels

ALIGNED = 256


def aligned(count: int) -> int:
    """``count`` rounded up, so that scratch memory behind so many numbers or bytes begins where kernels may load whole vectors."""
    return -(-count // ALIGNED) * ALIGNED


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def dtype_faults(dtype: str) -> list[str]:
    """What is wrong with tensors of a type that is no :data:`~linert.runtime.plugins.contracts.FLOAT_TYPES`."""
    return [] if dtype in FLOAT_TYPES else [f"caches of {dtype}; can be {', '.join(FLOAT_TYPES)}"]


def refuse(operation: str, faults: Sequence[str]) -> None:
    """Raise :class:`ValueError` if there are ``faults`` of a launch."""
    if faults:
        raise ValueError(f"{operation}: {'; '.join(faults)}")


class TensorKind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Call(NamedTuple):
    """Device addresses of inputs, outputs and scratch memory, and the stream to launch on."""

    inputs: Sequence[int]
    outputs: Sequence[int]
    scratch: int
    stream: int


class Launch(Protocol):
    """How an operation of one shape is launched; a dataclass of numbers, stored in the plan."""

    @property
    def scratch_bytes(self) -> int:
        """Memory that a launch needs beside its inputs and outputs."""


class Operation(ABC):
    """An operation of the domain ``linert``. Subclasses are frozen dataclasses; their fields are the attributes, all
    integers, that its ONNX node has."""

    name: ClassVar[str]
    launch_type: ClassVar[type[Launch]]

    @property
    @abstractmethod
    def input_types(self) -> tuple[str, ...]:
        """Type of each input, or :data:`~linert.runtime.plugins.contracts.FLOAT_TYPE`."""

    @property
    @abstractmethod
    def output_types(self) -> tuple[str, ...]:
        """Type of each output, or :data:`~linert.runtime.plugins.contracts.FLOAT_TYPE`."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Shape of each output where the inputs have these."""

    def aliased_input(self, output: int) -> int:
        """Number of the input that an output is written over; -1 where it has memory of its own."""
        return -1

    @abstractmethod
    def launch(self, inputs: Sequence[TensorKind], capabilities: Sequence[int] = ()) -> Launch:
        """How it is launched on these inputs, on GPUs of ``capabilities`` (80 means 8.0) where these are known.

        Raises:
            ValueError: the kernels cannot do that; the message says what they can.
        """

    @abstractmethod
    def enqueue(self, launch: Any, kernels: DeviceKernels, call: Call) -> None:
        """Launch on the call's stream."""


class StepOperation(Operation):
    """An operation of a decode step, made from its contract."""

    contract: ClassVar[Contract]

    @property
    def input_types(self) -> tuple[str, ...]:
        return tuple(operand.dtype for operand in self.contract.inputs.values())

    @property
    def output_types(self) -> tuple[str, ...]:
        return tuple(operand.dtype for operand in self.contract.outputs.values())

    def output_shapes(self, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        sizes = self.contract.sizes(inputs)
        return [operand.shape(sizes) for operand in self.contract.outputs.values()]

    def aliased_input(self, output: int) -> int:
        source = self.contract.aliases.get(list(self.contract.outputs)[output])
        return -1 if source is None else list(self.contract.inputs).index(source)
