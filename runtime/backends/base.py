"""What a backend does: hold a bundle's tensors and run its stages over them."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import StageSpec, TensorSpec
from linert.runtime.closing import Closing
from linert.runtime.errors import RequestError

Array = NDArray[np.generic]


class DeviceMemory(Protocol):
    """Memory of a GPU."""

    @property
    def name(self) -> str:
        """As the driver calls the device."""

    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy on the device reads and writes."""


class Backend(Closing):
    """Named tensors that live on a device, and stages that read and replace them.

    Every input and output name of the stages is one tensor: stages that use the same name share it. A state keeps its memory
    for the life of the backend. ``runs``: how often each stage was run.
    """

    asynchronous: ClassVar[bool] = False
    """Whether :meth:`run` may return before the stage is done."""

    def __init__(self, bundle: Bundle, stages: Iterable[str]) -> None:
        """Hold ``stages`` of ``bundle``.

        Raises:
            BundleError: the bundle lacks a stage, or two stages disagree about a tensor.
        """
        self.bundle = bundle
        self._closed = False
        self.runs: Counter[str] = Counter()
        self.stages: dict[str, StageSpec] = {}
        for stage in stages:
            bundle.stage_path(stage)
            self.stages[stage] = bundle.manifest.stages[stage]
        self.specs: dict[str, TensorSpec] = {}
        for spec in self.stages.values():
            for tensor in spec.inputs:
                self._declare(tensor)
            for tensor in spec.outputs:
                state = spec.updates.get(tensor.name)
                self._declare(tensor if state is None else _renamed(tensor, state))

    def close(self) -> None:
        """Give back the tensors, the loaded stages and the device; from then on nothing can be run, read or written.

        What is closed already stays closed. An object that is dropped gives everything back as well, when Python gets to it.
        """
        if not self._closed:
            self._closed = True
            self._close()

    def run(self, stage: str) -> None:
        """Run one stage: its outputs replace the states that the manifest says.

        Raises:
            RequestError: the backend is closed, does not hold the stage, or it has to be loaded first.
            DeviceError: the device fails.
        """
        self._stage(stage)
        self.runs[stage] += 1
        self._run(stage)

    def read(self, name: str) -> Array:
        """Copy tensor ``name`` to the host."""
        return self._read(self._spec(name))

    def write(self, name: str, values: object) -> None:
        """Overwrite tensor ``name`` in place.

        Raises:
            RequestError: no such tensor, or ``values`` has not its shape or cannot become its dtype.
        """
        spec = self._spec(name)
        array = np.asarray(values)
        if array.shape != spec.shape:
            raise RequestError(f"{name} has shape {spec.shape}, not {array.shape}")
        if not np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
            raise RequestError(f"{name} is {spec.dtype}, not {array.dtype}")
        self._write(spec, array.astype(spec.dtype, copy=False))

    def _require_open(self) -> None:
        if self._closed:
            raise RequestError(f"the backend of {self.bundle.path} is closed: open another")

    def _stage(self, name: str) -> StageSpec:
        self._require_open()
        if name not in self.stages:
            raise RequestError(f"this backend does not hold stage {name}; it holds {', '.join(self.stages)}")
        return self.stages[name]

    def _spec(self, name: str) -> TensorSpec:
        self._require_open()
        if name not in self.specs:
            raise RequestError(f"no stage of this backend has a tensor {name}")
        return self.specs[name]

    def _declare(self, tensor: TensorSpec) -> None:
        known = self.specs.setdefault(tensor.name, tensor)
        if known != tensor:
            raise RequestError(f"stages disagree about {tensor.name}: {known} and {tensor}")

    def synchronize(self) -> None:
        """Wait until every stage that was run is done."""

    def device_memory(self) -> DeviceMemory | None:
        """What measures the memory that tensors lie in; None where that is the host's."""
        return None

    @abstractmethod
    def load(self, stage: str) -> None:
        """Make ``stage`` ready to run in this thread, if it is not yet.

        What the stage's tensors hold afterwards is undefined, for a stage may be run to be made ready: load before an image
        begins.

        Raises:
            BundleError: the stage cannot run here; the message says why.
            DeviceError: the device refuses.
        """

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _run(self, stage: str) -> None: ...

    @abstractmethod
    def _read(self, spec: TensorSpec) -> Array: ...

    @abstractmethod
    def _write(self, spec: TensorSpec, array: Array) -> None: ...


def _renamed(tensor: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tensor.shape)
