"""Launch the plugins' kernels on PyTorch tensors: compiled on a CUDA device, interpreted on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.tensorrt import line_attention_kernels as kernels
from graphs.line_attention import LineBufferState, ScoreParams
from runtime.line_attention_launch import WARPS, LineAttentionLaunch


def line_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LineBufferState,
    write_slot: Tensor,
    position: Tensor,
    accounting: ScoreParams,
    launch: LineAttentionLaunch | None = None,
) -> Tensor:
    """What :func:`graphs.line_attention.reference` does, in place: returns what was attended, ``[R, 1, G, D]``.

    Needs ``TRITON_INTERPRET=1`` set before the first import of triton where the tensors are on the CPU.

    Args:
        launch: other parts or blocks than the shape's own.

    Raises:
        ValueError: a shape or type that the kernels do not know.
    """
    rows, _, group, head_dim = q.shape
    slots = state.scores.shape[1]
    launch = launch or LineAttentionLaunch(
        rows, group, slots, head_dim, str(state.k_cache.dtype).removeprefix("torch.")
    )
    check(q, k, v, state, write_slot, position, accounting, launch)
    attended = torch.empty_like(q)
    logits = q.new_empty(launch.logits_floats, dtype=torch.float32)
    partial = q.new_empty(max(1, launch.partial_floats), dtype=torch.float32)
    kernels.attend[launch.attend_grid](
        *(q, k, v, *state, write_slot, position, *accounting, attended, logits, partial),
        *(launch.slots, launch.part_slots),
        **launch.constants("attend"),
        num_warps=WARPS,
    )
    if launch.split:
        kernels.combine[launch.combine_grid](
            *(state.scores, state.slot_pos, *accounting, attended, logits, partial),
            *(launch.slots, launch.parts),
            **launch.constants("combine"),
            num_warps=WARPS,
        )
    return attended


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LineBufferState,
    write_slot: Tensor,
    position: Tensor,
    accounting: ScoreParams,
    launch: LineAttentionLaunch,
) -> None:
    """Compare every tensor with what ``launch`` says.

    Raises:
        ValueError: a tensor of another shape or dtype, or one that is not contiguous.
    """
    rows, slots, head = launch.rows, launch.slots, launch.head_dim
    dtype = getattr(torch, launch.dtype)
    wanted = {
        "q": (q, (rows, 1, launch.group, head), dtype),
        "k": (k, (rows, 1, 1, head), dtype),
        "v": (v, (rows, 1, 1, head), dtype),
        "k_cache": (state.k_cache, (rows, 1, slots, head), dtype),
        "v_cache": (state.v_cache, (rows, 1, slots, head), dtype),
        "scores": (state.scores, (rows, slots), torch.float32),
        "slot_pos": (state.slot_pos, (rows, slots), torch.int32),
        "write_slot": (write_slot, (rows,), torch.int64),
        "position": (position, (rows, 1), torch.int32),
        "fresh_from": (accounting.fresh_from, (rows, 1), torch.int32),
        "score_max": (accounting.score_max, (), torch.bool),
    }
    for name, (tensor, shape, kind) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype is not kind:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; LineAttention wants {kind} {shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
