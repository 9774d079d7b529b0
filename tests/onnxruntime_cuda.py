"""What ONNX Runtime's CUDA provider makes of a stage, told from its table of kernels, and its captured sessions on the CPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
from onnx import defs, inliner, shape_inference

from linert.graphs.pieces import MOST_PIECES
from linert.runtime.backends.ort_cuda import NOT_CAPTURED, OrtCudaBackend
from linert.runtime.bundles.bundle import open_bundle
from tests.conftest import ROOT

TABLE = json.loads((ROOT / "tests" / "data" / "onnxruntime_cuda_kernels.json").read_text())
"""Made by scripts/onnxruntime_cuda_kernels.py."""


def cuda_faults(bundle: Path) -> list[str]:
    """What keeps stages of a bundle from being captured as CUDA graphs, sentence by sentence."""
    stages = open_bundle(bundle).manifest.stages
    faults = []
    for name, stage in stages.items():
        model = inlined(onnx.load(bundle / stage.file, load_external_data=False))
        faults += [f"{name}: no kernel for {operator}" for operator in without_kernel(model)]
        if name not in NOT_CAPTURED:
            faults += [f"{name}: {node}" for node in too_many_pieces(model)]
            faults += [f"{name}: {output} is a constant" for output in constant_outputs(model)]
    return faults


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without functions: its own, and those of operators that ONNX Runtime has no CUDA kernel for."""
    model = inliner.inline_local_functions(model)
    version = opset(model)
    names = {node.op_type for node in model.graph.node} - TABLE["kernels"].keys() - {"Constant"}
    schemas = {name: defs.get_schema(name, version) for name in names}
    functions = [
        ("", name)
        for name, schema in schemas.items()
        if schema.has_function or schema.has_context_dependent_function
    ]
    return inliner.inline_selected_functions(model, functions, exclude=False, inline_schema_functions=True)


def opset(model: onnx.ModelProto) -> int:
    [version] = [entry.version for entry in model.opset_import if entry.domain == ""]
    return int(version)


def without_kernel(model: onnx.ModelProto) -> list[str]:
    """Operators, with their versions and types, of a ``model`` without functions that there is no CUDA kernel for."""
    types = types_of(model)
    operators = {
        describe(node, since, types)
        for node in model.graph.node
        if node.op_type != "Constant"
        for since in [defs.get_schema(node.op_type, opset(model)).since_version]
        if not any(fits(kernel, node, since, types) for kernel in TABLE["kernels"].get(node.op_type, ()))
    }
    return sorted(operators)


def too_many_pieces(model: onnx.ModelProto) -> list[str]:
    """Nodes that join or part more tensors than a CUDA graph can hold: concat.cc and split.cc of the CUDA provider."""
    pieces = {"Concat": lambda node: len(node.input), "Split": lambda node: len(node.output)}
    return [
        f"{node.name} has {count} pieces"
        for node in model.graph.node
        if node.op_type in pieces and (count := pieces[node.op_type](node)) > MOST_PIECES
    ]


def describe(node: onnx.NodeProto, since: int, types: dict[str, str]) -> str:
    kinds = ", ".join(types[name] for name in node.input if name)
    return f"{node.op_type} {since} ({kinds})"


def fits(kernel: list[Any], node: onnx.NodeProto, since: int, types: dict[str, str]) -> bool:
    """Whether ONNX Runtime takes ``kernel`` for ``node``: KernelRegistry::VerifyKernelDef in core/framework/kernel_registry.cc.

    A kernel without a last version is taken at its first alone: the operator may have changed since.
    """
    first, last, wanted = kernel
    if since != first and not (last is not None and first <= since <= last):
        return False
    schema = defs.get_schema(node.op_type, since)
    for parameter, allowed in wanted.items():
        tensors = arguments(schema, node, parameter)
        kind = next((types[name] for name in tensors if name), None)
        if kind is not None and kind not in allowed:
            return False
    return True


def arguments(schema: defs.OpSchema, node: onnx.NodeProto, parameter: str) -> Iterator[str]:
    """Names of the values of ``node`` that a kernel's ``parameter`` speaks of: a type's, or an input's or output's own."""
    for formal, actual in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for index, one in enumerate(formal):
            if parameter in (one.type_str, one.name) and index < len(actual):
                yield actual[index]


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """Every value's type, as ONNX Runtime calls it."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    numbers = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    } | {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(number).lower() for name, number in numbers.items()}


def constant_outputs(model: onnx.ModelProto) -> list[str]:
    """Outputs of a ``model`` without functions that do not depend on its inputs."""
    dependent = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if dependent & set(node.input):
            dependent |= set(node.output)
    return [value.name for value in model.graph.output if value.name not in dependent]


class CapturedSession:
    """A session as ONNX Runtime's CUDA provider runs one with a graph, but on the CPU.

    A thread's first run executes it three times. The later ones replay a graph, which holds no copies from the host: outputs that
    are constants are not written again.
    """

    def __init__(self, session: ort.InferenceSession, constants: Iterable[str]) -> None:
        self.session = session
        names = [output.name for output in session.get_outputs()]
        self.constants = [names.index(name) for name in constants]
        self.captured = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        outputs = binding.get_outputs()
        replayed = hasattr(self.captured, "once")
        kept = {index: np.array(outputs[index].numpy()) for index in self.constants if replayed}
        for _ in range(1 if replayed else 3):
            self.session.run_with_iobinding(binding)
        self.captured.once = True
        for index, values in kept.items():
            outputs[index].update_inplace(values)


class CapturingBackend(OrtCudaBackend):
    """The CUDA backend on the CPU, with sessions that behave as captured ones."""

    def _session(self, stage: str) -> ort.InferenceSession:
        session = super()._session(stage)
        if not self._captures(stage):
            return session
        model = inlined(onnx.load(self.bundle.stage_path(stage), load_external_data=False))
        return cast("ort.InferenceSession", CapturedSession(session, constant_outputs(model)))
