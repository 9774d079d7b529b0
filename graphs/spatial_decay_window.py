"""SpatialDecayWindow, a window of linear attention as one operation: write its keys and values, then read with every query.

Tensors, axes and their meaning are those of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_WINDOW`. The operation has two bodies
of the same meaning, like :mod:`linert.graphs.line_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from onnx import FunctionProto
from torch import Tensor

from linert.graphs.line_attention import contract_node, function_of
from linert.graphs.spatial_decay import DecayState, attend
from linert.runtime.plugins.contracts import SPATIAL_DECAY_WINDOW


class WindowInputs(NamedTuple):
    """What a window of every row takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: DecayState
    place: Tensor
    matrix: Tensor
    weighed: Tensor
    above_weighed: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """The tensors in the operation's order."""
        return (*self[:3], *self.state, *self[4:])


def reference(inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Write a window and read what it sees, in eager PyTorch; in float32 whatever the inputs are. The state is not modified.

    Returns:
        ``[R, 1, T, E]`` of the dtype of q, and ``k_line`` and ``v_line`` with the window.
    """
    q, k, v, state, place, matrix, weighed, above_weighed = inputs
    at = tuple(place.flatten(0, 1).unbind(-1))
    k_line = state.k_line.index_put(at, k.flatten(0, 1))
    v_line = state.v_line.index_put(at, v.flatten(0, 1))
    query = q.float()
    in_row = attend(query, k_line.float(), v_line.float(), weighed)
    found = state.above[torch.arange(len(matrix))[:, None], matrix]
    above = (query.squeeze(1)[:, :, None] @ found).squeeze(2)[:, None]
    return (in_row + above_weighed * above).to(q.dtype), k_line, v_line


def spatial_decay_window(inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`reference`, or one opaque ``SpatialDecayWindow`` node while a graph is being exported."""
    if not torch.compiler.is_exporting():
        return reference(inputs)
    attended, k_line, v_line = contract_node(SPATIAL_DECAY_WINDOW, inputs.flat())
    return attended, k_line, v_line


_BODY = """
  k_line_next = ScatterND (k_line, place, k)
  v_line_next = ScatterND (v_line, place, v)
  query = Cast <to = 1> (q)
  keys = Cast <to = 1> (k_line_next)
  values = Cast <to = 1> (v_line_next)
  turned = Transpose <perm = [0, 1, 3, 2]> (keys)
  products = MatMul (query, turned)
  shares = Mul (products, weighed)
  in_row = MatMul (shares, values)
  READ
  far_weighed = Mul (far, above_weighed)
  both = Add (in_row, far_weighed)
  attended = CastLike (both, v)
"""

_ONE_A_COLUMN = """two = Constant <value_ints = [2]> ()
  at = Unsqueeze (matrix, two)
  found = GatherND <batch_dims = 1> (above, at)
  apart = Transpose <perm = [0, 2, 1, 3]> (query)
  far_apart = MatMul (apart, found)
  far = Transpose <perm = [0, 2, 1, 3]> (far_apart)"""


def function_proto(matrices: int) -> FunctionProto:
    """The body as an ONNX function of standard operators.

    Args:
        matrices: of a state. A single one need not be looked for.
    """
    read = _ONE_A_COLUMN if matrices > 1 else "far = MatMul (query, above)"
    return function_of(SPATIAL_DECAY_WINDOW, _BODY.replace("READ", read))
