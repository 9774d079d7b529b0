"""Operations as plugins of TensorRT and TensorRT for RTX, one implementation for both.

At build time kernels are handed to the creator; a plan carries them as a field, so that where it runs neither Triton nor a
compiler is needed, only the CUDA driver.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from linert.runtime.plugins import CONTENTS, NAMESPACE, OPERATIONS, VERSION
from linert.runtime.plugins.base import Call, Launch, Operation, TensorKind
from linert.runtime.plugins.contracts import FLOAT_TYPE, FLOAT_TYPES
from linert.runtime.plugins.kernels import DeviceKernels, KernelSet, LoadedKernel, checked, current_capability

Compile = Callable[[Operation, Launch], KernelSet]


class Contents(msgspec.Struct, frozen=True):
    """What a plan stores of a plugin: attributes, launch parameters, kernels."""

    attributes: dict[str, int]
    launch: dict[str, Any]
    kernels: KernelSet


class LoadedKernels(dict[str, LoadedKernel]):
    """Loaded kernels by name; unlike a plain dictionary it can be referred to weakly."""


class Contexts:
    """Kernels loaded in CUDA contexts, each once however many layers use it, as long as one of them does."""

    def __init__(self) -> None:
        self._loaded: WeakValueDictionary[tuple[int, bytes], LoadedKernels] = WeakValueDictionary()

    def load(self, kernels: KernelSet) -> DeviceKernels:
        """Ready-made launches of ``kernels`` in the current context.

        Raises:
            RuntimeError: the driver refuses them.
            ImportError: cuda-bindings are not installed.
        """
        from cuda.bindings import driver

        # Unlike its address, the number of a context is never given to another.
        context = checked(driver, driver.cuCtxGetId(checked(driver, driver.cuCtxGetCurrent())))
        key = int(context), msgspec.msgpack.encode(kernels)
        loaded = self._loaded.get(key)
        if loaded is None:
            capability = current_capability(driver, checked(driver, driver.cuCtxGetDevice()))
            loaded = LoadedKernels(
                (name, LoadedKernel(kernel, driver, capability)) for name, kernel in kernels.kernels.items()
            )
            self._loaded[key] = loaded
        return DeviceKernels(loaded, driver)


def register(trt: Any, compile_kernels: Compile | None = None, capabilities: Sequence[int] = ()) -> None:
    """Register every operation with ``trt`` (the module ``tensorrt`` or ``tensorrt_rtx``), where it was not yet.

    Args:
        compile_kernels: what makes kernels while a plan is built; plans can be run without.
        capabilities: of the GPUs that plans are built for (80 means 8.0).
    """
    registry = trt.get_plugin_registry()
    known = {(creator.name, creator.plugin_namespace) for creator in registry.all_creators}
    for operation in OPERATIONS.values():
        if (operation.name, NAMESPACE) not in known:
            registry.register_creator(make_creator(trt, operation, compile_kernels, capabilities), NAMESPACE)


def make_creator(
    trt: Any,
    kind: type[Operation],
    compile_kernels: Compile | None = None,
    capabilities: Sequence[int] = (),
) -> Any:
    """A plugin creator for one operation; see :func:`register`."""
    contexts = Contexts()
    types = {name: getattr(trt, name) for name in (*FLOAT_TYPES, "int32", "int64", "bool")}
    names = {kind: name for name, kind in types.items()}
    attributes = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
        """The operation with its attributes; with kernels once it is configured."""

        def __init__(
            self, operation: Operation, launch: Launch | None = None, kernels: KernelSet | None = None
        ) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuildV2.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_namespace, self.plugin_name, self.plugin_version = NAMESPACE, kind.name, VERSION
            self.operation, self.launch, self.kernels = operation, launch, kernels
            self.num_outputs = len(operation.output_types)
            self.loaded: DeviceKernels | None = None

        def get_capability_interface(self, interface: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Plugin(self.operation, self.launch, self.kernels)
            copy.loaded = self.loaded
            return copy

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [
                input_types[0] if name == FLOAT_TYPE else types[name] for name in self.operation.output_types
            ]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            shapes = [tuple(side.get_constant_value() for side in shape) for shape in inputs]
            return [
                trt.DimsExprs([builder.constant(side) for side in shape])
                for shape in self.operation.output_shapes(shapes)
            ]

        def get_aliased_input(self, output_index: int) -> int:
            return self.operation.aliased_input(output_index)

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            described = in_out[pos].desc
            if described.format != trt.TensorFormat.LINEAR:
                return False
            wanted = (*self.operation.input_types, *self.operation.output_types)[pos]
            if wanted == FLOAT_TYPE:
                return names.get(described.type) in FLOAT_TYPES and described.type == in_out[0].desc.type
            return bool(described.type == types[wanted])

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            if compile_kernels is None:
                raise RuntimeError(f"a plan with {kind.name} can only be built by linert build")
            kinds = [TensorKind(names[tensor.desc.type], tuple(tensor.desc.dims)) for tensor in inputs]
            self.launch = self.operation.launch(kinds, capabilities)
            self.kernels = compile_kernels(self.operation, self.launch)

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Shapes are static."""

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self.launch.scratch_bytes if self.launch else 0

        def get_valid_tactics(self) -> list[int]:
            return [1]

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def get_fields_to_serialize(self) -> Any:
            data = np.frombuffer(self.contents(), np.int8)
            return trt.PluginFieldCollection([trt.PluginField(CONTENTS, data, trt.PluginFieldType.INT8)])

        def contents(self) -> bytes:
            """What the plan stores, compressed: a quarter of the size, and every layer has its own."""
            if self.launch is None or self.kernels is None:
                return b""
            launch = msgspec.to_builtins(self.launch)
            contents = Contents(asdict(self.operation), launch, self.kernels)  # type: ignore[call-overload]
            return zlib.compress(msgspec.msgpack.encode(contents))

        def attach_to_context(self, context: Any) -> Any:
            copy = self.clone()
            if copy.kernels is not None:
                copy.loaded = contexts.load(copy.kernels)
            return copy

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self.launch is None or self.loaded is None:
                raise RuntimeError(f"{kind.name} has no kernels loaded")
            for number, address in enumerate(outputs):
                source = self.operation.aliased_input(number)
                if source >= 0 and address != inputs[source]:
                    raise RuntimeError(f"{kind.name}: output {number} does not lie where input {source} lies")
            self.operation.enqueue(self.launch, self.loaded, Call(inputs, outputs, workspace, stream))

    class Creator(trt.IPluginCreatorV3One):
        """Makes plugins for the parser, which gives attributes, and for plans, which give what they stored."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = kind.name, NAMESPACE, VERSION
            numbers = [
                trt.PluginField(name, np.array([], np.int32), trt.PluginFieldType.INT32)
                for name in attributes
            ]
            stored = trt.PluginField(CONTENTS, np.array([], np.int8), trt.PluginFieldType.INT8)
            self.field_names = trt.PluginFieldCollection([*numbers, stored])

        def create_plugin(self, name: str, plugin_fields: Any, phase: Any) -> Any:
            data = {field.name: field.data for field in plugin_fields}
            stored = bytes(data.pop(CONTENTS, b""))
            if not stored:
                return Plugin(kind(**{name: int(data[name][0]) for name in attributes}))
            contents = msgspec.msgpack.decode(zlib.decompress(stored), type=Contents)
            launch = msgspec.convert(contents.launch, kind.launch_type)
            return Plugin(kind(**contents.attributes), launch, contents.kernels)

    return Creator()
