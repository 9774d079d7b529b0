"""The LineAttention plugin for TensorRT and TensorRT for RTX, one implementation for both.

At build time kernels are handed to the creator; a plan carries them as a field, so that where it runs neither Triton nor a
compiler is needed, only the CUDA driver.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from runtime.kernels import KernelSet, LoadedKernel, checked, current_capability
from runtime.line_attention_launch import LineAttentionLaunch

NAMESPACE, NAME, VERSION = "linert", "LineAttention", "1"
INPUTS = (
    "q",
    "k",
    "v",
    "k_cache",
    "v_cache",
    "scores",
    "slot_pos",
    "write_slot",
    "position",
    "fresh_from",
    "score_max",
)
ALIASES = {1: "k_cache", 2: "v_cache", 3: "scores", 4: "slot_pos"}
"""The input that each output is, by the output's number."""

Compile = Callable[[LineAttentionLaunch], KernelSet]


class Contents(msgspec.Struct, frozen=True):
    """What a plan stores of a plugin."""

    launch: LineAttentionLaunch
    kernels: KernelSet


class Devices:
    """Kernels loaded on the current device, each once however many layers use it."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[int, bytes], dict[str, LoadedKernel]] = {}

    def load(self, kernels: KernelSet) -> dict[str, LoadedKernel]:
        """Ready-made launches of ``kernels``.

        Raises:
            RuntimeError: the driver refuses them.
            ImportError: cuda-bindings are not installed.
        """
        from cuda.bindings import driver

        device = checked(driver, driver.cuCtxGetDevice())
        key = int(device), kernels.encode()
        if key not in self._loaded:
            capability = current_capability(driver, device)
            self._loaded[key] = {
                name: LoadedKernel(kernel, driver, capability) for name, kernel in kernels.kernels.items()
            }
        return self._loaded[key]


def make_creator(trt: Any, compile_kernels: Compile | None = None) -> Any:
    """A plugin creator to be registered with ``trt`` (the module ``tensorrt`` or ``tensorrt_rtx``).

    Args:
        compile_kernels: what makes kernels while a plan is built; plans can be run without.
    """
    devices = Devices()
    types = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}
    fixed = {
        "scores": trt.float32,
        "slot_pos": trt.int32,
        "write_slot": trt.int64,
        "position": trt.int32,
        "fresh_from": trt.int32,
        "score_max": trt.bool,
    }

    class LineAttentionPlugin(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime
    ):
        """Aliases its buffer: outputs 1 to 4 are inputs 3 to 6."""

        def __init__(
            self, launch: LineAttentionLaunch | None = None, kernels: KernelSet | None = None
        ) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuildV2.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_namespace, self.plugin_name, self.plugin_version = NAMESPACE, NAME, VERSION
            self.num_outputs = 1 + len(ALIASES)
            self.launch, self.kernels = launch, kernels
            self.loaded: Mapping[str, LoadedKernel] = {}

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = LineAttentionPlugin(self.launch, self.kernels)
            copy.loaded = self.loaded
            return copy

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0], *(input_types[INPUTS.index(name)] for name in ALIASES.values())]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            return [inputs[0], *(inputs[INPUTS.index(name)] for name in ALIASES.values())]

        def get_aliased_input(self, output_index: int) -> int:
            return INPUTS.index(ALIASES[output_index]) if output_index in ALIASES else -1

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            described = in_out[pos].desc
            if described.format != trt.TensorFormat.LINEAR:
                return False
            name = INPUTS[pos] if pos < num_inputs else ALIASES.get(pos - num_inputs, "q")
            if name in fixed:
                return bool(described.type == fixed[name])
            return described.type in types.values() and described.type == in_out[0].desc.type

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            described = {name: inputs[at].desc for at, name in enumerate(INPUTS)}
            rows, _, group, head_dim = described["q"].dims
            dtype = next(name for name, kind in types.items() if kind == described["q"].type)
            self.launch = LineAttentionLaunch(rows, group, described["scores"].dims[1], head_dim, dtype)
            if compile_kernels is None:
                raise RuntimeError("a plan with LineAttention can only be built by linert build")
            self.kernels = compile_kernels(self.launch)

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
            return trt.PluginFieldCollection([trt.PluginField("contents", data, trt.PluginFieldType.INT8)])

        def contents(self) -> bytes:
            """What the plan stores, compressed: a quarter of the size, and every layer has its own."""
            if self.launch is None or self.kernels is None:
                return b""
            return zlib.compress(msgspec.msgpack.encode(Contents(self.launch, self.kernels)))

        def attach_to_context(self, context: Any) -> Any:
            copy = self.clone()
            if copy.kernels is not None:
                copy.loaded = devices.load(copy.kernels)
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
            launch = self.launch
            if launch is None or not self.loaded:
                raise RuntimeError("LineAttention has no kernels loaded")
            at = {name: ctypes.c_void_p(pointer) for name, pointer in zip(INPUTS, inputs, strict=True)}
            attended, logits = ctypes.c_void_p(outputs[0]), ctypes.c_void_p(workspace)
            partial = ctypes.c_void_p(workspace + 4 * launch.logits_floats)
            slots, of_part = ctypes.c_int32(launch.slots), ctypes.c_int32(launch.part_slots)
            self.loaded["attend"](
                launch.attend_grid, stream, *at.values(), attended, logits, partial, slots, of_part
            )
            if launch.split:
                read = (at[name] for name in ("scores", "slot_pos", "fresh_from", "score_max"))
                parts = ctypes.c_int32(launch.parts)
                self.loaded["combine"](
                    launch.combine_grid, stream, *read, attended, logits, partial, slots, parts
                )

    class LineAttentionCreator(trt.IPluginCreatorV3One):
        """Makes plugins for the parser, which gives no fields, and for plans, which give what they stored."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField("contents", np.array([], np.int8), trt.PluginFieldType.INT8)]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            data = b"".join(bytes(field.data) for field in fields if field.name == "contents")
            if not data:
                return LineAttentionPlugin()
            held = msgspec.msgpack.decode(zlib.decompress(data), type=Contents)
            return LineAttentionPlugin(held.launch, held.kernels)

    return LineAttentionCreator()
