"""Stages of families traced to ONNX and run by ONNX Runtime, against the same stages in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporter.onnx_export import export_stage
from exporter.precision import Precision, PrecisionPlan, Weight
from exporter.weights_file import WeightsFile
from graphs import stages
from graphs.families import janus, llamagen
from graphs.families.base import RasterTransformer
from graphs.policies import POLICIES, LineEndParams
from tests.conftest import random_state

GRID = 3
CAPTIONS = llamagen.LlamaGenConfig(2, 32, 4, 64, 48, 0, grid=GRID, prefix_len=5, caption_dim=12)
JANUS = janus.JanusConfig(2, 32, 4, 4, 48, 40, 64, 6, 3, 5, 7, grid=GRID)
GROUPED = janus.JanusConfig(2, 32, 4, 2, 48, 40, 64, 6, 3, 5, 7, grid=GRID)


def built(name: str) -> RasterTransformer:
    kinds = {"llamagen by caption": CAPTIONS, "janus": JANUS, "janus, grouped queries": GROUPED}
    config = kinds[name]
    net = llamagen.LlamaGen(config) if isinstance(config, llamagen.LlamaGenConfig) else janus.Janus(config)
    net.load_state_dict(random_state(net))
    return net.requires_grad_(False).eval()


def conditions(net: RasterTransformer) -> dict[str, torch.Tensor]:
    """Two, the second with padding."""
    generator = torch.Generator().manual_seed(2)
    made = {}
    for spec in net.condition_inputs(2):
        if spec.name.endswith("starts"):
            made[spec.name] = torch.tensor([0, 2])
        elif spec.dtype is torch.int64:
            made[spec.name] = torch.randint(8, 60, spec.shape, generator=generator)
        else:
            made[spec.name] = torch.randn(spec.shape, generator=generator)
    return made


class Sessions:
    """Traced stages over named arrays, without a bundle."""

    def __init__(self, parts: list[stages.Stage], net: RasterTransformer, folder: Path) -> None:
        plan = PrecisionPlan()
        tensors = {
            f"model.{name}": Weight(name, tensor, Precision.FP32, plan)
            for name, tensor in net.named_parameters()
        }
        self.stages = {part.name: part for part in parts}
        with WeightsFile(folder / "weights.bin") as weights:
            for part in parts:
                onnx.save(export_stage(part, weights, tensors), folder / f"{part.name}.onnx")
        options = ort.SessionOptions()
        # Caches are copied here, which it says.
        options.log_severity_level = 3
        self.sessions = {name: ort.InferenceSession(folder / f"{name}.onnx", options) for name in self.stages}
        self.arrays: dict[str, np.ndarray] = {}

    def run(self, name: str) -> None:
        stage = self.stages[name]
        outputs = [spec.name for spec in stage.outputs]
        given = {spec.name: self.arrays[spec.name] for spec in stage.inputs}
        found = self.sessions[name].run(outputs, given)
        self.arrays |= {
            output.removesuffix(stages.NEXT): array for output, array in zip(outputs, found, strict=True)
        }


@pytest.mark.parametrize("name", ["llamagen by caption", "janus", "janus, grouped queries"])
@pytest.mark.parametrize("guided", [True, False])
def test_traced_stages_do_what_pytorch_does(name: str, guided: bool, tmp_path: Path) -> None:
    net = built(name)
    config = net.config
    slots = (config.prefix_len + 2 * config.line_width,) * config.layers
    geometry = stages.Geometry(config, 2, guided, slots)
    parts = [
        stages.Prefill(net, geometry),
        stages.Decode(net, geometry, filtered=False),
        stages.LineEnd(POLICIES["linear"](), geometry),
    ]
    ours = Sessions(parts, net, tmp_path)
    cache = dict.fromkeys(LineEndParams._fields, torch.tensor(0)) | {"capacity": torch.tensor(slots)}
    tensors = {
        **conditions(net),
        **cache,
        "uniforms": torch.rand(2, config.image_tokens, generator=torch.Generator().manual_seed(1)),
        "guidance": torch.tensor(3.0),
        "guidance_interval": torch.tensor(-1),
        **dict.fromkeys(("temperature", "top_p"), torch.tensor(1.0)),
        **dict.fromkeys(("greedy", "top_k", "score_window"), torch.tensor(0)),
    }
    ours.arrays = {key: tensor.numpy() for key, tensor in tensors.items()}

    def both(stage: str) -> None:
        ours.run(stage)
        part = ours.stages[stage]
        found = part(*(tensors[spec.name] for spec in part.inputs))
        for spec, value in zip(part.outputs, found, strict=True):
            key = spec.name.removesuffix(stages.NEXT)
            tensors[key] = value
            # Rounding of one step goes on to the next through the caches.
            np.testing.assert_allclose(ours.arrays[key], value.numpy(), atol=2e-4, rtol=0, err_msg=key)

    both("prefill")
    for step in range(config.prefix_len + config.image_tokens - 1):
        both("decode.unfiltered")
        index = step + 1 - config.prefix_len
        if index > 0 and index % config.line_width == 0:
            both("line_end.linear")
    assert (ours.arrays["tokens"] == tensors["tokens"].numpy()).all()
    # All positions of the shorter condition's padding were overwritten or left empty.
    held = ours.arrays["slot_pos.0"].reshape(geometry.sequences, -1, slots[0])
    assert (held[1, :, :2] == -1).all()
    assert (held[0, :, : config.prefix_len] == np.arange(config.prefix_len)).all()
