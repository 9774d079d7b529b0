"""Trace a stage into a static-shape ONNX model whose weights lie in one shared file.

Weights never pass through the tracer or the graph optimiser: they are graph inputs while the graph is
rewritten, and are streamed from the (memory-mapped) checkpoint into the weights file afterwards. So an export
holds no second copy of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor

from graphs import line_attention
from graphs.stages import Stage

PRODUCER = "linert"
WEIGHT_ALIGNMENT = 4096
"""Offsets in the weights file are multiples of a page, so that a runtime can map them."""

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the ONNX file."""

FOLD_ELEMENTS = 1024
"""Constant folding stops here, so that no state-sized constant is baked into a graph."""

COPY_BYTES = 64 << 20


class WeightsFile:
    """Appends tensors to the shared weights file; the same tensor is stored once.

    Use as a context manager; ``digest`` is the sha256 of what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._offset = 0
        self._stored: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> WeightsFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def nbytes(self) -> int:
        return self._offset

    def store(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        """Write ``tensor`` (any strides; halves become float32) unless ``name`` is stored already.

        Returns:
            A reference to where it lies.

        Raises:
            OSError: the file cannot be written.
            ValueError: ``name`` is stored with another shape.
        """
        known = self._stored.get(name)
        if known is not None:
            if tuple(known.shape.numpy()) != tuple(tensor.shape):
                raise ValueError(f"{name}: stored as {known.shape}, wanted as {tuple(tensor.shape)}")
            return known
        self._write(b"\0" * (-self._offset % WEIGHT_ALIGNMENT))
        offset = self._offset
        rows = max(1, COPY_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
        for block in tensor.split(rows):
            self._write(_deployed(block).contiguous().view(torch.uint8).numpy().data)
        reference = ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=self._offset - offset,
            dtype=ir.DataType.from_numpy(_deployed(tensor[:0]).numpy().dtype),
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=self.path.parent,
        )
        self._stored[name] = reference
        return reference

    def _write(self, data: bytes | memoryview) -> None:
        if self._file is None:
            raise ValueError("the weights file is not open")
        self._file.write(data)
        self._hash.update(data)
        self._offset += memoryview(data).nbytes


def export_stage(stage: Stage, weights: WeightsFile, tensors: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Return ``stage`` as an opset-24 model that refers to ``weights``.

    Args:
        stage: its parameters need shapes only; what they hold is not read.
        weights: where everything large goes.
        tensors: what the parameters hold, by their name in ``stage``.

    Raises:
        RuntimeError: the tracer failed, or an input that is updated in place has more than one reader.
    """
    model = _trace(stage)
    lifted = _lift_weights(model, tensors)
    with _quiet():
        onnxscript.optimizer.optimize(
            model,
            onnx_shape_inference=False,
            input_size_limit=FOLD_ELEMENTS,
            output_size_limit=FOLD_ELEMENTS,
        )
    _store_weights(model, lifted, weights, stage.name)
    model.graph.name = stage.name
    model.producer_name, model.producer_version = PRODUCER, None
    _tidy(model)
    proto = ir.to_proto(model)
    if any(node.domain == line_attention.DOMAIN for node in proto.graph.node):
        proto.functions.append(line_attention.function_proto(stage.geometry.query_group))
    _check_in_place(proto, stage)
    return proto


def _trace(stage: Stage) -> ir.Model:
    examples = tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in stage.inputs)
    with _quiet():
        program = torch.onnx.export(
            stage.eval(),
            examples,
            dynamo=True,
            optimize=False,
            opset_version=line_attention.OPSET,
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"tracing the {stage.name} stage gave no program")
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's and the optimiser's chatter about optional packages and deprecations."""
    loggers = {name: logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _lift_weights(model: ir.Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn parameters, and constants too large to be inlined, into graph inputs; return what they hold."""
    lifted: dict[str, Tensor] = {}
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name in tensors:
            lifted[name] = tensors[name]
        elif value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            lifted[name] = torch.from_numpy(value.const_value.numpy())
        else:
            continue
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return lifted


def _store_weights(model: ir.Model, lifted: Mapping[str, Tensor], weights: WeightsFile, stage: str) -> None:
    """Make what was lifted initializers again, stored the way their readers want them."""
    graph = model.graph
    joined = _join_weights(model, lifted)
    for value in [v for v in graph.inputs if v.name in lifted or v.name in joined]:
        graph.inputs.remove(value)
        name = value.name or ""
        tensor = joined[name]() if name in joined else lifted[name].detach()
        users = [usage.node for usage in value.uses()]
        if not users:
            continue
        # A name with a dot is a parameter's, the same in every stage; others are constants of this one.
        owner = "" if "." in name else f"{stage}:"
        if all(_transposes(node) for node in users):
            tensor, name = tensor.t(), f"{name}.T"
            stored = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=value.type)
            for node in users:
                node.outputs[0].replace_all_uses_with(stored)
                graph.remove(node, safe=True)
            value = stored
        if tensor.numel() * tensor.element_size() <= INLINE_BYTES:
            value.const_value = ir.tensor(_deployed(tensor).contiguous().numpy(), name=name)
        else:
            value.const_value = weights.store(owner + name, tensor)
        graph.register_initializer(value)


def _deployed(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the graph: floats in float32."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _join_weights(model: ir.Model, lifted: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Replace every Concat of nothing but weights by one graph input; return how to make what it holds."""
    joined: dict[str, Callable[[], Tensor]] = {}
    for node in list(model.graph):
        names = [value.name if value is not None else None for value in node.inputs]
        if node.op_type != "Concat" or not all(name in lifted for name in names):
            continue
        parts = [lifted[str(name)].detach() for name in names]
        axis = node.attributes["axis"].as_int()
        output = node.outputs[0]
        name = "+".join(str(name) for name in names)
        value = ir.Value(name=name, shape=output.shape, type=output.type)
        joined[name] = lambda parts=parts, axis=axis: torch.cat([_deployed(p) for p in parts], dim=axis)
        output.replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        model.graph.inputs.append(value)
    return joined


def _transposes(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain:
        return False
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def _tidy(model: ir.Model) -> None:
    """Number the nodes by type and drop the tracer's notes, which hold stack traces and local paths."""
    counts: dict[str, int] = {}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        number = counts.get(node.op_type, 0)
        counts[node.op_type] = number + 1
        node.name = f"{node.op_type}_{number}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _check_in_place(proto: onnx.ModelProto, stage: Stage) -> None:
    """A second reader of a state that is updated in place may run after the write and read the new data."""
    scopes = [(proto.graph.node, stage.in_place)]
    buffer = frozenset(line_attention.LineBufferState._fields)
    scopes += [(function.node, buffer) for function in proto.functions]
    for nodes, watched in scopes:
        readers = Counter(name for node in nodes for name in set(node.input))
        shared = sorted(name for name in watched if readers[name] > 1)
        if shared:
            raise RuntimeError(f"{stage.name}: states with more than one reader: {', '.join(shared)}")
