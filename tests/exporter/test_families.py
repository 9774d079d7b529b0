"""Stages of families traced to ONNX and run by ONNX Runtime, against the same stages in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from linert.exporter.onnx_export import export_stage
from linert.exporter.precision import Precision, PrecisionSettings, Weight
from linert.exporter.weights_file import WeightsFile
from linert.graphs import stages
from linert.graphs.families import FAMILIES, janus, llamagen, lumina
from linert.graphs.families.lasadgen import Variant
from linert.graphs.line_buffer import LineEnd
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES
from linert.graphs.stage_tensor import NEXT
from linert.graphs.transformer import RasterTransformer
from tests.conftest import random_state
from tests.eager import fed_stages, usual_inputs
from tests.graphs.test_lasadgen import model as decaying_model

GRID = 3
CAPTIONS = llamagen.LlamaGenConfig(2, 32, 4, 64, 48, 0, grid=GRID, prefix_len=5, caption_dim=12)
JANUS = janus.JanusConfig(2, 32, 4, 4, 48, 40, 64, 6, 3, 5, 7, grid=GRID)
LUMINA = lumina.LuminaConfig(2, 32, 4, 2, 48, 40, 4, 50, 64, 6, rows=3, columns=2)
SWIN = replace(LUMINA, swin_norm=True)
GROUPED = janus.JanusConfig(2, 32, 4, 2, 48, 40, 64, 6, 3, 5, 7, grid=GRID)


KINDS = {
    "llamagen by caption": CAPTIONS,
    "janus": JANUS,
    "janus with grouped queries": GROUPED,
    "lumina": LUMINA,
    "lumina of 34B": SWIN,
}


def built(name: str) -> RasterTransformer:
    config = KINDS[name]
    net = FAMILIES[name.split()[0]].build(config)
    net.load_state_dict(random_state(net))
    return net.requires_grad_(False).eval()


def conditions(net: RasterTransformer, *, guided: bool) -> dict[str, torch.Tensor]:
    """Two, the first with a negative one, the second with padding."""
    generator = torch.Generator().manual_seed(2)
    made = {}
    for spec in net.condition_inputs(2, guided=guided):
        if spec.name.endswith("starts"):
            made[spec.name] = torch.tensor([1, -1] if spec.name.startswith("negative") else [1, 2])
        elif spec.dtype is torch.int64:
            made[spec.name] = torch.randint(8, 60, spec.shape, generator=generator)
        else:
            made[spec.name] = torch.randn(spec.shape, generator=generator)
    return made


class Sessions:
    """Traced stages over named arrays, without a bundle."""

    def __init__(self, parts: list[stages.Stage], net: RasterTransformer, folder: Path) -> None:
        settings = PrecisionSettings()
        tensors = {
            f"model.{name}": Weight(name, tensor, Precision.FP32, settings)
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
        feed = {spec.name: self.arrays[spec.name] for spec in stage.inputs}
        results = self.sessions[name].run(outputs, feed)
        self.arrays |= {
            output.removesuffix(NEXT): array for output, array in zip(outputs, results, strict=True)
        }


def traced_inputs(geometry: stages.Geometry, **settings: float) -> dict[str, torch.Tensor]:
    """The usual inputs with the noise of two lines, which comes again for the next two: graphs have room for no more."""
    tensors = usual_inputs(geometry, **settings)
    held = stages.NOISE_LINES * geometry.config.line_width
    return tensors | {"noise": tensors["noise"][:, :held].contiguous()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("guided", [True, False])
def test_traced_stages_do_what_pytorch_does(name: str, guided: bool, tmp_path: Path) -> None:
    net = built(name)
    config = net.config
    slots = (config.prefix_len + 2 * config.line_width,) * config.layers
    memory = memory_of(config, images=2, guided=guided, capacities=slots)
    parts = [
        stages.Prefill(net, memory),
        stages.Decode(net, memory, filtered=False),
        LineEnd(POLICIES["linear"](), memory),
    ]
    ours = Sessions(parts, net, tmp_path)
    tensors = traced_inputs(memory.geometry) | conditions(net, guided=guided)
    ours.arrays = {key: tensor.numpy() for key, tensor in tensors.items()}

    def both(stage: str) -> None:
        ours.run(stage)
        part = ours.stages[stage]
        results = part(*(tensors[spec.name] for spec in part.inputs))
        for spec, value in zip(part.outputs, results, strict=True):
            key = spec.name.removesuffix(NEXT)
            tensors[key] = value
            # Rounding of one step goes on to the next through the caches.
            np.testing.assert_allclose(ours.arrays[key], value.numpy(), atol=2e-4, rtol=0, err_msg=key)

    both("prefill")
    # The first position is padding of all, and never fed.
    assert tensors["position"].unique().tolist() == [1]
    for stage in fed_stages(config, int(tensors["position"][0])):
        both({"decode": "decode.unfiltered", "line_end": "line_end.linear"}[stage])
    assert (ours.arrays["tokens"] == tensors["tokens"].numpy()).all()
    # All positions of the shorter condition's padding were overwritten or left empty.
    slot_pos = ours.arrays["slot_pos.0"].reshape(memory.geometry.sequences, -1, slots[0])
    assert (slot_pos[1, :, :2] == -1).all()
    assert (slot_pos[0, :, : config.prefix_len] == [-1, *range(1, config.prefix_len)]).all()


@pytest.mark.parametrize(
    ("name", "guided"), [*[(name, True) for name in (*KINDS, "lasadgen")], ("janus", False)]
)
def test_traced_windows_draw_what_pytorchs_single_steps_draw(name: str, guided: bool, tmp_path: Path) -> None:
    net = decaying_model(Variant.MANHATTAN) if name == "lasadgen" else built(name)
    config = net.config
    slots = (config.prefix_len + 2 * config.line_width,) * config.layers
    memory = memory_of(config, images=2, guided=guided, capacities=slots)
    eager = [
        stages.Prefill(net, memory),
        stages.Decode(net, memory, filtered=False),
        memory.line_ends(net, ["linear"])[0],
    ]
    prefill, single, line_end = (part.name for part in eager)
    window = stages.WindowDecode(net, memory, 3, filtered=False)
    sessions = Sessions([window], net, tmp_path)
    parts = {part.name: part for part in eager}

    def run(stage: str) -> None:
        if stage == window.name:
            sessions.run(stage)
            return
        part = parts[stage]
        results = part(*(torch.from_numpy(sessions.arrays[spec.name]) for spec in part.inputs))
        for spec, value in zip(part.outputs, results, strict=True):
            sessions.arrays[spec.name.removesuffix(NEXT)] = value.numpy()

    tensors = traced_inputs(memory.geometry, guidance=2.0)
    tensors |= {"class_ids": torch.tensor([1, 3])} if name == "lasadgen" else conditions(net, guided=guided)
    last = config.prefix_len + config.image_tokens - 1
    drawn, passes = [], []
    for decode in (single, window.name):
        sessions.arrays = {key: tensor.numpy().copy() for key, tensor in tensors.items()}
        run(prefill)
        passes.append(0)
        while (sessions.arrays["position"] < last).any():
            run(decode)
            passes[-1] += 1
            position, line = (torch.from_numpy(sessions.arrays[key]) for key in ("position", "line"))
            if memory.geometry.due(position, line).any():
                run(line_end)
        drawn.append(sessions.arrays["tokens"])
    assert (drawn[0] == drawn[1]).all()
    # The condition is fed three positions at a time.
    assert passes[1] <= passes[0] - 2 * ((config.prefix_len - 1) // 3)
