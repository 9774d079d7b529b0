"""What a plan needs beside weights and state, with plugins and without."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

from linert.exporter.onnx_export import export_stage
from linert.exporter.precision import Precision, PrecisionSettings, Weight
from linert.exporter.tensorrt.build import environment_of, run_job
from linert.exporter.tensorrt.build_stage import Job
from linert.exporter.weights_file import WeightsFile
from linert.graphs.families.llamagen import LlamaGen, LlamaGenConfig
from linert.graphs.memory import memory_of
from linert.graphs.stages import Decode
from linert.runtime.backends.trt_flavour import FLAVOURS
from tests.conftest import random_state


def activation_bytes(onnx_file: Path, *, plugin: bool) -> int:
    """Of a plan for one GPU."""
    plan = onnx_file.with_suffix(".plan")
    with environment_of(FLAVOURS["rtx"]) as environment:
        job = Job("rtx", str(onnx_file), str(plan), (89,), plugin)
        size = run_job(job, environment, lambda event: None).activation_bytes
    assert size is not None
    return size


def test_activations_of_a_decode_step_are_smaller_than_the_keys_of_a_layer(tmp_path: Path) -> None:
    # TensorRT takes 8 MB for products whatever their size: a layer's keys are twice that.
    config = LlamaGenConfig(layers=1, dim=256, heads=4, ffn_dim=64, vocab_size=64, num_classes=5, grid=16)
    model = LlamaGen(config)
    stage = Decode(model, memory_of(config, images=32, guided=True, capacities=[257]), filtered=False)
    precision = PrecisionSettings()
    tensors = {
        f"model.{name}": Weight(name, tensor, Precision.FP32, precision)
        for name, tensor in random_state(model).items()
    }
    file = tmp_path / "decode.onnx"
    with WeightsFile(tmp_path / "weights.bin") as weights:
        onnx.save(export_stage(stage, weights, tensors), file)
    keys = next(spec.nbytes for spec in stage.inputs if spec.name == "k_cache.0")
    assert activation_bytes(file, plugin=True) < keys
    # Standard operators turn the keys around in memory of their own.
    assert activation_bytes(file, plugin=False) > keys
