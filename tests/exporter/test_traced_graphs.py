"""The store of traced stages gives what tracing gives, and tells every two stages apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper

from linert.exporter import onnx_export
from linert.exporter.onnx_export import unsafe_states
from linert.exporter.precision import Precision, PrecisionSettings, Weight
from linert.exporter.weights_file import WeightsFile
from linert.graphs.families import llamagen
from linert.graphs.line_buffer import LineEnd
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES
from linert.graphs.stage import Stage
from linert.graphs.stages import Decode, Prefill
from tests.conftest import TINY, random_state
from tests.traced_graphs import TraceStore, fingerprint

MODEL = llamagen.LlamaGen(TINY)
SIZES = {"images": 2, "guided": True, "capacities": (19, 19)}
MEMORY = memory_of(TINY, **SIZES)


def stages() -> dict[str, Stage]:
    wider = dataclasses.replace(TINY, dim=64)
    policies = {name: LineEnd(policy(), MEMORY) for name, policy in POLICIES.items()}
    return {
        **policies,
        "decode": Decode(MODEL, MEMORY),
        "unfiltered": Decode(MODEL, MEMORY, filtered=False),
        "unguided": Decode(MODEL, memory_of(TINY, **SIZES | {"guided": False})),
        "halves": Decode(MODEL.half(), memory_of(TINY, **SIZES, cache_dtype=torch.float16)),
        "three images": Decode(MODEL, memory_of(TINY, **SIZES | {"images": 3})),
        "a shorter buffer": Decode(MODEL, memory_of(TINY, **SIZES | {"capacities": (19, 13)})),
        "another epsilon": Decode(llamagen.LlamaGen(dataclasses.replace(TINY, norm_eps=1e-6)), MEMORY),
        "another base": Decode(llamagen.LlamaGen(dataclasses.replace(TINY, rope_base=5e4)), MEMORY),
        "wider": Decode(llamagen.LlamaGen(wider), memory_of(wider, **SIZES)),
        "prefill": Prefill(MODEL, MEMORY),
    }


def test_stages_that_differ_have_fingerprints_that_differ() -> None:
    fingerprints = {name: fingerprint(stage) for name, stage in stages().items()}
    assert len(set(fingerprints.values())) == len(fingerprints)
    assert {name: fingerprint(stage) for name, stage in stages().items()} == fingerprints


def test_weights_are_no_part_of_it() -> None:
    one, other = llamagen.LlamaGen(TINY), llamagen.LlamaGen(TINY)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert fingerprint(Decode(one, MEMORY)) == fingerprint(Decode(other, MEMORY))


def test_what_is_not_known_is_refused() -> None:
    stage = Prefill(MODEL, MEMORY)
    stage.surprise = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="tells two of them apart"):
        fingerprint(stage)


@pytest.mark.parametrize("name", ["decode", "linear", "prefill"])
def test_a_stored_graph_is_what_tracing_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stages()[name]
    tensors = random_state(llamagen.LlamaGen(TINY))
    settings = PrecisionSettings()
    weights = {
        f"model.{key}": Weight(key, tensor, Precision.FP32, settings) for key, tensor in tensors.items()
    }
    store = onnx_export.trace
    assert isinstance(store, TraceStore)
    made = []
    for trace in (store._trace, store, store):
        monkeypatch.setattr(onnx_export, "trace", trace)
        with WeightsFile(tmp_path / "weights.bin") as file:
            proto = onnx_export.export_stage(stage, file, weights)
        made.append((renamed(proto).SerializeToString(deterministic=True), file.digest))
    assert made[0] == made[1] == made[2]


def renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same with its intermediate values numbered in order: their names come from the tracer, and mean nothing."""
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    names = {name: f"value_{number}" for number, name in enumerate(_made(graph)) if name not in kept}
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    return proto


def _made(graph: onnx.GraphProto) -> list[str]:
    return [name for node in graph.node for name in node.output]


def test_a_reader_that_the_write_does_not_wait_for_is_found() -> None:
    read = helper.make_node("Neg", ["state"], ["read"])
    waiting = helper.make_node("Add", ["state", "read"], ["state.next"])
    alone = helper.make_node("Relu", ["state"], ["state.next"])
    assert unsafe_states([read, waiting], {"state": "state.next"}) == []
    assert unsafe_states([read, alone], {"state": "state.next"}) == ["state"]
    assert unsafe_states([alone], {"state": "state.next"}) == []
