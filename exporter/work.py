"""Count the bytes that a run of an ONNX graph reads and its multiply-accumulates, for ``bench`` and ``inspect``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from linert.runtime.bundles.manifest import Work
from linert.runtime.plugins.contracts import (
    LINE_ATTENTION,
    LINE_WINDOW_ATTENTION,
    SPATIAL_DECAY_STEP,
    SPATIAL_DECAY_WINDOW,
)

BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4}


def work_of(model: onnx.ModelProto, state: Collection[str]) -> Work:
    """Bytes of weights and of state that one run of ``model`` reads, and its multiply-accumulates in products and convolutions.

    Of a table only the rows looked up count, and of a matrix a column only those of the positions fed.

    Args:
        state: names of the inputs that are state.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes |= {name: list(tensor.dims) for name, tensor in weights.items()}
    read: Counter[str] = Counter()
    macs = 0
    state_bytes = {
        value.name: math.prod(shapes[value.name])
        * helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in graph.input
        if value.name in state
    }
    for node in graph.node:
        out = shapes.get(node.output[0], [])
        for name in {name for name in node.input if name in weights}:
            looked_up = node.op_type == "Gather" and name == node.input[0]
            elements = math.prod(out) if looked_up else math.prod(weights[name].dims)
            read[name] = max(read[name], elements)
        if node.op_type == "MatMul":
            macs += math.prod(out) * shapes[node.input[0]][-1]
        elif node.op_type == "Conv":
            macs += math.prod(out) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == LINE_ATTENTION.name:
            size = LINE_ATTENTION.sizes([shapes[name] for name in node.input])
            macs += 2 * size["R"] * size["G"] * size["D"] * size["C"]
        elif node.op_type == LINE_WINDOW_ATTENTION.name:
            size = LINE_WINDOW_ATTENTION.sizes([shapes[name] for name in node.input])
            macs += 2 * size["R"] * size["G"] * size["T"] * size["D"] * size["S"]
        elif node.op_type == SPATIAL_DECAY_STEP.name:
            size = SPATIAL_DECAY_STEP.sizes([shapes[name] for name in node.input])
            macs += size["R"] * (size["C"] * (size["D"] + size["E"]) + size["D"] * size["E"])
            state_bytes[node.input[list(SPATIAL_DECAY_STEP.inputs).index("above")]] //= size["M"]
        elif node.op_type == SPATIAL_DECAY_WINDOW.name:
            size = SPATIAL_DECAY_WINDOW.sizes([shapes[name] for name in node.input])
            macs += size["R"] * size["T"] * (size["C"] * (size["D"] + size["E"]) + size["D"] * size["E"])
            above = node.input[list(SPATIAL_DECAY_WINDOW.inputs).index("above")]
            state_bytes[above] = state_bytes[above] * min(size["T"], size["M"]) // size["M"]
    weight_bytes = sum(_bytes(weights[name], elements) for name, elements in read.items())
    return Work(weight_bytes, sum(state_bytes.values()), macs)


def _bytes(tensor: onnx.TensorProto, elements: int) -> int:
    bits = BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return elements * bits // 8
