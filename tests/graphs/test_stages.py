"""The stages, run eagerly, against references that have no slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linert.graphs import line_buffer
from linert.graphs.families import llamagen
from linert.graphs.history import HistoryModel
from linert.graphs.line_buffer import LineEnd
from linert.graphs.memory import Memory, memory_of
from linert.graphs.policies import POLICIES, LineEndParams
from tests.conftest import TINY, random_state
from tests.eager import Eager

IMAGES = 2
CLASSES = torch.tensor([1, 3])


def model() -> llamagen.LlamaGen:
    net = llamagen.LlamaGen(TINY)
    net.load_state_dict(random_state(net))
    return net.requires_grad_(False)


def memory(lines: int, *, guided: bool = True) -> Memory:
    slots = TINY.prefix_len + lines * TINY.line_width
    return memory_of(TINY, images=IMAGES, guided=guided, capacities=[slots] * TINY.layers)


@pytest.mark.parametrize("guided", [True, False])
def test_with_room_for_the_image_the_stages_equal_the_parallel_model(guided: bool) -> None:
    net = model()
    sizes = memory(TINY.lines, guided=guided)
    eager = Eager(net, sizes, "full", [CLASSES], recent_tokens=TINY.line_width, anchor_tokens=0, strict=1)
    eager.begin()
    logits = [eager.tensors["logits"]]
    for step in range(TINY.image_tokens - 1):
        eager.run("decode")
        logits.append(eager.tensors["logits"])
        if step % TINY.line_width == TINY.line_width - 1:
            eager.run("line_end")
    fed = eager.tensors["tokens"].repeat(1 + guided, 1)
    parallel = net(net.condition([CLASSES], guided=guided), fed[:, :-1])
    torch.testing.assert_close(torch.stack(logits, dim=1), parallel, atol=2e-5, rtol=0)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
@pytest.mark.parametrize("strict", [1, 0])
@pytest.mark.parametrize(
    ("lines", "recent", "anchors", "options"),
    [
        (2, 1, 0, {}),
        (3, 1, 4, {"score_max": 1}),
        (3, 0, 0, {"average_heads": 1, "share_guidance": 1}),
        (1, 0, 0, {}),
    ],
)
def test_the_line_buffer_equals_a_masked_history(
    policy: str, strict: int, lines: int, recent: int, anchors: int, options: dict[str, int]
) -> None:
    net = model()
    sizes = memory(lines)
    eager = Eager(
        net,
        sizes,
        policy,
        [CLASSES],
        recent_tokens=recent * TINY.line_width,
        anchor_tokens=anchors,
        strict=strict,
        **options,
    )
    params = LineEndParams(*(eager.tensors[name] for name in LineEndParams._fields))
    history = HistoryModel(net, sizes.geometry, POLICIES[policy](), params)
    eager.begin()
    torch.testing.assert_close(history.begin([CLASSES]), eager.tensors["logits"], atol=2e-5, rtol=0)
    for line in range(TINY.lines):
        fed, logits = [], []
        last = line == TINY.lines - 1
        for _ in range(TINY.line_width - last):
            fed.append(eager.tensors["token"])
            eager.run("decode")
            logits.append(eager.tensors["logits"])
        wanted = history.feed(torch.stack(fed, dim=1))
        torch.testing.assert_close(torch.stack(logits, dim=1), wanted, atol=2e-5, rtol=0)
        if last:
            break
        for layer in range(TINY.layers):
            torch.testing.assert_close(
                eager.tensors[f"scores.{layer}"], history.scores[layer], atol=2e-5, rtol=0
            )
        eager.run("line_end")
        assert torch.equal(history.end_line(), eager.tensors["write_slots"])
        for layer in range(TINY.layers):
            assert torch.equal(history.slot_pos[layer], eager.tensors[f"slot_pos.{layer}"])


def test_strict_eviction_leaves_an_empty_line_and_lazy_none() -> None:
    for strict, empty in ((1, TINY.line_width), (0, 0)):
        eager = Eager(
            model(),
            memory(2),
            "linear",
            [CLASSES],
            recent_tokens=TINY.line_width,
            anchor_tokens=0,
            strict=strict,
        )
        eager.begin()
        for _ in range(2):
            for _ in range(TINY.line_width):
                eager.run("decode")
            eager.run("line_end")
        assert ((eager.tensors["slot_pos.0"] < 0).sum(1) == empty).all()


def test_state_bytes_are_the_sum_of_what_is_allocated() -> None:
    sizes = memory(3)
    eager = Eager(
        model(), sizes, "linear", [CLASSES], recent_tokens=TINY.line_width, anchor_tokens=0, strict=1
    )
    eager.begin()
    allocated = sum(eager.tensors[spec.name].nbytes for spec in sizes.state())
    assert allocated == sum(spec.nbytes for spec in sizes.state())


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("capacities", [(3, 3, 3, 3), (4, 3, 3, 2)])
def test_layers_end_their_lines_together_as_they_would_alone(
    policy: str, capacities: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, layers=len(capacities))
    slots = tuple(config.prefix_len + lines * config.line_width for lines in capacities)
    sizes = memory_of(config, images=IMAGES, guided=True, capacities=slots)
    generator = torch.Generator().manual_seed(0)
    line_end = LineEnd(POLICIES[policy](), sizes)
    scalars = {"position": 20, "recent_tokens": 6, "strict": 1, "average_heads": 1, "share_guidance": 1}
    inputs = []
    for spec in line_end.inputs:
        name = spec.name.partition(".")[0]
        if name == "capacity":
            tensor = torch.tensor(slots) - torch.arange(len(slots))
        elif name == "slot_pos":
            # Heads that choose alike hold the same positions.
            tensor = torch.randperm(spec.shape[1], generator=generator).expand(spec.shape).to(spec.dtype)
        elif spec.dtype.is_floating_point:
            tensor = torch.rand(spec.shape, generator=generator)
        else:
            tensor = torch.full(spec.shape, scalars.get(name, 0), dtype=spec.dtype)
        inputs.append(tensor)
    together = line_end(*inputs)
    monkeypatch.setattr(line_buffer, "GROUP_ENTRIES", 1)
    for spec, ours, alone in zip(line_end.outputs, together, line_end(*inputs), strict=True):
        assert torch.equal(ours, alone), spec.name
