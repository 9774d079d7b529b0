"""Trace a stage into a static-shape ONNX model whose weights lie in one shared file.

Weights never pass through the tracer or the graph optimiser: they are graph inputs while the graph is
rewritten, and are streamed from the (memory-mapped) checkpoint into the weights file afterwards. So an export
holds no second copy of the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch

from linert.exporter.operations import as_operation, body_of
from linert.exporter.precision import Weight
from linert.exporter.weight_storage import lift_weights, store_weights
from linert.exporter.weights_file import WeightsFile
from linert.graphs.stage import Stage
from linert.graphs.stage_tensor import NEXT
from linert.runtime.plugins.contracts import DOMAIN

PRODUCER = "linert"

FOLD_ELEMENTS = 1024
"""Constant folding stops here, so that no state-sized constant is baked into a graph."""


def export_stage(
    stage: Stage, weights: WeightsFile, tensors: Mapping[str, Weight], size: str = ""
) -> onnx.ModelProto:
    """Return ``stage`` as a model of its opset that refers to ``weights``.

    Args:
        stage: its parameters need shapes only; what they hold is not read.
        weights: where everything large goes.
        tensors: what the parameters hold and are stored in, by their name in ``stage``.
        size: tells the constants of stages of the same name apart.

    Raises:
        RuntimeError: the tracer failed, or an input that is updated in place has more than one reader.
    """
    traced = trace(stage)
    model = traced.model
    parameters = {value.name: tensors[value.name] for value in model.graph.inputs if value.name in tensors}
    store_weights(model, {**parameters, **traced.constants}, weights, f"{stage.name}{size}")
    model.graph.name = stage.name
    model.producer_name, model.producer_version = PRODUCER, None
    _tidy(model)
    proto = ir.to_proto(model)
    if any(node.domain == DOMAIN for node in proto.graph.node):
        proto.functions.extend(operation_body(operation) for operation in stage.operations())
    if stage.operation is not None:
        as_operation(proto, stage.operation.name, stage.operation.attributes)
    _check_in_place(proto, stage)
    return proto


def operation_body(operation: onnx.FunctionProto | Stage) -> onnx.FunctionProto:
    """The body of an operation of our own, which is traced if a stage says what it does.

    Raises:
        TypeError: a stage that is no operation.
        RuntimeError: the tracer failed.
    """
    if not isinstance(operation, Stage):
        return operation
    if operation.operation is None:
        raise TypeError(f"{operation.name} is no operation")
    model = trace(operation).model
    _tidy(model)
    return body_of(ir.to_proto(model), operation.operation.name)


class Traced(NamedTuple):
    """A stage's graph before its weights are stored.

    ``model``: behind the stage's own inputs its parameters are inputs, and the constants that are too large to stand in the file.
    ``constants``: what the latter hold, by name.
    """

    model: ir.Model
    constants: dict[str, torch.Tensor]


def trace(stage: Stage) -> Traced:
    """Trace and simplify a stage. The result depends on what the stage computes and on its shapes, not on any weight.

    Raises:
        RuntimeError: the tracer failed.
    """
    model = _program(stage)
    parameters = [name for name, _ in stage.named_parameters()]
    # An operation's body has no tensors in files.
    constants = lift_weights(model, parameters, constants=stage.operation is None)
    with _quiet():
        onnxscript.optimizer.optimize_ir(
            model,
            onnx_shape_inference=False,
            input_size_limit=FOLD_ELEMENTS,
            output_size_limit=FOLD_ELEMENTS,
            should_fold=_small,
        )
    return Traced(model, constants)


def _small(node: ir.Node) -> bool | None:
    """False for a node with a large output, which would be computed before it is found to be too large; else the usual rules."""
    shapes = [value.shape for value in node.outputs]
    large = any(
        shape is not None and shape.is_static() and math.prod(shape.numpy()) > FOLD_ELEMENTS
        for shape in shapes
    )
    return False if large else None


def _program(stage: Stage) -> ir.Model:
    # Shapes are all that the tracer asks of them: memory that nobody touches is never taken.
    examples = tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in stage.inputs)
    with _quiet():
        program = torch.onnx.export(
            stage.eval(),
            examples,
            dynamo=True,
            optimize=False,
            opset_version=stage.opset,
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
    """A reader of a state that is updated in place may run after the write and read the new data, unless the write waits for it."""
    graph_states = {name: f"{name}{NEXT}" for name in stage.in_place}
    scopes: list[tuple[Sequence[onnx.NodeProto], Mapping[str, str]]] = [(proto.graph.node, graph_states)]
    for function in proto.functions:
        after = [name for name in function.output if name.endswith("_next")]
        scopes.append((function.node, {name.removesuffix("_next"): name for name in after}))
    for nodes, states in scopes:
        if unsafe := sorted(unsafe_states(nodes, states)):
            raise RuntimeError(
                f"{stage.name}: states with readers that may run after the write: {', '.join(unsafe)}"
            )


def unsafe_states(nodes: Sequence[onnx.NodeProto], states: Mapping[str, str]) -> list[str]:
    """Which of ``states``, with the names of the outputs that are written over them, have a reader that the write does not wait for."""
    producer = {name: number for number, node in enumerate(nodes) for name in node.output}
    readers: defaultdict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(nodes):
        for name in set(node.input) & states.keys():
            readers[name].append(number)
    unsafe = []
    for name, output in states.items():
        if output not in producer:
            continue
        waited_for, pending = set(), [producer[output]]
        while pending:
            number = pending.pop()
            if number not in waited_for:
                waited_for.add(number)
                pending += [producer[source] for source in nodes[number].input if source in producer]
        if not waited_for.issuperset(readers[name]):
            unsafe.append(name)
    return unsafe
