"""The plugins' kernels as the emulated driver takes them: done by Triton's interpreter, on what lies at the addresses."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from linert.exporter.tensorrt import (
    line_attention_kernels,
    line_evict_kernels,
    line_window_kernels,
    spatial_decay_kernels,
)
from linert.exporter.tensorrt.compile import ALIGNMENT
from linert.runtime.plugins.base import Launch, Operation, TensorKind
from linert.runtime.plugins.contracts import (
    FLOAT_TYPE,
    LINE_ATTENTION,
    LINE_EVICT_INPUTS,
    LINE_WINDOW_ATTENTION,
    LINE_WINDOW_COMMIT_LAYER,
    LINE_WINDOW_COMMIT_SHARED,
    SPATIAL_DECAY_STEP,
    SPATIAL_DECAY_WINDOW,
    Operand,
)
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from linert.runtime.plugins.line_evict import LineEvictLaunch
from linert.runtime.plugins.line_window import LineWindowAttentionLaunch, LineWindowCommitLaunch
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindowLaunch
from tests.emulated_gpu import Kernel


def interpreted(function: Any, types: Mapping[str, torch.dtype], constants: Mapping[str, int]) -> Kernel:
    """A kernel as the emulated driver takes it; ``types`` of what pointers point to, other parameters are int32."""
    names = [name for name in inspect.signature(function.fn).parameters if name not in constants]

    def launch(grid: tuple[int, int, int], parameters: Sequence[int]) -> Callable[[], None]:
        values = []
        for number, name in enumerate(names):
            if name in types:
                address = ctypes.c_void_p.from_address(parameters[number]).value or 0
                # Kernels are compiled with this promise.
                assert address % ALIGNMENT == 0
                # The interpreter takes of a tensor its address and type.
                memory = (ctypes.c_char * 8).from_address(address)
                values.append(torch.frombuffer(memory, dtype=types[name], count=1))
            else:
                values.append(ctypes.c_int32.from_address(parameters[number]).value)
        return lambda: function[grid](*values, **constants)

    return launch


def interpreted_kernels(
    operation: Operation, launch: Launch, kinds: Sequence[TensorKind]
) -> dict[str, Kernel]:
    """All kernels of an operation for one launch; ``kinds`` of its inputs."""
    float_type = getattr(torch, kinds[0].dtype)
    if isinstance(launch, LineAttentionLaunch):
        pointers = _types(LINE_ATTENTION.inputs, float_type) | {
            "attended": float_type,
            "logits": torch.float32,
            "partial": torch.float32,
        }
        return {
            name: interpreted(getattr(line_attention_kernels, name), pointers, launch.constants(name))
            for name in ("attend", "combine")
        }
    if isinstance(launch, SpatialDecayStepLaunch):
        pointers = _types(SPATIAL_DECAY_STEP.inputs, float_type) | {"attended": float_type}
        kernel = spatial_decay_kernels.spatial_decay_step
        return {"spatial_decay_step": interpreted(kernel, pointers, launch.constants)}
    if isinstance(launch, SpatialDecayWindowLaunch):
        pointers = _types(SPATIAL_DECAY_WINDOW.inputs, float_type) | {"attended": float_type}
        kernel = spatial_decay_kernels.spatial_decay_window
        return {"spatial_decay_window": interpreted(kernel, pointers, launch.constants)}
    if isinstance(launch, LineWindowAttentionLaunch):
        operands = {**LINE_WINDOW_ATTENTION.inputs, **LINE_WINDOW_ATTENTION.results}
        pointers = _types(operands, float_type) | {"logits": torch.float32, "partial": torch.float32}
        constants = {name: launch.constants(name) for name in ("attend_window", "combine_window")}
        # The interpreter multiplies the bits of bfloat16.
        constants["attend_window"]["WIDENED"] = 1
        return {
            name: interpreted(getattr(line_window_kernels, name), pointers, numbers)
            for name, numbers in constants.items()
        }
    if isinstance(launch, LineWindowCommitLaunch):
        pointers = _types({**LINE_WINDOW_COMMIT_LAYER, **LINE_WINDOW_COMMIT_SHARED}, float_type)
        pointers["slot_pos_next"] = torch.int32
        kernel = line_window_kernels.commit_window
        return {"commit_window": interpreted(kernel, pointers, launch.constants)}
    assert isinstance(launch, LineEvictLaunch)
    names = ("table", *LINE_EVICT_INPUTS, "write_slots_next", "line_next")
    pointers = dict.fromkeys(names, torch.int64) | {"scratch": torch.int32}
    return {"line_evict": interpreted(line_evict_kernels.line_evict, pointers, launch.constants)}


def _types(operands: Mapping[str, Operand], float_type: torch.dtype) -> dict[str, torch.dtype]:
    return {
        name: float_type if operand.dtype == FLOAT_TYPE else getattr(torch, operand.dtype)
        for name, operand in operands.items()
    }
