"""Traced stages as operations of our own: a function body for whoever has no plugin, and the node that refers to it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import FunctionProto, helper

from linert.runtime.plugins import contracts


def body_of(model: onnx.ModelProto, operation: str) -> FunctionProto:
    """The graph of ``model`` as the function of ``operation``; its constants must lie in it."""
    graph = model.graph
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer
    ]
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    opsets = [entry for entry in model.opset_import if entry.domain == ""]
    return helper.make_function(
        contracts.DOMAIN, operation, inputs, outputs, [*constants, *graph.node], opsets
    )


def as_operation(model: onnx.ModelProto, operation: str, attributes: Mapping[str, int]) -> None:
    """Replace the graph of ``model`` by one node whose function body is what was traced, in place.

    Args:
        model: a whole stage; its constants lie in it.
        operation: the node's type.
        attributes: of the node, for the plugin; the body has their values built in.
    """
    graph = model.graph
    body = body_of(model, operation)
    node = helper.make_node(
        operation,
        list(body.input),
        list(body.output),
        name=f"{operation}_0",
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
