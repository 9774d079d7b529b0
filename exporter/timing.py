"""Time a bundle's decode stage with buffers of other sizes, without exporting it again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import CONTRACT_KEY, Manifest, TensorSpec
from linert.runtime.bundles.manifest_file import contract
from linert.runtime.measuring.measured import fill_slots, milliseconds

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's setting: where the weights of a graph lie that comes without a file of its own."""


class ResizedBackend(OrtBackend):
    """The bundle's decode ``stage`` with buffers of so many ``lines`` a layer.

    The decode graph does not depend on the number of slots but in the shapes that it declares. Weights are read where they
    are, and nothing is written.
    """

    def __init__(self, bundle: Bundle, stage: str, lines: Sequence[int], threads: int) -> None:
        manifest = bundle.manifest
        spec = manifest.stages[stage]
        resized = {state.name: state for state in manifest.state_at(lines)}

        def fit(tensor: TensorSpec) -> TensorSpec:
            state = spec.updates.get(tensor.name, tensor.name)
            return msgspec.structs.replace(tensor, shape=resized[state].shape) if state in resized else tensor

        fitted = msgspec.structs.replace(
            spec, inputs=tuple(map(fit, spec.inputs)), outputs=tuple(map(fit, spec.outputs))
        )
        timed = msgspec.structs.replace(manifest, stages={stage: fitted}, state=tuple(resized.values()))
        super().__init__(Bundle(bundle.path, timed, bundle.variant), [stage], threads=threads)

    def _model(self, stage: str) -> bytes:
        model = onnx.load(self.bundle.stage_path(stage), load_external_data=False)
        spec = self.stages[stage]
        shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
        for value in (*model.graph.input, *model.graph.output):
            for dimension, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                dimension.dim_value = size
        helper.set_model_props(model, {CONTRACT_KEY: contract(self.bundle.manifest)})
        return model.SerializeToString()

    def _options(self, stage: str) -> ort.SessionOptions:
        options = super()._options(stage)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self.bundle.path.resolve()))
        return options


def step_times(backend: OrtBackend, stage: str, manifest: Manifest) -> list[float]:
    """Milliseconds of a line's decode steps with every slot filled, after a few to warm up."""
    fill_slots(backend)
    position = backend.specs["position"]
    backend.write("position", np.full(position.shape, manifest.raster.prefix_len, np.int64))
    times = [milliseconds(lambda: backend.run(stage)) for _ in range(manifest.raster.line_width + 4)]
    return times[4:]
