"""A CUDA driver and a TensorRT that do their work in host memory, for tests where there is no GPU.

What drives them is the real code. They keep the rules that such code can break: work that was asked of a stream is done when
somebody waits for it and no sooner; nothing may be allocated or waited for while a graph is captured; an engine writes an output
over an input where a plugin does and nowhere else, and cannot be captured before it ran once.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from cuda.bindings import driver as real

from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.engines import Plan, read_engines
from linert.runtime.bundles.manifest import StageSpec, TensorSpec

CAPABILITY = 89
MEMORY = 8 << 30
POISON = 0xA5
ALIGNMENT = 256

OK = real.CUresult.CUDA_SUCCESS
REFUSED = real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
FULL = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
ATTRIBUTES = {
    real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: CAPABILITY // 10,
    real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: CAPABILITY % 10,
}
CONTEXT = 1
NO_COPY = {"srcMemoryType": None, "dstMemoryType": None}
KERNEL = real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
COPY = real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY


class Work(NamedTuple):
    """The type of a graph's node, what it does, and what a copy on the device copies."""

    kind: Any
    action: Callable[[], None]
    copy: SimpleNamespace


Kernel = Callable[[tuple[int, int, int], list[int]], Callable[[], None]]
"""Takes a grid and the addresses of a launch's parameters, reads them, and returns what the launch does."""


class EmulatedDriver:
    """The part of ``cuda.bindings.driver`` that linert calls.

    ``kernels``: what modules hold, by name. ``launches``: graphs launched so far, and operations outside of them. ``live``: what
    was taken and not given back, by kind.
    """

    def __init__(self, kernels: Mapping[str, Kernel] | None = None) -> None:
        self.kernels = dict(kernels or {})
        self.launches = {"graph": 0, "operation": 0}
        self.live: Counter[str] = Counter()
        self._events: dict[int, float] = {}
        self._buffers: dict[int, Any] = {}
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Work] | None = None
        self._contexts = 0
        self._numbers = itertools.count()

    def __getattr__(self, name: str) -> Any:
        # Enumerations; a function that is missing here must not reach the real driver.
        if name.startswith("cu"):
            raise AttributeError(f"the emulated driver has no {name}")
        return getattr(real, name)

    def ask(self, kind: Any, action: Callable[[], None], **copy: Any) -> tuple[Any]:
        """Put work into the stream, or into the graph that is being captured."""
        if self._captured is not None:
            self._captured.append(Work(kind, action, SimpleNamespace(**NO_COPY | copy)))
        else:
            self.launches["operation"] += 1
            self._queue.append(action)
        return (OK,)

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return OK, 0

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        if not self.live["context"]:
            self._contexts += 1
        self.live["context"] += 1
        return OK, CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.live["context"] -= 1
        return (OK,)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return OK, CONTEXT

    def cuCtxGetId(self, context: int) -> tuple[Any, ...]:
        return OK, self._contexts

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:
        return OK, b"Emulated GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, ...]:
        return OK, ATTRIBUTES[attribute]

    def cuGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cuStreamCreate(self, flags: Any) -> tuple[Any, ...]:
        self.live["stream"] += 1
        return OK, 7

    def cuStreamDestroy(self, stream: int) -> tuple[Any]:
        self.live["stream"] -= 1
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        self.live["event"] += 1
        return OK, next(self._numbers)

    def cuEventDestroy(self, event: int) -> tuple[Any]:
        self.live["event"] -= 1
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any]:
        self._queue.append(lambda: self._events.update({event: time.perf_counter()}))
        return (OK,)

    def cuEventElapsedTime(self, begun: int, ended: int) -> tuple[Any, ...]:
        return OK, (self._events[ended] - self._events[begun]) * 1e3

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        if self.capturing:
            return (REFUSED,)
        queue, self._queue = self._queue, []
        for action in queue:
            action()
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, MEMORY - sum(map(len, self._buffers.values())), MEMORY

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        if self.capturing:
            return REFUSED, 0
        if size > self.cuMemGetInfo()[1]:
            return FULL, 0
        memory = bytearray([POISON]) * (size + ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        address += -address % ALIGNMENT
        self._buffers[address] = memory
        self.live["memory"] += 1
        return OK, address

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self.cuMemAlloc(size)

    def cuMemFree(self, address: int) -> tuple[Any]:
        # Freeing waits for the device.
        self.cuStreamSynchronize(0)
        del self._buffers[address]
        self.live["memory"] -= 1
        return (OK,)

    cuMemFreeHost = cuMemFree

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        return self.ask(
            real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET, lambda: ctypes.memset(address, value, size)
        )

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        if source not in self._buffers:
            raise AssertionError("copied from memory that is not page-locked")
        return self.ask(COPY, lambda: ctypes.memmove(target, source, size))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self.ask(COPY, lambda: ctypes.memmove(target, source, size))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        kind = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
        return self.ask(
            COPY,
            lambda: ctypes.memmove(target, source, size),
            **{"srcMemoryType": kind, "dstMemoryType": kind, "srcDevice": source, "dstDevice": target},
            **{"WidthInBytes": size, "Height": 1, "Depth": 1},
        )

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self._captured = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        graph, self._captured = self._captured, None
        self.live["graph"] += 1
        return OK, graph

    def cuGraphGetNodes(self, graph: list[Work], count: int = 0) -> tuple[Any, ...]:
        return OK, graph[:count], len(graph)

    def cuGraphNodeGetType(self, node: Work) -> tuple[Any, ...]:
        return OK, node.kind

    def cuGraphMemcpyNodeGetParams(self, node: Work) -> tuple[Any, ...]:
        return OK, node.copy

    def cuGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, ...]:
        self.live["executable graph"] += 1
        return OK, list(graph)

    def cuGraphDestroy(self, graph: list[Work]) -> tuple[Any]:
        self.live["graph"] -= 1
        graph.clear()
        return (OK,)

    def cuGraphExecDestroy(self, graph: list[Work]) -> tuple[Any]:
        self.live["executable graph"] -= 1
        return (OK,)

    def cuGraphLaunch(self, graph: list[Work], stream: int) -> tuple[Any]:
        self.launches["graph"] += 1
        self._queue += [work.action for work in graph]
        return (OK,)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        self.live["module"] += 1
        return OK, image

    def cuModuleUnload(self, module: bytes) -> tuple[Any]:
        self.live["module"] -= 1
        return (OK,)

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:
        return OK, self.kernels[name.decode()]

    def cuLaunchKernel(self, function: Kernel, *arguments: Any) -> tuple[Any]:
        x, y, z, _, _, _, _, _, parameters, _ = arguments
        # The driver reads parameters when it is called, not when the kernel runs.
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        return self.ask(KERNEL, function((x, y, z), pointers))


class EmulatedTensorRT:
    """A flavour's module whose engines run a bundle's ONNX files, under the rules of the plans that were built of them."""

    def __init__(self, flavour: str, module: Any, bundle: Bundle, driver: EmulatedDriver) -> None:
        engines = read_engines(bundle, flavour, digests=False)
        self._module = module
        self._driver = driver
        self._bundle = bundle
        self._stages = {plan.sha256: (stage, plan) for stage, plan in engines.plans.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, data: bytes) -> EmulatedEngine:
        stage, plan = self._stages[hashlib.sha256(data).hexdigest()]
        spec = self._bundle.manifest.stages[stage]
        return EmulatedEngine(self._module, self._driver, self._bundle.stage_path(stage), spec, plan)


class EmulatedEngine:
    """An engine that is also its execution context."""

    def __init__(self, module: Any, driver: EmulatedDriver, path: Path, spec: StageSpec, plan: Plan) -> None:
        self._module, self._driver, self._spec, self._plan = module, driver, spec, plan
        options = ort.SessionOptions()
        # It says that caches are copied, as they are here.
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options)
        self._tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        self._addresses: dict[str, int] = {}
        self._ran = False

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._module, self._tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def create_execution_context(self) -> EmulatedEngine:
        return self

    def is_stream_capturable(self, stream: int) -> bool:
        return self._plan.user_allocation

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._driver.capturing and not self._ran:
            return False
        self._ran = True
        inputs = {tensor.name: self._addresses[tensor.name] for tensor in self._spec.inputs}
        for tensor in self._spec.outputs:
            source = self._plan.aliases.get(tensor.name)
            if source is not None and self._addresses[tensor.name] != inputs[source]:
                raise AssertionError(f"{tensor.name} does not lie where {source} lies")
            if source is None and self._addresses[tensor.name] in inputs.values():
                raise AssertionError(f"{tensor.name} lies where an input lies")
        addresses = dict(self._addresses)
        self._driver.ask(KERNEL, lambda: self._run(addresses))
        return True

    def _run(self, addresses: Mapping[str, int]) -> None:
        feed = {tensor.name: view(addresses[tensor.name], tensor) for tensor in self._spec.inputs}
        results = self._session.run([tensor.name for tensor in self._spec.outputs], feed)
        for tensor, values in zip(self._spec.outputs, results, strict=True):
            view(addresses[tensor.name], tensor)[...] = values


def view(address: int, tensor: TensorSpec) -> np.ndarray:
    """The memory at ``address`` as ``tensor``."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(address)
    return np.frombuffer(buffer, tensor.dtype).reshape(tensor.shape)
