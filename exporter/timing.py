"""Time a bundle's decode stage with buffers of any size."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper

from runtime.bench import milliseconds
from runtime.bundle import Bundle
from runtime.manifest import CONTRACT_KEY, Manifest, TensorSpec
from runtime.manifest_file import contract
from runtime.ort import OrtBackend
from runtime.replacement import scratch_folder


@contextlib.contextmanager
def decode_backend(bundle: Bundle, stage: str, lines: Sequence[int], threads: int) -> Iterator[OrtBackend]:
    """A backend for the bundle's decode ``stage`` with buffers of so many ``lines`` a layer.

    The decode graph does not depend on the number of slots but in the shapes that it declares.
    """
    manifest = bundle.manifest
    spec = manifest.stages[stage]
    resized = {state.name: state for state in manifest.state_at(lines)}

    def fit(tensor: TensorSpec) -> TensorSpec:
        state = spec.updates.get(tensor.name, tensor.name)
        return msgspec.structs.replace(tensor, shape=resized[state].shape) if state in resized else tensor

    fitted = msgspec.structs.replace(
        spec, inputs=tuple(map(fit, spec.inputs)), outputs=tuple(map(fit, spec.outputs))
    )
    model = onnx.load(bundle.stage_path(stage), load_external_data=False)
    shapes = {tensor.name: tensor.shape for tensor in (*fitted.inputs, *fitted.outputs)}
    for value in (*model.graph.input, *model.graph.output):
        for dimension, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dimension.dim_value = size
    timed = msgspec.structs.replace(manifest, stages={stage: fitted}, state=tuple(resized.values()))
    helper.set_model_props(model, {CONTRACT_KEY: contract(timed)})
    with scratch_folder() as folder:
        onnx.save(model, folder / spec.file)
        for file in manifest.files:
            target = folder / file
            if target.suffix != ".onnx":
                target.parent.mkdir(exist_ok=True)
                link(bundle.file(file), target)
        yield OrtBackend(Bundle(folder, timed), [stage], threads=threads)


def link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has none."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def step_times(backend: OrtBackend, stage: str, manifest: Manifest) -> list[float]:
    """Milliseconds of a line's decode steps with every slot filled, after a few to warm up."""
    for name, spec in backend.specs.items():
        if name.startswith("slot_pos."):
            backend.write(name, np.broadcast_to(np.arange(spec.shape[1], dtype=np.int32), spec.shape))
    position = backend.specs["position"]
    backend.write("position", np.full(position.shape, manifest.raster.prefix_len, np.int64))
    times = [milliseconds(lambda: backend.run(stage)) for _ in range(manifest.raster.line_width + 4)]
    return times[4:]
