"""Joining and parting tensors of all layers, a bounded number of pieces a node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_PIECES = 32
"""Inputs of one Concat and outputs of one Split: ONNX Runtime's CUDA kernels take more only outside of CUDA graphs (MAX_NUM_PIECES of
its ``concat_impl.h`` and ``split_impl.h``)."""


def joined(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """:func:`torch.cat` in nodes of at most :data:`MOST_PIECES` inputs."""
    while len(pieces) > MOST_PIECES:
        starts = range(0, len(pieces), MOST_PIECES)
        pieces = [torch.cat(list(pieces[start : start + MOST_PIECES]), dim) for start in starts]
    return torch.cat(list(pieces), dim)


def parted(whole: Tensor, size: int) -> list[Tensor]:
    """:meth:`torch.Tensor.split` along the first axis into pieces of ``size``, in nodes of at most :data:`MOST_PIECES` outputs."""
    most = size * MOST_PIECES
    if len(whole) <= most:
        return list(whole.split(size))
    return [piece for part in whole.split(most) for piece in part.split(size)]
