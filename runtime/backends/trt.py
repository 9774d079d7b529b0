"""The TensorRT backend: plans of either flavour, all state in device memory, a stage's run captured as a CUDA graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from linert.runtime.backends.base import Array, Backend
from linert.runtime.backends.cuda import Device
from linert.runtime.backends.cuda_graph import CapturedGraph, CopyNode
from linert.runtime.backends.trt_flavour import Flavour, make_logger
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.engines import Engines, build_again, engines_folder, read_engines
from linert.runtime.bundles.manifest import StageSpec, TensorSpec
from linert.runtime.errors import BundleError, DeviceError
from linert.runtime.plugins import VERSION as PLUGIN_VERSION
from linert.runtime.plugins.trt import register


class LoadedStage(NamedTuple):
    """A stage ready to run. ``engine`` is kept for the context's sake; ``copies`` put what was written beside a state where it
    belongs."""

    engine: Any
    context: Any
    copies: tuple[CopyNode, ...]


class TrtBackend(Backend):
    """Every tensor is device memory that all stages are bound to once.

    A state that a plan updates where it lies is bound as input and output alike; another is written beside and copied back on
    the device. A stage's first run is launched operation by operation, its second is captured, and from then on a run is one
    launch. Nothing comes back to the host unless it is read.
    """

    asynchronous = True

    def __init__(
        self,
        bundle: Bundle,
        stages: Iterable[str],
        flavour: Flavour,
        *,
        cuda_graphs: bool = True,
        device: Device | None = None,
    ) -> None:
        """Allocate the tensors of ``stages``; a plan is loaded when its stage first runs.

        Args:
            flavour: which TensorRT, and whose plans.
            cuda_graphs: False launches a stage's operations one by one every time.
            device: the current one if None.

        Raises:
            BundleError: there are no plans that belong to the bundle, this TensorRT and this GPU; the message says what to build.
            DeviceError: no GPU, or not enough memory.
            LinertError: the flavour is not installed.
        """
        super().__init__(bundle, stages)
        self.flavour = flavour
        self.cuda_graphs = cuda_graphs
        # A plan's digest is compared when it is loaded: two backends of a bundle do not read each other's.
        self.engines = read_engines(bundle, flavour.name, digests=False)
        self.trt = flavour.load()
        self._own_device = device is None
        self.device = device or Device()
        self._addresses: dict[str, int] = {}
        self._loaded: dict[str, LoadedStage] = {}
        self._run_before: set[str] = set()
        self.graphs: dict[str, CapturedGraph] = {}
        self._messages: list[str] = []
        self._logger = make_logger(self.trt, self._listen)
        try:
            check_engines(bundle, self.engines, str(self.trt.__version__), self.device)
            if self.engines.plugin_version:
                register(self.trt)
            self._runtime = self.trt.Runtime(self._logger)
            for name, spec in self.specs.items():
                self._addresses[name] = self.device.allocate(spec.nbytes)
        except BaseException:
            self.close()
            raise

    def load(self, stage: str) -> None:
        """Load the plan of ``stage`` and bind it, if that was not done yet.

        Raises:
            BundleError: TensorRT refuses the plan, or it has not the tensors that the manifest declares.
        """
        if stage in self._loaded:
            return
        plan = self.engines.plans[stage]
        path = engines_folder(self.bundle, self.flavour.name) / plan.file
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != plan.sha256:
            raise BundleError(
                f"the plan of {stage}, {path}, was changed; {build_again(self.bundle, self.flavour.name)}"
            )
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(
                f"TensorRT cannot load {path}: {self._said()}; {build_again(self.bundle, self.flavour.name)}"
            )
        spec = self.stages[stage]
        self._check(stage, spec, engine)
        context = engine.create_execution_context()
        if context is None:
            raise DeviceError(f"TensorRT cannot prepare {path}: {self._said()}")
        self._loaded[stage] = LoadedStage(engine, context, self._bind(stage, spec, engine, context))
        # TensorRT for RTX knows; TensorRT has no such question.
        capturable = getattr(context, "is_stream_capturable", None)
        if self.cuda_graphs and capturable is not None and not capturable(self.device.stream):
            del self._loaded[stage]
            reason = DeviceError(f"TensorRT says that {path} allocates memory while it runs: {self._said()}")
            raise _graph_error(stage, reason, f", and {build_again(self.bundle, self.flavour.name)}")

    def _close(self) -> None:
        self.device.synchronize()
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
        beside = [copy.source for loaded in self._loaded.values() for copy in loaded.copies]
        self._loaded.clear()
        self._runtime = None
        for address in (*self._addresses.values(), *beside):
            self.device.free(address)
        self._addresses.clear()
        if self._own_device:
            self.device.close()

    def synchronize(self) -> None:
        self.device.synchronize()

    def device_memory(self) -> Device:
        return self.device

    def address(self, name: str) -> int:
        """Where tensor ``name`` lies on the device, for good."""
        self._spec(name)
        return self._addresses[name]

    def tensor_at(self, address: int) -> str | None:
        """The name of the tensor that lies at ``address``."""
        return next((name for name, place in self._addresses.items() if place == address), None)

    def copies(self, stage: str) -> tuple[CopyNode, ...]:
        """The copies that are asked for behind every run of a loaded stage."""
        return self._loaded[stage].copies

    def _run(self, stage: str) -> None:
        if stage not in self.graphs:
            self.load(stage)
            if stage not in self._run_before or not self.cuda_graphs:
                # The first run may allocate memory and compile kernels, which cannot be captured.
                self._enqueue(stage)
                self._run_before.add(stage)
                return
        try:
            self.capture(stage).launch(self.device.stream)
        except DeviceError as error:
            raise _graph_error(stage, error) from error

    def capture(self, stage: str) -> CapturedGraph:
        """The CUDA graph of a stage that ran before; captured now if it was not yet. Nothing is launched.

        Raises:
            DeviceError: the driver or TensorRT refuses.
        """
        if stage not in self.graphs:
            with self.device.capturing() as captured:
                self._enqueue(stage)
            [self.graphs[stage]] = captured
        return self.graphs[stage]

    def _enqueue(self, stage: str) -> None:
        _, context, copies = self._loaded[stage]
        if not context.execute_async_v3(self.device.stream):
            raise DeviceError(f"TensorRT failed in stage {stage}: {self._said()}")
        for copy in copies:
            self.device.copy(*copy)

    def _read(self, spec: TensorSpec) -> Array:
        bits = spec.dtype == "bfloat16"
        array = np.empty(spec.shape, np.uint16 if bits else spec.dtype)
        self.device.download(self._addresses[spec.name], array)
        return (array.astype(np.uint32) << 16).view(np.float32) if bits else array

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self.device.upload(self._addresses[spec.name], array)

    def _bind(self, stage: str, spec: StageSpec, engine: Any, context: Any) -> tuple[CopyNode, ...]:
        aliases = self.engines.plans[stage].aliases
        inputs = {tensor.name for tensor in spec.inputs}
        copies = []
        for name in inputs & tensor_names(engine):
            self._set_address(context, name, self._addresses[name])
        for tensor in spec.outputs:
            state = spec.updates.get(tensor.name, tensor.name)
            address = self._addresses[state]
            in_place = state in (aliases.get(tensor.name), self._aliased_input(engine, tensor.name))
            if state in inputs and not in_place:
                beside = self.device.allocate(tensor.nbytes)
                copies.append(CopyNode(address, beside, tensor.nbytes))
                address = beside
            self._set_address(context, tensor.name, address)
        return tuple(copies)

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise DeviceError(f"TensorRT refuses the memory of {name}: {self._said()}")

    @staticmethod
    def _aliased_input(engine: Any, output: str) -> str | None:
        """The input that TensorRT itself writes ``output`` over, as it does for caches that no plugin updates."""
        ask: Callable[[str], str | None] | None = getattr(engine, "get_aliased_input_tensor", None)
        return ask(output) if ask else None

    def _check(self, stage: str, spec: StageSpec, engine: Any) -> None:
        types = {getattr(self.trt, name): name for name in TYPES}
        declared = {tensor.name: (tensor.dtype, tensor.shape) for tensor in (*spec.inputs, *spec.outputs)}
        engine_tensors = {
            name: (types.get(engine.get_tensor_dtype(name), ""), tuple(engine.get_tensor_shape(name)))
            for name in tensor_names(engine)
        }
        wrong = {name for name, kind in engine_tensors.items() if declared.get(name) != kind}
        # An input that a stage does not use may be left out.
        wrong |= {tensor.name for tensor in spec.outputs} - engine_tensors.keys()
        if wrong:
            raise BundleError(
                f"the plan of {stage} has not the tensors that the manifest declares: {', '.join(sorted(wrong))}; "
                f"{build_again(self.bundle, self.flavour.name)}"
            )

    def _listen(self, message: str, is_error: bool) -> None:
        if is_error:
            self._messages.append(message)

    def _said(self) -> str:
        """What TensorRT called errors since the last time."""
        said = "; ".join(self._messages) or "no reason given"
        self._messages.clear()
        return said


def tensor_names(engine: Any) -> set[str]:
    """An engine's inputs and outputs."""
    return {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}


def _graph_error(stage: str, reason: Exception, otherwise: str = "") -> DeviceError:
    """What to do where a stage cannot be captured, or launched as what was captured."""
    return DeviceError(
        f"stage {stage} cannot be run as a CUDA graph: {reason}; --no-cuda-graphs launches its operations one by one{otherwise}"
    )


TYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")
"""Of inputs and outputs, by the names that numpy and TensorRT share."""


def check_engines(bundle: Bundle, engines: Engines, version: str, device: Device) -> None:
    """Compare plans with the TensorRT that is installed, with its ``version``, and with the GPU.

    Raises:
        BundleError: they do not belong together; the message says what to build again.
    """
    remedy = build_again(bundle, engines.flavour)
    if engines.version != version:
        raise BundleError(
            f"the {engines.flavour} plans of {bundle.path} are of version {engines.version}, installed is {version}; "
            f"{remedy}"
        )
    if engines.plugin_version not in ("", PLUGIN_VERSION):
        raise BundleError(
            f"the plans of {bundle.path} hold plugins of version {engines.plugin_version}, this linert has version "
            f"{PLUGIN_VERSION}; {remedy}"
        )
    if engines.capabilities and device.capability not in engines.capabilities:
        raise BundleError(
            f"the plans of {bundle.path} are for {engines.made_for}; this is {device.name}, SM{device.capability}; "
            f"{remedy} --sm {device.capability}"
        )
