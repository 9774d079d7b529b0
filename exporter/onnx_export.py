"""Trace a stage into a static-shape ONNX model whose weights lie in one shared file.

Weights never pass through the tracer or the graph optimiser: they are graph inputs while the graph is
rewritten, and are streamed from the (memory-mapped) checkpoint into the weights file afterwards. So an export
holds no second copy of the model.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch

from linert.exporter.line_evict import as_operation
from linert.exporter.precision import Weight
from linert.exporter.weight_storage import lift_weights, store_weights
from linert.exporter.weights_file import WeightsFile
from linert.graphs.line_buffer import LineEnd
from linert.graphs.stage import Stage
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
    operation = operation_of(stage)
    proto = ir.to_proto(model)
    if any(node.domain == DOMAIN for node in proto.graph.node):
        proto.functions.append(stage.memory.function())
    if operation is not None:
        as_operation(proto, operation)
    _check_in_place(proto, stage)
    return proto


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
    constants = lift_weights(model, parameters, constants=operation_of(stage) is None)
    with _quiet():
        onnxscript.optimizer.optimize(
            model,
            onnx_shape_inference=False,
            input_size_limit=FOLD_ELEMENTS,
            output_size_limit=FOLD_ELEMENTS,
        )
    return Traced(model, constants)


def operation_of(stage: Stage) -> dict[str, int] | None:
    """The attributes by which the whole stage is one operation of ours; None if it is not."""
    return stage.plugin_attributes() if isinstance(stage, LineEnd) else None


def _program(stage: Stage) -> ir.Model:
    examples = tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in stage.inputs)
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
    """A second reader of a state that is updated in place may run after the write and read the new data."""
    scopes = [(proto.graph.node, stage.in_place)]
    for function in proto.functions:
        replaced = {name.removesuffix("_next") for name in function.output if name.endswith("_next")}
        scopes.append((function.node, frozenset(replaced)))
    for nodes, watched in scopes:
        readers = Counter(name for node in nodes for name in set(node.input))
        shared = sorted(name for name in watched if readers[name] > 1)
        if shared:
            raise RuntimeError(f"{stage.name}: states with more than one reader: {', '.join(shared)}")
