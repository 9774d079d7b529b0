"""Take weights out of a graph before it is optimised, and put them back as external data, behind the nodes that dequantise them.

While a graph is rewritten its weights are inputs (:func:`lift_weights`); afterwards they are initializers that refer to
the weights file (:func:`store_weights`), transposed, joined and quantised as their readers and their precision ask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from linert.exporter.precision import Quantized, Range, Weight, join, pack_int4, round_to_nearest
from linert.exporter.weights_file import WeightsFile

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the ONNX file."""

COPY_BYTES = 64 << 20


def lift_weights(
    model: ir.Model, parameters: Collection[str], *, constants: bool = True
) -> dict[str, Tensor]:
    """Turn parameters, and constants too large to be inlined, into graph inputs; return what the constants hold.

    Args:
        parameters: their names in the graph.
        constants: False leaves constants in the graph, however large.
    """
    lifted: dict[str, Tensor] = {}
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            constant = value.const_value
            if not constants or constant is None or constant.nbytes <= INLINE_BYTES:
                continue
            lifted[name] = torch.from_numpy(constant.numpy())
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return lifted


def store_weights(
    model: ir.Model, lifted: Mapping[str, Weight | Tensor], weights: WeightsFile, stage: str
) -> None:
    """Make what was lifted initializers again, stored the way their readers want them and their precision says."""
    graph = model.graph
    _quantize_convolutions(graph, lifted, weights)
    joined = _join_weights(model, lifted)
    for value in [v for v in graph.inputs if v.name in lifted or v.name in joined]:
        graph.inputs.remove(value)
        name = value.name or ""
        pieces = joined.get(name) or [lifted[name]]
        users = [usage.node for usage in value.uses()]
        if not users:
            continue
        parts = [part for part in pieces if isinstance(part, Weight)]
        if not parts:
            # A constant of this stage; the names of parameters are the same in every stage.
            tensor = lifted[name]
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is no constant")
            _replace(value, _initializer(graph, weights, f"{stage}:{name}", tensor, tensor.dtype))
            continue
        transposed = all(_transposes(node) for node in users)
        if parts[0].precision.bits and transposed:
            _store_product(graph, weights, value, parts)
        elif parts[0].precision.bits and all(_looks_up_rows(node) for node in users):
            _store_table(graph, weights, value, parts)
        else:
            _store_float(graph, weights, value, parts, transposed=transposed)


def _quantize_convolutions(
    graph: ir.Graph, lifted: Mapping[str, Weight | Tensor], weights: WeightsFile
) -> None:
    """Put the convolutions for which there are integers between QuantizeLinear and DequantizeLinear, in and out."""
    for node in list(graph):
        weight = lifted.get(str(node.inputs[1].name)) if node.op_type == "Conv" and node.inputs[1] else None
        convolution = weight.settings.convolutions.get(weight.name) if isinstance(weight, Weight) else None
        if convolution is None or not isinstance(weight, Weight):
            continue
        name, result = f"image_decoder.{weight.name}", node.outputs[0]
        integers = _stored(
            graph,
            f"{name}.int8",
            weights,
            tuple(weight.tensor.shape),
            ir.DataType.INT8,
            lambda convolution=convolution: [convolution.weight.values],
        )
        # ONNX Runtime makes 32-bit integers of it on the CPU; elsewhere nothing widens those.
        bias = _initializer(graph, weights, f"{name}.bias", convolution.bias, torch.float32)
        scales = _initializer(graph, weights, f"{name}.scale", convolution.weight.scales, torch.float32)
        widened = ir.node("DequantizeLinear", [integers, scales], attributes={"axis": 0})
        graph.insert_before(node, widened)
        source = node.inputs[0]
        if source is None:
            raise RuntimeError(f"{node.name} has no input")
        rounded = _round_trip(graph, node, source, convolution.input, f"{name}.in", weights, before=True)
        for index, value in enumerate((rounded, widened.outputs[0], bias)):
            node.replace_input_with(index, value)
        readers = [(usage.node, usage.idx) for usage in result.uses()]
        after = _round_trip(graph, node, result, convolution.output, f"{name}.out", weights, before=False)
        for reader, index in readers:
            reader.replace_input_with(index, after)


def _round_trip(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    span: Range,
    name: str,
    weights: WeightsFile,
    *,
    before: bool,
) -> ir.Value:
    """``value`` rounded to 8 bits over ``span`` and widened again, by nodes before or after ``node``."""
    scale = _initializer(graph, weights, f"{name}.scale", torch.tensor(span.scale), torch.float32)
    zero = _initializer(graph, weights, f"{name}.zero", torch.tensor(span.zero), torch.uint8)
    narrow = ir.node("QuantizeLinear", [value, scale, zero])
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], scale, zero])
    if before:
        graph.insert_before(node, [narrow, wide])
    else:
        graph.insert_after(node, [narrow, wide])
    wide.outputs[0].shape, wide.outputs[0].type = value.shape, value.type
    return wide.outputs[0]


def _store_float(
    graph: ir.Graph, weights: WeightsFile, value: ir.Value, parts: Sequence[Weight], *, transposed: bool
) -> None:
    """A parameter in floats; matrices that are narrower than what the graph computes in are widened by a Cast.

    Of a table only the rows that were looked up are: a table that is widened as a whole is widened once and held so.
    """
    tensor = parts[0].tensor if len(parts) == 1 else torch.cat([part.tensor for part in parts])
    tensor, name = tensor.detach(), value.name or ""
    computed = tensor_adapters.to_torch_dtype(_dtype(value))
    dtype = parts[0].stored_as(computed)
    if transposed:
        tensor, name = tensor.t(), f"{name}.T"
        value = _through_transposes(graph, value)
    stored = _initializer(graph, weights, name, tensor, dtype)
    lookups = [usage.node for usage in value.uses()]
    if dtype is not computed and all(_looks_up_rows(node) for node in lookups):
        for lookup in lookups:
            narrow = ir.node("Gather", [stored, lookup.inputs[1]])
            wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": _dtype(value)})
            _replace_node(graph, lookup, [narrow, wide])
        return
    if dtype is not computed:
        cast = ir.node("Cast", [stored], attributes={"to": _dtype(value)})
        stored = _insert(graph, cast, value, f"{name}.wide")
    _replace(value, stored)


def _store_product(graph: ir.Graph, weights: WeightsFile, value: ir.Value, parts: Sequence[Weight]) -> None:
    """A product's weight ``[N, K]`` as integers ``[K, N]`` with scales and a DequantizeLinear."""
    name, dtype = value.name or "", _dtype(value)
    value = _through_transposes(graph, value)
    outputs, inputs = sum(len(part.tensor) for part in parts), parts[0].tensor.shape[1]
    # Quantised when the first stage that has it is written; the others find it in the file.
    quantized = functools.cache(lambda: join([part.quantized() for part in parts]))
    bits, size = parts[0].integer_format
    integers = _stored(
        graph,
        f"{name}.T.int{bits}",
        weights,
        (inputs, outputs),
        ir.DataType.INT4 if bits == 4 else ir.DataType.INT8,
        lambda: [_packed(quantized())],
    )
    scale = _stored(
        graph,
        f"{name}.scale",
        weights,
        (inputs // size, outputs) if size else (outputs,),
        dtype,
        lambda: [quantized().scales.t().to(tensor_adapters.to_torch_dtype(dtype))],
    )
    block = {"axis": 0, "block_size": size} if size else {"axis": 1}
    dequantize = ir.node("DequantizeLinear", [integers, scale], attributes=block)
    _replace(value, _insert(graph, dequantize, value, f"{name}.T"))


def _store_table(graph: ir.Graph, weights: WeightsFile, value: ir.Value, parts: Sequence[Weight]) -> None:
    """A table of rows ``[V, K]`` as int8 with a scale a row: rows are looked up as integers and widened afterwards."""
    name, dtype = value.name or "", tensor_adapters.to_torch_dtype(_dtype(value))
    rows, columns = sum(len(part.tensor) for part in parts), parts[0].tensor.shape[1]
    tables = functools.cache(lambda: join([round_to_nearest(part.tensor, 8) for part in parts]))
    integers = _stored(
        graph, f"{name}.int8", weights, (rows, columns), ir.DataType.INT8, lambda: [tables().values]
    )
    scales = _stored(
        graph,
        f"{name}.scale",
        weights,
        (rows, 1),
        _dtype(value),
        lambda: [tables().scales[:, None].to(dtype)],
    )
    one = _initializer(graph, weights, f"{name}.one", torch.ones(()), dtype)
    for usage in list(value.uses()):
        lookup = usage.node
        ids = lookup.inputs[1]
        nodes = [ir.node("Gather", [integers, ids]), ir.node("Gather", [scales, ids])]
        nodes.append(ir.node("DequantizeLinear", [nodes[0].outputs[0], one]))
        nodes.append(ir.node("Mul", [nodes[2].outputs[0], nodes[1].outputs[0]]))
        _replace_node(graph, lookup, nodes)


def _replace_node(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Let ``nodes`` do what ``node`` does; the last one's output takes its output's place."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    graph.insert_before(node, nodes)
    new.shape, new.type = old.shape, old.type
    # A stage may put out what it looked up.
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = old.name
    graph.remove(node, safe=True)


def _packed(quantized: Quantized) -> Tensor:
    """The bytes of ``values [N, K]`` stored as ``[K, N]``."""
    values = quantized.values.t().contiguous()
    return pack_int4(values) if quantized.bits == 4 else values


def _initializer(
    graph: ir.Graph, weights: WeightsFile, name: str, tensor: Tensor, dtype: torch.dtype
) -> ir.Value:
    """An initializer of ``tensor`` as ``dtype``: in the graph if it is small, else in the weights file."""
    if tensor.numel() * dtype.itemsize <= INLINE_BYTES:
        small = ir.tensor(tensor_adapters.TorchTensor(tensor.to(dtype).contiguous(), name=name))
        value = ir.Value(name=name, shape=small.shape, type=ir.TensorType(small.dtype), const_value=small)
        graph.register_initializer(value)
        return value
    rows = max(1, COPY_BYTES // max(1, tensor[:1].numel() * dtype.itemsize))
    return _stored(
        graph,
        name,
        weights,
        tuple(tensor.shape),
        tensor_adapters.from_torch_dtype(dtype),
        lambda: (block.to(dtype) for block in tensor.split(rows)),
    )


def _stored(
    graph: ir.Graph,
    name: str,
    weights: WeightsFile,
    shape: tuple[int, ...],
    dtype: ir.DataType,
    blocks: Callable[[], Iterable[Tensor]],
) -> ir.Value:
    """An initializer in the weights file."""
    stored = weights.store(name, shape, dtype, blocks)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=stored)
    graph.register_initializer(value)
    return value


def _insert(graph: ir.Graph, node: ir.Node, before_users_of: ir.Value, name: str) -> ir.Value:
    """Put ``node`` before the first reader of a value; return its output, called ``name``."""
    readers = {usage.node for usage in before_users_of.uses()}
    graph.insert_before(next(reader for reader in graph if reader in readers), node)
    node.outputs[0].name = name
    return node.outputs[0]


def _replace(value: ir.Value, by: ir.Value) -> None:
    by.shape, by.type = by.shape or value.shape, by.type or value.type
    value.replace_all_uses_with(by)


def _through_transposes(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Remove the transpositions that are all that reads ``value``; return a value that their readers read instead."""
    turned = ir.Value(name=value.name, type=value.type)
    for usage in list(value.uses()):
        usage.node.outputs[0].replace_all_uses_with(turned)
        graph.remove(usage.node, safe=True)
    return turned


def _dtype(value: ir.Value) -> ir.DataType:
    if value.type is None:
        raise RuntimeError(f"{value.name} has no type")
    return value.type.dtype


def _join_weights(model: ir.Model, lifted: Mapping[str, Weight | Tensor]) -> dict[str, list[Weight | Tensor]]:
    """Replace every Concat of nothing but parameters' rows by one graph input; return what it is made of."""
    joined: dict[str, list[Weight | Tensor]] = {}
    for node in list(model.graph):
        names = [value.name if value is not None else None for value in node.inputs]
        if node.op_type != "Concat" or not all(isinstance(lifted.get(str(name)), Weight) for name in names):
            continue
        if node.attributes["axis"].as_int() != 0:
            continue
        output = node.outputs[0]
        name = "+".join(str(name) for name in names)
        value = ir.Value(name=name, shape=output.shape, type=output.type)
        joined[name] = [lifted[str(name)] for name in names]
        output.replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        model.graph.inputs.append(value)
    return joined


def _looks_up_rows(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and not node.domain and (axis is None or axis.as_int() == 0)


def _transposes(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain:
        return False
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]
