"""LineAttention: the eager reference and the ONNX function mean the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from linert.graphs.line_attention import (
    OPSET,
    LineAttentionInputs,
    LineBufferState,
    ScoreParams,
    function_proto,
    reference,
)
from linert.runtime.plugins.contracts import DOMAIN, LINE_ATTENTION

Inputs = dict[str, torch.Tensor]
BUFFER = ("k_cache", "v_cache", "scores", "slot_pos")
NAMES = tuple(LINE_ATTENTION.inputs)
OUTPUTS = tuple(LINE_ATTENTION.outputs)


def random_inputs(rows: int, group: int, slots: int, head_dim: int, seed: int = 0) -> Inputs:
    """A half-filled buffer: about a third of the slots are empty, every row writes elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    slot_pos = torch.stack([torch.randperm(slots, generator=generator) for _ in range(rows)])
    empty = torch.rand(rows, slots, generator=generator) < 0.3
    return {
        "q": normal(rows, 1, group, head_dim) * head_dim**-0.5,
        "k": normal(rows, 1, 1, head_dim),
        "v": normal(rows, 1, 1, head_dim),
        "k_cache": normal(rows, 1, slots, head_dim),
        "v_cache": normal(rows, 1, slots, head_dim),
        "scores": normal(rows, slots).abs(),
        "slot_pos": slot_pos.masked_fill(empty, -1).to(torch.int32),
        "write_slot": torch.randint(slots, (rows,), generator=generator),
        "position": torch.full((rows, 1), slots + 7, dtype=torch.int32),
        "fresh_from": torch.full((rows, 1), slots + 7, dtype=torch.int32),
        "score_max": torch.tensor(False),
    }


def bundled(inputs: Inputs) -> LineAttentionInputs:
    return LineAttentionInputs(
        *(inputs[name] for name in ("q", "k", "v")),
        LineBufferState(*(inputs[name] for name in BUFFER)),
        inputs["write_slot"],
        inputs["position"],
        ScoreParams(inputs["fresh_from"], inputs["score_max"]),
    )


def run_reference(inputs: Inputs) -> dict[str, torch.Tensor]:
    attended, after = reference(bundled(inputs))
    return dict(zip(OUTPUTS, (attended, *after), strict=True))


def function_model(inputs: Inputs) -> onnx.ModelProto:
    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32, torch.int64: TensorProto.INT64}
    kinds[torch.bool] = TensorProto.BOOL
    node = helper.make_node(
        LINE_ATTENTION.name, NAMES, OUTPUTS, domain=DOMAIN, plugin_namespace=DOMAIN, plugin_version="1"
    )
    results = run_reference(inputs)
    graph = helper.make_graph(
        [node],
        "line_attention",
        [helper.make_tensor_value_info(n, kinds[t.dtype], t.shape) for n, t in inputs.items()],
        [helper.make_tensor_value_info(n, kinds[t.dtype], t.shape) for n, t in results.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [function_proto(inputs["q"].shape[2], inputs["q"].dtype)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)


@pytest.mark.parametrize("head_dim", [8, 64, 100, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("slots", [5, 97])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("score_max", [False, True])
def test_function_body_equals_the_reference(
    head_dim: int, group: int, slots: int, restart: bool, score_max: bool
) -> None:
    inputs = random_inputs(6, group, slots, head_dim)
    inputs["score_max"] = torch.tensor(score_max)
    if restart:
        inputs["fresh_from"] = torch.full_like(inputs["position"], -1)
    model = function_model(inputs)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString())
    results = session.run(OUTPUTS, {name: tensor.numpy() for name, tensor in inputs.items()})
    for (name, wanted), array in zip(run_reference(inputs).items(), results, strict=True):
        exact = name not in ("attended", "scores_next")
        np.testing.assert_allclose(array, wanted.numpy(), atol=0 if exact else 2e-6, rtol=0, err_msg=name)


def test_scores_gain_one_a_row_and_empty_slots_gain_nothing() -> None:
    inputs = random_inputs(4, 2, 33, 16)
    after = run_reference(inputs)
    empty = after["slot_pos_next"] < 0
    assert (after["scores_next"][empty] == inputs["scores"][empty]).all()
    written = after["slot_pos_next"] == inputs["position"]
    kept = inputs["scores"].masked_fill(written, 0.0)
    torch.testing.assert_close((after["scores_next"] - kept).sum(1), torch.ones(4), atol=1e-5, rtol=0)


def test_a_score_can_be_the_largest_attention_received() -> None:
    inputs = random_inputs(4, 2, 33, 16)
    summed = run_reference(inputs)["scores_next"]
    largest = run_reference({**inputs, "score_max": torch.tensor(True)})["scores_next"]
    received = run_reference({**inputs, "scores": torch.zeros(4, 33)})["scores_next"]
    written = run_reference(inputs)["slot_pos_next"] == inputs["position"]
    kept = inputs["scores"].masked_fill(written, 0.0)
    torch.testing.assert_close(summed, kept + received)
    assert torch.equal(largest, torch.maximum(kept, received))


def test_scores_can_start_again() -> None:
    inputs = random_inputs(4, 2, 33, 16)
    inputs["fresh_from"] = torch.full_like(inputs["position"], -1)
    after = run_reference(inputs)["scores_next"]
    torch.testing.assert_close(after.sum(1), torch.ones(4), atol=1e-5, rtol=0)


def test_what_an_empty_slot_holds_does_not_matter() -> None:
    inputs = random_inputs(4, 1, 33, 16)
    after = run_reference(inputs)
    poisoned = dict(inputs)
    empty = (after["slot_pos_next"] < 0)[:, None, :, None]
    poisoned["k_cache"] = inputs["k_cache"].masked_fill(empty, 1e30)
    poisoned["v_cache"] = inputs["v_cache"].masked_fill(empty, 1e30)
    assert torch.equal(run_reference(poisoned)["attended"], after["attended"])


def test_the_order_of_slots_has_no_meaning() -> None:
    inputs = random_inputs(3, 1, 21, 8)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    moved = dict(inputs)
    for name in ("k_cache", "v_cache"):
        moved[name] = inputs[name][:, :, order]
    for name in ("scores", "slot_pos"):
        moved[name] = inputs[name][:, order]
    moved["write_slot"] = order.argsort()[inputs["write_slot"]]
    one, other = run_reference(inputs), run_reference(moved)
    torch.testing.assert_close(one["attended"], other["attended"], atol=1e-6, rtol=0)
    torch.testing.assert_close(one["scores_next"][:, order], other["scores_next"], atol=1e-6, rtol=0)
