"""Compile the plugins' kernels ahead of time, with no GPU present."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linert.exporter.tensorrt import (
    line_attention_kernels,
    line_evict_kernels,
    line_window_kernels,
    spatial_decay_kernels,
)
from linert.runtime.errors import ExportError
from linert.runtime.plugins import line_attention, line_evict, line_window, spatial_decay_step
from linert.runtime.plugins.base import Launch
from linert.runtime.plugins.contracts import (
    FLOAT_TYPE,
    LINE_ATTENTION,
    LINE_EVICT_INPUTS,
    LINE_WINDOW_ATTENTION,
    LINE_WINDOW_COMMIT_LAYER,
    LINE_WINDOW_COMMIT_SHARED,
    SPATIAL_DECAY_STEP,
    SPATIAL_DECAY_WINDOW,
    Contract,
    Operand,
)
from linert.runtime.plugins.kernels import CompiledKernel, KernelSet
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from linert.runtime.plugins.line_evict import LineEvictLaunch
from linert.runtime.plugins.line_window import LineWindowAttentionLaunch, LineWindowCommitLaunch
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindowLaunch

PTX_CAPABILITY = 80
"""The text is compiled for the oldest GPU, so that all later ones can take it."""

ALIGNMENT = 16
"""Of every buffer's address. Without the promise kernels load number by number."""

HIDDEN_MEMORY = ("global_scratch_size", "profile_scratch_size")
"""Bytes a program, in the metadata of a compiled kernel."""

TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}
"""Triton's names of types."""

ENTRY = re.compile(rb"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)


def kernels_of(launch: Launch, capabilities: Sequence[int]) -> KernelSet:
    """The kernels that a launch needs, for GPUs of ``capabilities`` (80 means 8.0) and later ones.

    Raises:
        TypeError: an operation that has no kernels.
        ExportError: they need memory that plans do not give them.
    """
    if isinstance(launch, LineAttentionLaunch):
        return _line_attention(launch, capabilities)
    if isinstance(launch, LineEvictLaunch):
        return _line_evict(launch, capabilities)
    if isinstance(launch, SpatialDecayStepLaunch):
        return _spatial_decay(SPATIAL_DECAY_STEP, launch, launch.dtype, capabilities)
    if isinstance(launch, LineWindowAttentionLaunch):
        return _line_window_attention(launch, capabilities)
    if isinstance(launch, LineWindowCommitLaunch):
        return _line_window_commit(launch, capabilities)
    if isinstance(launch, SpatialDecayWindowLaunch):
        return _spatial_decay(SPATIAL_DECAY_WINDOW, launch, launch.step.dtype, capabilities)
    raise TypeError(f"no kernels for {type(launch).__name__}")


def _line_evict(launch: LineEvictLaunch, capabilities: Sequence[int]) -> KernelSet:
    numbers = ("table", *LINE_EVICT_INPUTS, "write_slots_next", "line_next")
    signature = dict.fromkeys(numbers, "*i64") | {"scratch": "*i32", "rows": "i32", "layers": "i32"}
    kernel = compile_kernel(
        line_evict_kernels.line_evict, signature, launch.constants, capabilities, line_evict.WARPS
    )
    return KernelSet({"line_evict": kernel})


def _spatial_decay(
    contract: Contract,
    launch: SpatialDecayStepLaunch | SpatialDecayWindowLaunch,
    dtype: str,
    capabilities: Sequence[int],
) -> KernelSet:
    """The kernel of one of linear attention's operations: a step, or a window."""
    name = "spatial_decay_step" if contract is SPATIAL_DECAY_STEP else "spatial_decay_window"
    pointers = _pointers(contract.inputs, dtype)
    signature = {**pointers, "attended": pointers["v"], "slots": "i32", "matrices": "i32"}
    kernel = compile_kernel(
        getattr(spatial_decay_kernels, name),
        signature,
        launch.constants,
        capabilities,
        spatial_decay_step.WARPS,
    )
    return KernelSet({name: kernel})


def _line_window_attention(launch: LineWindowAttentionLaunch, capabilities: Sequence[int]) -> KernelSet:
    inputs = _pointers(LINE_WINDOW_ATTENTION.inputs, launch.dtype)
    outputs = _pointers(LINE_WINDOW_ATTENTION.results, launch.dtype)
    scratch = {"logits": "*fp32", "partial": "*fp32", "slots": "i32"}
    signatures = {
        "attend_window": {**inputs, **scratch, "part_entries": "i32"},
        "combine_window": {**outputs, **scratch, "parts": "i32"},
    }
    return KernelSet(
        {
            name: compile_kernel(
                getattr(line_window_kernels, name),
                signature,
                launch.constants(name),
                capabilities,
                launch.warps(name),
            )
            for name, signature in signatures.items()
        }
    )


def _line_window_commit(launch: LineWindowCommitLaunch, capabilities: Sequence[int]) -> KernelSet:
    operands = {**LINE_WINDOW_COMMIT_LAYER, **LINE_WINDOW_COMMIT_SHARED}
    pointers = _pointers(operands, launch.dtype)
    signature = {**pointers, "slot_pos_next": pointers["slot_pos"], "slots": "i32"}
    kernel = compile_kernel(
        line_window_kernels.commit_window, signature, launch.constants, capabilities, line_window.WARPS
    )
    return KernelSet({"commit_window": kernel})


def _line_attention(launch: LineAttentionLaunch, capabilities: Sequence[int]) -> KernelSet:
    pointers = _pointers(LINE_ATTENTION.inputs, launch.dtype)
    results = {"attended": pointers["q"], "logits": "*fp32", "partial": "*fp32"}
    read = {name: pointers[name] for name in line_attention.COMBINED}
    signatures = {
        "attend": {**pointers, **results, "slots": "i32", "part_slots": "i32"},
        "combine": {**read, **results, "slots": "i32", "parts": "i32"},
    }
    names = ["attend", "combine"] if launch.split else ["attend"]
    return KernelSet(
        {
            name: compile_kernel(
                getattr(line_attention_kernels, name),
                signatures[name],
                launch.constants(name),
                capabilities,
                launch.warps,
            )
            for name in names
        }
    )


def _pointers(operands: Mapping[str, Operand], dtype: str) -> dict[str, str]:
    """Triton's types of an operation's tensors, where those of :data:`FLOAT_TYPE` are of ``dtype``."""
    return {
        name: f"*{TYPES[dtype if operand.dtype == FLOAT_TYPE else operand.dtype]}"
        for name, operand in operands.items()
    }


def compile_kernel(
    function: triton.JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, int],
    capabilities: Sequence[int],
    warps: int,
) -> CompiledKernel:
    """Compile a kernel for GPUs of ``capabilities``, and as text for later ones.

    Args:
        signature: Triton's type of each parameter, in their order, without ``constants``.
        constants: compile-time parameters.

    Raises:
        ExportError: the kernel needs memory that plans do not give it.
    """
    compiled = {}
    with triton.knobs.compilation.scope():
        # Half of the machine code's size.
        triton.knobs.compilation.disable_line_info = True
        for capability in sorted({*capabilities, PTX_CAPABILITY}):
            compiled[capability] = triton.compile(
                _source(function, signature, constants),
                target=GPUTarget("cuda", capability, 32),
                # Two threads that add each other's products must have one sum: they write it to one place. Were a product fused with
                # its addition, each would have rounded the other's alone.
                options={"num_warps": warps, "enable_fp_fusion": False},
            )
            refuse_hidden_memory(function.__name__, compiled[capability].metadata)
    oldest = compiled[PTX_CAPABILITY]
    ptx = oldest.asm["ptx"].encode()
    parameters = ENTRY.search(ptx)
    if parameters is None:
        raise RuntimeError(f"{function.__name__}: Triton's PTX has no entry point")
    return CompiledKernel(
        name=oldest.metadata.name,
        warps=oldest.metadata.num_warps,
        shared_bytes=max(kernel.metadata.shared for kernel in compiled.values()),
        hidden=parameters.group(1).count(b".param") - len(signature),
        cubins={capability: compiled[capability].asm["cubin"] for capability in sorted(set(capabilities))},
        ptx=ptx,
    )


def refuse_hidden_memory(kernel: str, metadata: Any) -> None:
    """Compare what a compiled kernel needs with what its launch gives: pointers to memory of Triton's own are null.

    Raises:
        ExportError: the kernel needs such memory.
    """
    # Older versions of Triton have no such memory, or say None where they have.
    sizes = {name: getattr(metadata, name, None) or 0 for name in HIDDEN_MEMORY}
    if any(sizes.values()):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ExportError(
            f"Triton {triton.__version__} compiled {kernel} to need memory of its own ({told}), which plans do not give it; "
            "install another version of Triton, or build with --no-plugin"
        )


def _source(
    function: triton.JITFunction, signature: Mapping[str, str], constants: Mapping[str, int]
) -> ASTSource:
    aligned = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    return ASTSource(
        function,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=dict(constants),
        attrs=aligned,
    )
