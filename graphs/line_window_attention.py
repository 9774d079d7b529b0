"""LineWindowAttention: attend with a window's queries over the line buffer and over the window itself, and write nothing.

Tensors, axes and their meaning are those of :data:`linert.runtime.plugins.contracts.LINE_WINDOW_ATTENTION`. The operation has two bodies
of the same meaning, like :mod:`linert.graphs.line_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx
import torch
from onnx import FunctionProto
from torch import Tensor

from linert.graphs.line_attention import contract_node, function_of
from linert.runtime.plugins.contracts import LINE_WINDOW_ATTENTION

HIDDEN = -1e30
"""Added to the logits of what a query does not see."""


class LineWindowAttentionInputs(NamedTuple):
    """What one call takes, in the operation's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    bias: Tensor


class Attended(NamedTuple):
    """What one call makes; the caches are those that it took."""

    attended: Tensor
    received: Tensor
    k_cache: Tensor
    v_cache: Tensor


def reference(inputs: LineWindowAttentionInputs) -> Attended:
    """Attend, in eager PyTorch. Softmax and what is received are float32 whatever q, k and v are."""
    q, k, v, k_cache, v_cache, bias = inputs
    group, width = q.shape[1:3]
    queries = q.flatten(1, 2)[:, None]
    logits = torch.cat([queries @ k_cache.mT, queries @ k.mT], dim=-1).float()
    probs = (logits.squeeze(1).unflatten(1, (group, width)) + bias).softmax(-1)
    weights = probs.type_as(q).flatten(1, 2)[:, None]
    of_buffer, of_window = weights.split([k_cache.shape[2], width], dim=-1)
    attended = of_buffer @ v_cache + of_window @ v
    received = probs.squeeze(1) if group == 1 else probs.mean(1)
    return Attended(attended.squeeze(1).unflatten(1, (group, width)), received, k_cache, v_cache)


def line_window_attention(inputs: LineWindowAttentionInputs) -> Attended:
    """:func:`reference`, or one opaque ``LineWindowAttention`` node while a graph is being exported."""
    if not torch.compiler.is_exporting():
        return reference(inputs)
    return Attended(*contract_node(LINE_WINDOW_ATTENTION, inputs))


_BODY = """
  QUERIES
  turned = Transpose <perm = [0, 1, 3, 2]> (k_cache)
  turned_window = Transpose <perm = [0, 1, 3, 2]> (k)
  of_slots = MatMul (queries, turned)
  of_positions = MatMul (queries, turned_window)
  LOGITS
  APART
  visible = Add (apart, bias)
  probs = Softmax <axis = -1> (visible)
  WEIGHTS
  slots = Shape <start = 2, end = 3> (k_cache)
  positions = Shape <start = 2, end = 3> (k)
  sizes = Concat <axis = 0> (slots, positions)
  of_buffer, of_window = Split <axis = -1> (weights, sizes)
  from_buffer = MatMul (of_buffer, v_cache)
  from_window = MatMul (of_window, v)
  both = Add (from_buffer, from_window)
  ATTENDED
  RECEIVED
  k_cache_read = Identity (k_cache)
  v_cache_read = Identity (v_cache)
"""


def function_proto(query_group: int, width: int, dtype: torch.dtype) -> FunctionProto:
    """The body as an ONNX function of standard operators.

    Args:
        query_group: query heads of a KV head. They are laid behind each other, so that a product takes all of them; a single one needs
            no arithmetic.
        width: positions of the window.
        dtype: of queries, keys and values. Halves are widened for the softmax and for what is received.
    """
    single, narrow = query_group == 1, dtype is not torch.float32
    joined = "Concat <axis = -1> (of_slots, of_positions)"
    apart = f"Constant <value_ints = [0, {query_group}, {width}, -1]> ()"
    laid_behind = f"Constant <value_ints = [0, 1, {query_group * width}, -1]> ()"
    filled = {
        "QUERIES": "queries = Identity (q)"
        if single
        else f"behind = {laid_behind}\n  queries = Reshape (q, behind)\n  heads = {apart}",
        "LOGITS": f"narrow_logits = {joined}\n  logits = Cast <to = {onnx.TensorProto.FLOAT}> (narrow_logits)"
        if narrow
        else f"logits = {joined}",
        "APART": "apart = Identity (logits)" if single else "apart = Reshape (logits, heads)",
        "WEIGHTS": "given = CastLike (probs, q)\n  " if narrow else "given = Identity (probs)\n  ",
        "ATTENDED": "attended = Identity (both)" if single else "attended = Reshape (both, heads)",
        "RECEIVED": "one = Constant <value_ints = [1]> ()\n  received = "
        + ("Squeeze (probs, one)" if single else "ReduceMean <keepdims = 0> (probs, one)"),
    }
    filled["WEIGHTS"] += "weights = Identity (given)" if single else "weights = Reshape (given, behind)"
    body = _BODY
    for mark, text in filled.items():
        body = body.replace(mark, text)
    return function_of(LINE_WINDOW_ATTENTION, body)
