"""The operations of windows: the eager references and the ONNX functions mean the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import FunctionProto, helper

from linert.exporter.onnx_export import operation_body
from linert.graphs.line_attention import OPSET
from linert.graphs.line_window_attention import function_proto, reference
from linert.graphs.spatial_decay import DecayState
from linert.graphs.spatial_decay_window import function_proto as decay_proto
from linert.graphs.spatial_decay_window import reference as decay_reference
from linert.runtime.plugins.contracts import (
    DOMAIN,
    LINE_WINDOW_ATTENTION,
    SPATIAL_DECAY_WINDOW,
)

pytest.importorskip("triton")

from tests.exporter.test_line_window_kernels import attention_inputs, commit_inputs, commit_stage
from tests.exporter.test_spatial_decay_kernels import window_inputs_of


def check(
    function: FunctionProto,
    inputs: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    atol: float,
    **attributes: int,
) -> None:
    """One node of the operation, done by ONNX Runtime through its body, makes what is ``wanted``."""
    assert all(node.domain == "" for node in function.node)
    node = helper.make_node(function.name, list(inputs), list(wanted), domain=DOMAIN, **attributes)
    values, results = (
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype), tensor.shape
            )
            for name, tensor in tensors.items()
        ]
        for tensors in (inputs, wanted)
    )
    graph = helper.make_graph([node], "window", values, results)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString())
    made = session.run(list(wanted), {name: tensor.numpy() for name, tensor in inputs.items()})
    for (name, theirs), ours in zip(wanted.items(), made, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_attention_of_a_window(width: int, group: int, dtype: torch.dtype) -> None:
    inputs = attention_inputs(4, group, width, 33, 16, dtype)
    inputs = type(inputs)(*(part.nan_to_num() for part in inputs))
    function = function_proto(group, width, dtype)
    named = dict(zip(LINE_WINDOW_ATTENTION.inputs, inputs, strict=True))
    wanted = dict(zip(LINE_WINDOW_ATTENTION.outputs, reference(inputs), strict=True))
    check(function, named, wanted, 2e-6 if dtype is torch.float32 else 2e-3)


def test_nothing_is_received_by_what_is_not_seen() -> None:
    inputs = attention_inputs(4, 2, 3, 33, 16, torch.float32)
    received = reference(type(inputs)(*(part.nan_to_num() for part in inputs))).received
    assert (received[inputs.bias[:, 0] < 0] == 0).all()
    torch.testing.assert_close(received.sum(2), torch.ones(4, 3))


@pytest.mark.parametrize("score_max", [False, True])
@pytest.mark.parametrize("capacities", [(9, 9, 30), (30,)])
def test_what_a_window_commits(capacities: tuple[int, ...], score_max: bool) -> None:
    stage = commit_stage(capacities, 4, torch.float32)
    layers, shared = commit_inputs(stage, score_max=score_max)
    inputs = [*itertools.chain.from_iterable(layers), *shared]
    names = [[spec.name for spec in specs] for specs in (stage.inputs, stage.outputs)]
    given, wanted = (
        dict(zip(names_of, tensors, strict=True))
        for names_of, tensors in zip(names, (inputs, stage(*inputs)), strict=True)
    )
    assert stage.operation is not None
    check(operation_body(stage), given, wanted, 1e-6, **stage.operation.attributes)


@pytest.mark.parametrize("matrices", [1, 5])
def test_a_window_of_linear_attention(matrices: int) -> None:
    inputs = window_inputs_of(3, 4, 9, matrices, 20, 36, torch.float32)
    inputs = inputs._replace(state=DecayState(*(part.nan_to_num() for part in inputs.state)))
    named = dict(zip(SPATIAL_DECAY_WINDOW.inputs, inputs.flat(), strict=True))
    wanted = dict(zip(SPATIAL_DECAY_WINDOW.outputs, decay_reference(inputs), strict=True))
    check(decay_proto(matrices), named, wanted, 1e-4)
