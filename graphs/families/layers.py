"""Layers that several families have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rope(NamedTuple):
    """Rotary tables of a run of positions, ``[B or 1, S, D // 2]`` each; the query's hold the softmax scale."""

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def rope_tables(cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """One table ``[positions, 2 D]`` of what :class:`Rope` holds, from ``cos`` and ``sin`` ``[positions, D // 2]``."""
    scale = head_dim**-0.5
    return torch.cat(Rope(cos * scale, sin * scale, cos, sin), dim=-1)


def products(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of ``layers``, without biases, makes of ``x``; in a graph, one product, whose weights the exporter joins on disk."""
    if not torch.compiler.is_exporting():
        return tuple(layer(x) for layer in layers)
    joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return joined.split([layer.out_features for layer in layers], dim=-1)


def swiglu(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """``down(silu(gate x) * up x)``."""
    gated, raised = products(x, (gate, up))
    return down(F.silu(gated) * raised)


class RMSNorm(nn.Module):
    """Root-mean-square norm: normalised in float32, cast back, then weighted."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight
