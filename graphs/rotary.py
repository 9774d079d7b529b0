"""Rotary position embedding, in eager PyTorch and as one ONNX ``RotaryEmbedding`` node."""

from __future__ import annotations

import torch
from torch import Tensor


def axial_table(grid: int, prefix_len: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return LlamaGen's two-dimensional rotary table as ``(cos, sin)``.

    Both are ``[prefix_len + grid * grid, head_dim // 2]`` float32. The first half of a row turns with
    the token's raster row, the second half with its column. Prefix rows are **zero in both tables**, as
    in LlamaGen's ``precompute_freqs_cis_2d``: it zeroes the queries and keys of the condition.
    """
    quarter = head_dim // 4
    frequencies = 1.0 / base ** (torch.arange(quarter, dtype=torch.float32) * 2 / (head_dim // 2))
    angles = torch.outer(torch.arange(grid, dtype=torch.float32), frequencies)
    rows = angles[:, None, :].expand(grid, grid, quarter)
    columns = angles[None, :, :].expand(grid, grid, quarter)
    image = torch.cat([rows, columns], dim=-1).reshape(grid * grid, 2 * quarter)
    prefix = torch.zeros(prefix_len, 2 * quarter)
    return torch.cat([prefix, image.cos()]), torch.cat([prefix, image.sin()])


def sequence_table(positions: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return the usual one-dimensional rotary table as ``(cos, sin)``, ``[positions, head_dim // 2]`` float32 each."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate channel pairs ``(2k, 2k + 1)`` of every head of ``x``: ``(a cos - b sin, b cos + a sin)``.

    Args:
        x: ``[B, S, heads * D]``.
        cos: ``[B, S, D // 2]`` (or broadcastable over B), the angle of every pair. Need not be of unit
            length: a factor in both tables scales the result.
        sin: like ``cos``.
        heads: how many heads lie side by side in ``x``.

    Returns:
        ``[B, S, heads * D]`` of the dtype of ``x``.
    """
    if torch.compiler.is_exporting():
        return _node(x, cos, sin, heads, interleaved=True)
    a, b = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-3).type_as(x)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate channel pairs ``(k, k + D / 2)`` of every head; otherwise as :func:`rotate_interleaved`."""
    if torch.compiler.is_exporting():
        return _node(x, cos, sin, heads, interleaved=False)
    a, b = x.unflatten(-1, (heads, 2, -1)).unbind(-2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


def _node(x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, interleaved: bool) -> Tensor:
    batch = x.shape[0]
    return torch.onnx.ops.rotary_embedding(
        x,
        cos.expand(batch, -1, -1),
        sin.expand(batch, -1, -1),
        interleaved=interleaved,
        num_heads=heads,
    )
