"""Tensors of many layers are joined and parted by nodes that ONNX Runtime can capture."""

from __future__ import annotations

import pytest
import torch

from linert.graphs import stages
from linert.graphs.families import lasadgen, llamagen
from linert.graphs.memory import memory_of
from linert.graphs.pieces import MOST_PIECES, joined, parted
from linert.graphs.policies import POLICIES
from tests.eager import Eager


class Nodes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the pieces of everything that joins or parts."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.cat.default:
            self.pieces.append(len(args[0]))
        elif isinstance(result, list):
            self.pieces.append(len(result))
        return result


@pytest.mark.parametrize("count", [1, 31, 32, 33, 65, 1100])
def test_what_is_joined_and_parted_again_is_the_same(count: int) -> None:
    pieces = [torch.full((2, 3), float(number)) for number in range(count)]
    with Nodes() as nodes:
        whole = joined(pieces)
        again = parted(whole, 2)
    assert torch.equal(whole, torch.cat(pieces))
    assert len(again) == count
    assert all(torch.equal(one, other) for one, other in zip(pieces, again, strict=True))
    if count <= MOST_PIECES**2:
        assert max(nodes.pieces) <= MOST_PIECES


def test_they_are_joined_along_any_axis() -> None:
    pieces = [torch.full((2, 1), float(number)) for number in range(40)]
    assert torch.equal(joined(pieces, 1), torch.cat(pieces, 1))


def deep_llamagen() -> llamagen.LlamaGen:
    return llamagen.LlamaGen(llamagen.LlamaGenConfig(33, 8, 1, 8, 16, 4, grid=3))


def deep_lasadgen() -> lasadgen.LASADGen:
    config = lasadgen.LASADGenConfig(33, 8, 2, 8, 16, 4, 3, lasadgen.Variant.MANHATTAN, gate_rank=4)
    return lasadgen.LASADGen(config)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("policy", [*POLICIES, ""])
def test_no_stage_of_a_deep_model_has_more_pieces_than_can_be_captured(policy: str, window: int) -> None:
    net = (deep_llamagen() if policy else deep_lasadgen()).requires_grad_(False).eval()
    config = net.config
    slots = (config.prefix_len + 2 * config.line_width,) * config.layers
    memory = memory_of(config, images=1, guided=True, capacities=slots if policy else ())
    settings = {"recent_tokens": 2, "anchor_tokens": 1, "strict": 0} if policy else {}
    eager = Eager(net, memory, policy, [torch.tensor([1])], **settings)
    if window > 1:
        eager.stages = {**eager.stages, "decode": stages.WindowDecode(net, memory, window)}
    with Nodes() as nodes:
        for stage in ("prefill", *["decode"] * config.line_width, "line_end", "decode"):
            eager.run(stage)
    assert max(nodes.pieces) <= MOST_PIECES
