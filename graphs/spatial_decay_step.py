"""SpatialDecayStep, one decode step of linear attention as one operation: write the token's key and value, then read the line in
progress, the prefix and all lines above.

Tensors, axes and their meaning are those of :data:`linert.runtime.plugins.contracts.SPATIAL_DECAY_STEP`. The operation has two bodies of
the same meaning, like :mod:`linert.graphs.line_attention`: :func:`reference` in PyTorch, and an ONNX model-local function of standard
operators (:func:`function_proto`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from onnx import FunctionProto
from torch import Tensor

from linert.graphs.line_attention import contract_node, function_of
from linert.graphs.spatial_decay import DecayState, attend
from linert.runtime.plugins.contracts import SPATIAL_DECAY_STEP


class StepInputs(NamedTuple):
    """What one token a row takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: DecayState
    write_slot: Tensor
    matrix: Tensor
    weighed: Tensor
    above_weighed: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """The tensors in the operation's order."""
        return (*self[:3], *self.state, *self[4:])


def reference(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Write a token and read what it sees, in eager PyTorch; in float32 whatever the inputs are. The state is not modified.

    Returns:
        ``[R, 1, 1, E]`` of the dtype of q, and ``k_line`` and ``v_line`` with the token.
    """
    q, k, v, state, write_slot, matrix, weighed, above_weighed = inputs
    rows = torch.arange(len(write_slot), device=write_slot.device)
    k_line, v_line = state.k_line.clone(), state.v_line.clone()
    k_line[rows, 0, write_slot] = k[:, 0, 0]
    v_line[rows, 0, write_slot] = v[:, 0, 0]
    in_row = attend(q.float(), k_line.float(), v_line.float(), weighed)
    above = above_weighed * (q.float() @ state.above[rows, matrix][:, None])
    return (in_row + above).to(q.dtype), k_line, v_line


def spatial_decay_step(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`reference`, or one opaque ``SpatialDecayStep`` node while a graph is being exported."""
    if not torch.compiler.is_exporting():
        return reference(inputs)
    attended, k_line, v_line = contract_node(SPATIAL_DECAY_STEP, inputs.flat())
    return attended, k_line, v_line


_BODY = """
  k_line_next = TensorScatter <axis = -2> (k_line, k, write_slot)
  v_line_next = TensorScatter <axis = -2> (v_line, v, write_slot)
  query = Cast <to = 1> (q)
  keys = Cast <to = 1> (k_line_next)
  values = Cast <to = 1> (v_line_next)
  turned = Transpose <perm = [0, 1, 3, 2]> (keys)
  products = MatMul (query, turned)
  shares = Mul (products, weighed)
  in_row = MatMul (shares, values)
  READ
  far = MatMul (query, one_above)
  far_weighed = Mul (far, above_weighed)
  both = Add (in_row, far_weighed)
  attended = CastLike (both, v)
"""


def function_proto(matrices: int) -> FunctionProto:
    """The body as an ONNX function of standard operators.

    Args:
        matrices: of a state. A single one need not be looked for.
    """
    found = "two = Constant <value_ints = [1, 2]> ()\n  at = Unsqueeze (matrix, two)\n"
    found += "  one_above = GatherND <batch_dims = 1> (above, at)"
    read = found if matrices > 1 else "one_above = Identity (above)"
    return function_of(SPATIAL_DECAY_STEP, _BODY.replace("READ", read))
