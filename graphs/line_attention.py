"""LineAttention: write a token into its slots, attend over the line buffer, account for the attention.

Tensors, axes and their meaning are those of :data:`linert.runtime.plugins.contracts.LINE_ATTENTION`. The operation has two bodies of the
same meaning: :func:`reference` in PyTorch, and an ONNX model-local function of standard opset-24 operators (:func:`function_proto`). A
traced graph holds one ``linert::LineAttention`` node a layer, carrying the attributes by which TensorRT finds a plugin of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx
import torch
from onnx import FunctionProto, helper
from torch import Tensor

from linert.graphs.stage import OwnOperation
from linert.runtime.plugins.contracts import DOMAIN, FLOAT_TYPE, LINE_ATTENTION, VERSION, Contract

OPSET = 24


class ScoreParams(NamedTuple):
    """How a step accounts for attention."""

    fresh_from: Tensor
    score_max: Tensor


class LineBufferState(NamedTuple):
    """A layer's line buffer."""

    k_cache: Tensor
    v_cache: Tensor
    scores: Tensor
    slot_pos: Tensor


class LineAttentionInputs(NamedTuple):
    """What one call takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: LineBufferState
    write_slot: Tensor
    position: Tensor
    accounting: ScoreParams

    def flat(self) -> tuple[Tensor, ...]:
        """The tensors in the operation's order."""
        return (self.q, self.k, self.v, *self.state, self.write_slot, self.position, *self.accounting)


def reference(inputs: LineAttentionInputs) -> tuple[Tensor, LineBufferState]:
    """Attend one new token a row, in eager PyTorch. Softmax and scores are float32 whatever q, k and v are.

    The state is not modified.

    Returns:
        The attention output ``[R, 1, G, D]`` and the buffer with the token written. A slot that is empty
        afterwards receives nothing.
    """
    q, k, v, state, write_slot, position, accounting = inputs
    rows = torch.arange(len(write_slot), device=q.device)
    k_cache, v_cache, slot_pos = (t.clone() for t in (state.k_cache, state.v_cache, state.slot_pos))
    k_cache[rows, 0, write_slot] = k[:, 0, 0]
    v_cache[rows, 0, write_slot] = v[:, 0, 0]
    slot_pos[rows, write_slot] = position[:, 0]
    logits = (q @ k_cache.mT).float().masked_fill((slot_pos < 0)[:, None, None], float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    scores = accumulate(state.scores, probs.mean(dim=(1, 2)), slot_pos, accounting)
    return probs.type_as(q) @ v_cache, LineBufferState(k_cache, v_cache, scores, slot_pos)


def accumulate(scores: Tensor, received: Tensor, slot_pos: Tensor, accounting: ScoreParams) -> Tensor:
    """``scores [R, C]`` after a query that gave each slot the attention ``received [R, C]``."""
    kept = scores.masked_fill(slot_pos >= accounting.fresh_from, 0.0)
    return torch.where(accounting.score_max, torch.maximum(kept, received), kept + received)


def line_attention(inputs: LineAttentionInputs) -> tuple[Tensor, LineBufferState]:
    """:func:`reference`, or one opaque ``LineAttention`` node while a graph is being exported."""
    if not torch.compiler.is_exporting():
        return reference(inputs)
    attended, *written = contract_node(LINE_ATTENTION, inputs.flat())
    return attended, LineBufferState(*written)


def contract_node(contract: Contract, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """One node of an operation in a graph that is being traced, with the outputs that its contract says."""
    sizes = contract.sizes([tensor.shape for tensor in inputs])
    kinds = [
        (
            inputs[0].dtype if operand.dtype == FLOAT_TYPE else getattr(torch, operand.dtype),
            operand.shape(sizes),
        )
        for operand in contract.outputs.values()
    ]
    return opaque_node(OwnOperation(contract.name, {}), inputs, kinds)


def opaque_node(
    operation: OwnOperation,
    inputs: Sequence[Tensor],
    kinds: Sequence[tuple[torch.dtype, Sequence[int]]],
) -> Sequence[Tensor]:
    """One node of an own operation in a graph that is being traced; ``kinds`` are the types and shapes of its outputs."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{operation.name}",
        inputs,
        attrs={
            "plugin_namespace": DOMAIN,
            "plugin_version": str(VERSION),
            **operation.attributes,
        },
        dtypes=[dtype for dtype, _ in kinds],
        shapes=[shape for _, shape in kinds],
        version=VERSION,
    )


def function_of(contract: Contract, body: str) -> FunctionProto:
    """The ONNX function of an operation: the ``body``'s lines between the contract's inputs and outputs."""
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{contract.name}'
    return onnx.parser.parse_function(
        f"{head} ({', '.join(contract.inputs)}) => ({', '.join(contract.outputs)}) {{{body}}}"
    )


def scatter_rows(cache: Tensor, place: Tensor, rows: Tensor) -> Tensor:
    """``cache [R, 1, C, D]`` with ``rows [n, D]`` at ``place [n, 3]`` int64, in a graph by one ScatterND node.

    PyTorch's own form of it is traced to eight.
    """
    if not torch.compiler.is_exporting():
        return cache.index_put(tuple(place.unbind(-1)), rows)
    return torch.onnx.ops.symbolic(
        "ScatterND", (cache, place, rows), dtype=cache.dtype, shape=cache.shape, version=OPSET
    )


_BODY = """
  k_cache_next = TensorScatter <axis = -2> (k_cache, k, write_slot)
  v_cache_next = TensorScatter <axis = -2> (v_cache, v, write_slot)
  one = Constant <value_ints = [1]> ()
  heads_and_queries = Constant <value_ints = [1, 2]> ()
  nothing = Constant <value = int32 {0}> ()
  zero = Constant <value = float {0.0}> ()
  hidden = Constant <value = float {-inf}> ()
  write_index = Unsqueeze (write_slot, one)
  slot_pos_next = ScatterElements <axis = 1> (slot_pos, write_index, position)
  empty = Less (slot_pos_next, nothing)
  empty_keys = Unsqueeze (empty, heads_and_queries)
  keys = Transpose <perm = [0, 1, 3, 2]> (k_cache_next)
  LOGITS
  visible_logits = Where (empty_keys, hidden, logits)
  probs = Softmax <axis = -1> (visible_logits)
  ATTENDED
  received = RECEIVED (probs, heads_and_queries)
  fresh = GreaterOrEqual (slot_pos_next, fresh_from)
  kept = Where (fresh, zero, scores)
  total = Add (kept, received)
  largest = Max (kept, received)
  scores_next = Where (score_max, largest, total)
"""


def function_proto(query_group: int, dtype: torch.dtype) -> FunctionProto:
    """The body as an ONNX function of standard operators.

    Args:
        query_group: query heads of a KV head. Their attention is averaged; a single one needs no arithmetic.
        dtype: of queries, keys and values. Halves are widened for the softmax and the scores.
    """
    single = dtype is torch.float32
    filled = {
        "RECEIVED": "Squeeze" if query_group == 1 else "ReduceMean <keepdims = 0>",
        "LOGITS": "logits = MatMul (q, keys)"
        if single
        else f"narrow_logits = MatMul (q, keys)\n  logits = Cast <to = {onnx.TensorProto.FLOAT}> (narrow_logits)",
        "ATTENDED": "attended = MatMul (probs, v_cache_next)"
        if single
        else "narrow_probs = CastLike (probs, q)\n  attended = MatMul (narrow_probs, v_cache_next)",
    }
    body = _BODY.replace("float {-inf}", "float {0.0}")
    for mark, text in filled.items():
        body = body.replace(mark, text)
    function = function_of(LINE_ATTENTION, body)
    for node in function.node:
        if node.output[0] == "hidden":
            node.attribute[0].t.CopyFrom(
                helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [], [float("-inf")])
            )
    return function
