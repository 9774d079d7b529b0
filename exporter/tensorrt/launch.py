"""Launch the plugins' kernels on PyTorch tensors: compiled on a CUDA device, interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linert.exporter.tensorrt import line_attention_kernels as kernels
from linert.exporter.tensorrt import line_window_kernels as window_kernels
from linert.exporter.tensorrt import spatial_decay_kernels
from linert.exporter.tensorrt.line_evict_kernels import line_evict as line_evict_kernel
from linert.graphs.line_attention import LineAttentionInputs
from linert.graphs.line_window_attention import Attended, LineWindowAttentionInputs
from linert.graphs.line_window_commit import WindowCommit, WindowLayer
from linert.graphs.spatial_decay_step import StepInputs
from linert.graphs.spatial_decay_window import WindowInputs
from linert.runtime.plugins.base import TensorKind
from linert.runtime.plugins.contracts import FLOAT_TYPE, LINE_ATTENTION
from linert.runtime.plugins.line_attention import COMBINED, LineAttentionLaunch
from linert.runtime.plugins.line_evict import WARPS as EVICT_WARPS
from linert.runtime.plugins.line_evict import LineEvictLaunch
from linert.runtime.plugins.line_window import WARPS as WINDOW_WARPS
from linert.runtime.plugins.line_window import LineWindowAttentionLaunch, LineWindowCommitLaunch
from linert.runtime.plugins.spatial_decay_step import WARPS as STEP_WARPS
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindow


def line_attention(inputs: LineAttentionInputs, launch: LineAttentionLaunch | None = None) -> Tensor:
    """What :func:`linert.graphs.line_attention.reference` does, in place: returns what was attended, ``[R, 1, G, D]``.

    Needs ``TRITON_INTERPRET=1`` set before the first import of triton where the tensors are on the CPU.

    Args:
        launch: other parts or blocks than :meth:`LineAttentionLaunch.tuned` finds.

    Raises:
        ValueError: a shape or type that the kernels do not know.
    """
    rows, _, group, head_dim = inputs.q.shape
    slots = inputs.state.scores.shape[1]
    dtype = _dtype_name(inputs.state.k_cache)
    launch = launch or LineAttentionLaunch.tuned(rows, group, slots, head_dim, dtype)
    check(inputs, launch)
    named = dict(zip(LINE_ATTENTION.inputs, inputs.flat(), strict=True))
    attended = torch.empty_like(inputs.q)
    logits = inputs.q.new_empty(launch.logits_floats, dtype=torch.float32)
    partial = inputs.q.new_empty(max(1, launch.partial_floats), dtype=torch.float32)
    kernels.attend[launch.attend_grid](
        *(*inputs.flat(), attended, logits, partial),
        *(launch.slots, launch.part_slots),
        **launch.constants("attend"),
        num_warps=launch.warps,
    )
    if launch.split:
        kernels.combine[launch.combine_grid](
            *(tensor for name, tensor in named.items() if name in COMBINED),
            *(attended, logits, partial),
            *(launch.slots, launch.parts),
            **launch.constants("combine"),
            num_warps=launch.warps,
        )
    return attended


def check(inputs: LineAttentionInputs, launch: LineAttentionLaunch) -> None:
    """Compare every tensor with what ``launch`` says.

    Raises:
        ValueError: a tensor of another shape or dtype, or one that is not contiguous.
    """
    sizes = {"R": launch.rows, "G": launch.group, "C": launch.slots, "D": launch.head_dim}
    for (name, operand), tensor in zip(LINE_ATTENTION.inputs.items(), inputs.flat(), strict=True):
        shape = operand.shape(sizes)
        dtype = getattr(torch, launch.dtype if operand.dtype == FLOAT_TYPE else operand.dtype)
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; LineAttention wants {dtype} {shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")


def spatial_decay_step(inputs: StepInputs, launch: SpatialDecayStepLaunch | None = None) -> Tensor:
    """What :func:`linert.graphs.spatial_decay_step.reference` does, in place: returns what was attended, ``[R, 1, 1, E]``.

    Args:
        launch: other parts or blocks than the shape's own.
    """
    rows, matrices, key_dim, value_dim = inputs.state.above.shape
    slots, dtype = inputs.state.k_line.shape[2], _dtype_name(inputs.q)
    launch = launch or SpatialDecayStepLaunch(rows, slots, matrices, key_dim, value_dim, dtype)
    attended = torch.empty_like(inputs.v)
    spatial_decay_kernels.spatial_decay_step[launch.grid](
        *(*inputs.flat(), attended, launch.slots, launch.matrices),
        **launch.constants,
        num_warps=STEP_WARPS,
    )
    return attended


def spatial_decay_window(inputs: WindowInputs) -> Tensor:
    """What :func:`linert.graphs.spatial_decay_window.reference` does, in place: returns what was attended, ``[R, 1, T, E]``."""
    operation = SpatialDecayWindow()
    kinds = [TensorKind(_dtype_name(tensor), tuple(tensor.shape)) for tensor in inputs.flat()]
    launch = operation.launch(kinds)
    attended = inputs.v.new_empty(operation.output_shapes([kind.shape for kind in kinds])[0])
    spatial_decay_kernels.spatial_decay_window[launch.grid](
        *(*inputs.flat(), attended, launch.step.slots, launch.step.matrices),
        **launch.constants,
        num_warps=STEP_WARPS,
    )
    return attended


def line_window_attention(
    inputs: LineWindowAttentionInputs, launch: LineWindowAttentionLaunch | None = None
) -> Attended:
    """What :func:`linert.graphs.line_window_attention.reference` does. Triton's interpreter multiplies the bits of bfloat16, which
    are widened for it.

    Args:
        launch: other parts or blocks than the shape's own.
    """
    rows, group, width, head_dim = inputs.q.shape
    slots, dtype = inputs.k_cache.shape[2], _dtype_name(inputs.q)
    launch = launch or LineWindowAttentionLaunch(rows, group, width, slots, head_dim, dtype)
    made = torch.empty_like(inputs.q), inputs.bias.new_empty(rows, width, launch.entries)
    scratch = (
        inputs.bias.new_empty(launch.logits_floats),
        inputs.bias.new_empty(launch.partial_floats),
    )
    window_kernels.attend_window[launch.attend_grid](
        *(*inputs, *scratch, launch.slots, launch.part_entries),
        **launch.constants("attend_window") | {"WIDENED": int(not inputs.q.is_cuda)},
        num_warps=launch.warps("attend_window"),
    )
    window_kernels.combine_window[launch.combine_grid](
        *(*made, *scratch, launch.slots, launch.parts),
        **launch.constants("combine_window"),
        num_warps=launch.warps("combine_window"),
    )
    return Attended(*made, inputs.k_cache, inputs.v_cache)


def line_window_commit(layers: Sequence[WindowLayer], shared: WindowCommit) -> None:
    """What :class:`linert.graphs.line_window_commit.LineWindowCommit` does, in place."""
    rows, _, width, head_dim = layers[0].k.shape
    slots = tuple(layer.scores.shape[1] for layer in layers)
    dtype = _dtype_name(layers[0].k)
    launch = LineWindowCommitLaunch(slots, rows, width, head_dim, dtype)
    for layer, grid, write_slots in zip(layers, launch.grids, shared.write_slots, strict=True):
        slot_pos = layer.slot_pos.clone()
        window_kernels.commit_window[grid](
            *(*layer, write_slots, *shared[1:], slot_pos, layer.scores.shape[1]),
            **launch.constants,
            num_warps=WINDOW_WARPS,
        )
        layer.slot_pos.copy_(slot_pos)


def line_evict(
    launch: LineEvictLaunch, settings: Sequence[Tensor], scores: Sequence[Tensor], slot_pos: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What :class:`linert.graphs.line_buffer.LineEnd` does, for the policies that the plugin has.

    Args:
        settings: capacity ... write_slots, the stage's inputs in front of the state.
        scores, slot_pos: of every layer.

    Returns:
        The stage's outputs.
    """
    write_slots = settings[0].new_empty(launch.layers, launch.rows, launch.line_width)
    scores_after = (
        [] if launch.carries_scores else [torch.empty_like(layer_scores) for layer_scores in scores]
    )
    after = [torch.empty_like(layer_pos) for layer_pos in slot_pos]
    addresses = [
        [tensor.data_ptr() for tensor in tensors]
        for tensors in (scores, slot_pos, scores_after or scores, after)
    ]
    table = settings[0].new_tensor(launch.table(*addresses))
    scratch = torch.empty(launch.scratch_words, dtype=torch.int32, device=table.device)
    line = settings[0].new_empty(launch.rows // launch.kv_heads)
    line_evict_kernel[launch.grid](
        *(table, *settings, write_slots, line, scratch, launch.rows, launch.layers),
        **launch.constants,
        num_warps=EVICT_WARPS,
    )
    return write_slots, line, *scores_after, *after


def _dtype_name(tensor: Tensor) -> str:
    """The type of a tensor as contracts call it."""
    return str(tensor.dtype).removeprefix("torch.")
