"""Rewrite a traced line end into one ``linert::LineEvict`` node whose function body is what was traced."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from linert.runtime.plugins import contracts


def as_operation(model: onnx.ModelProto, attributes: Mapping[str, int]) -> None:
    """Replace the graph of ``model`` by one node, in place.

    Args:
        model: a line end; its constants lie in it.
        attributes: of the node, for the plugin; the body has their values built in.
    """
    graph = model.graph
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer
    ]
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    body = helper.make_function(
        contracts.DOMAIN,
        contracts.LINE_EVICT,
        inputs,
        outputs,
        [*constants, *graph.node],
        [entry for entry in model.opset_import if entry.domain == ""],
    )
    node = helper.make_node(
        contracts.LINE_EVICT,
        inputs,
        outputs,
        name=f"{contracts.LINE_EVICT}_0",
        domain=contracts.DOMAIN,
        plugin_namespace=contracts.DOMAIN,
        plugin_version=str(contracts.VERSION),
        **attributes,
    )
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.append(node)
    model.functions.append(body)
    if all(entry.domain != contracts.DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(contracts.DOMAIN, contracts.VERSION))
