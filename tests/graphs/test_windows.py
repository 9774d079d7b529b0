"""Windows of positions draw the tokens, choose the slots and keep the scores that single steps do."""

from __future__ import annotations

import pytest
import torch

from linert.graphs import stages
from linert.graphs.families.lasadgen import Variant
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES
from linert.graphs.window import NO_DRAFT
from tests.eager import Eager
from tests.graphs.test_lasadgen import model as decaying_model
from tests.graphs.test_rows import due
from tests.graphs.test_stages import CLASSES, memory
from tests.graphs.test_stages import model as buffered_model


def eager_of(policy: str, width: int, *, guided: bool = True, lines: int = 3, **settings: float) -> Eager:
    """A batch of two images; no policy is linear attention."""
    if policy:
        net, sizes = buffered_model(), memory(6 if policy == "full" else lines, guided=guided)
    else:
        net = decaying_model(Variant.MANHATTAN)
        sizes = memory_of(net.config, images=2, guided=guided)
    usual = {"recent_tokens": 6, "anchor_tokens": 2, "strict": 0} if policy else {}
    eager = Eager(net, sizes, policy, [CLASSES], **{**usual, **settings})
    if width:
        eager.stages = {**eager.stages, "decode": stages.WindowDecode(net, sizes, width)}
    return eager


def draw(eager: Eager) -> tuple[list[torch.Tensor], list[list[torch.Tensor]], int]:
    """Tokens ``[N]`` of both images; what each of them had at every line's end, before and after it; and passes."""
    geometry = eager.geometry
    last = geometry.config.prefix_len + geometry.config.image_tokens - 1
    eager.run("prefill")
    ends: list[list[torch.Tensor]] = [[], []]
    passes = 0
    while (eager.tensors["position"] < last).any():
        eager.run("decode")
        passes += 1
        which = due(eager)
        if any(which):
            before = dict(eager.tensors)
            eager.run("line_end")
            for image in range(2):
                if which[image]:
                    rows = geometry.per_row(torch.arange(geometry.sequences)) % 2 == image
                    kinds = [
                        spec
                        for spec in eager.memory.layer_state()
                        if spec.kind in ("scores", "slot_pos", "above")
                    ]
                    ends[image] += [before[spec.name][rows] for spec in kinds]
                    if "write_slots" in eager.tensors:
                        ends[image].append(eager.tensors["write_slots"][:, rows])
    return list(eager.tensors["tokens"]), ends, passes


CASES = [
    ("", {}),
    *((name, {}) for name in POLICIES),
    ("linear", {"strict": 1}),
    ("linear", {"score_max": 1}),
    ("snapkv", {"strict": 1, "score_max": 1}),
    ("h2o", {"average_heads": 1, "share_guidance": 1}),
    ("streaming", {"anchor_tokens": 0, "recent_tokens": 0}),
]


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_a_window_draws_what_single_steps_draw(policy: str, settings: dict[str, float], width: int) -> None:
    tokens, ends, passes = draw(eager_of(policy, 0, **settings))
    window_tokens, window_ends, window_passes = draw(eager_of(policy, width, **settings))
    for ours, theirs in zip(window_tokens, tokens, strict=True):
        assert torch.equal(ours, theirs)
    for ours_of_image, theirs_of_image in zip(window_ends, ends, strict=True):
        assert len(ours_of_image) == len(theirs_of_image)
        for ours, theirs in zip(ours_of_image, theirs_of_image, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert window_passes <= passes


@pytest.mark.parametrize("policy", ["linear", ""])
def test_a_window_of_a_line_buffer_looks_ahead(policy: str) -> None:
    """Behind its line's end it draws what the next line begins with, and accepts none of it."""
    eager = eager_of(policy, 4)
    config = eager.geometry.config
    eager.run("prefill")
    ahead = 0
    while (eager.tensors["position"] < config.prefix_len + config.image_tokens - 1).any():
        begun = (eager.tensors["position"][:2] - config.prefix_len).clamp(min=0)
        line_end = (begun // config.line_width + 1) * config.line_width
        eager.run("decode")
        fed = eager.tensors["position"][:2] - config.prefix_len
        assert (fed <= line_end).all()
        for tokens, end in zip(eager.tensors["tokens"], line_end.tolist(), strict=True):
            # The first token of the next line is drawn by the last of this one.
            ahead += int((tokens[end + 1 : end + 4] != NO_DRAFT).sum())
        if any(due(eager)):
            eager.run("line_end")
    assert (ahead > 0) == bool(policy)
    assert (eager.tensors["tokens"] != NO_DRAFT).all()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "sampling", [{"greedy": 1}, {"top_k": 5}, {"top_p": 0.6}, {"guidance_interval": 9}, {"temperature": 0.3}]
)
def test_whatever_the_sampling(guided: bool, sampling: dict[str, float]) -> None:
    single = draw(eager_of("linear", 0, guided=guided, **sampling))
    window = draw(eager_of("linear", 4, guided=guided, **sampling))
    for ours, theirs in zip(window[0], single[0], strict=True):
        assert torch.equal(ours, theirs)
