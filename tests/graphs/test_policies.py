"""Choice of slots, against a plain numpy reference and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.policies import POLICIES, FinishedLine, LineEndParams, choose_slots, end_line

WIDTH, PREFIX = 4, 2


def params(capacity: int, recent: int, anchors: int, strict: bool) -> LineEndParams:
    return LineEndParams(
        torch.tensor([capacity]), torch.tensor(recent), torch.tensor(anchors), torch.tensor(int(strict))
    )


def numpy_choice(
    importance: np.ndarray, slot_pos: np.ndarray, position: int, capacity: int, recent: int, anchors: int
) -> list[int]:
    """The definition, one row at a time."""
    candidates = []
    for slot, held in enumerate(slot_pos):
        if slot < PREFIX or slot >= capacity:
            continue
        if held < 0:
            candidates.append((0, 0.0, slot, slot))
        elif not (PREFIX <= held < PREFIX + anchors or held >= position - recent * WIDTH):
            candidates.append((1, float(importance[slot]), int(held), slot))
    return [slot for *_, slot in sorted(candidates)[:WIDTH]]


@st.composite
def buffers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, int, int]:
    """A buffer after some lines: a random choice of seen positions, in random slots."""
    budget = draw(st.integers(2, 5))
    recent = draw(st.integers(0, budget - 2))
    anchors = draw(st.integers(0, (budget - 1 - recent) * WIDTH))
    capacity = PREFIX + budget * WIDTH
    slots = capacity + draw(st.integers(0, 3))
    lines = draw(st.integers(1, 8))
    position = PREFIX + lines * WIDTH
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    must = {
        *range(PREFIX, min(PREFIX + anchors, position)),
        *range(max(PREFIX, position - recent * WIDTH), position),
    }
    others = [p for p in range(PREFIX, position) if p not in must]
    room = capacity - PREFIX - len(must)
    kept = [*must, *rng.choice(others, min(room, len(others)), replace=False)] if others else list(must)
    slot_pos = np.full(slots, -1, np.int32)
    slot_pos[:PREFIX] = np.arange(PREFIX)
    slot_pos[rng.permutation(np.arange(PREFIX, capacity))[: len(kept)]] = kept
    # Few distinct scores, so that ties are common.
    scores = rng.integers(0, 4, slots).astype(np.float32)
    return slot_pos, scores, position, capacity, recent, anchors


@given(buffer=buffers(), strict=st.booleans(), name=st.sampled_from(sorted(POLICIES)))
@settings(max_examples=200, deadline=None)
def test_choice_equals_the_definition(
    buffer: tuple[np.ndarray, np.ndarray, int, int, int, int], strict: bool, name: str
) -> None:
    slot_pos, scores, position, capacity, recent, anchors = buffer
    line = FinishedLine(
        torch.from_numpy(scores)[None],
        torch.from_numpy(slot_pos)[None],
        torch.tensor([[position]], dtype=torch.int32),
        PREFIX,
        WIDTH,
    )
    policy = POLICIES[name]()
    settings_ = params(capacity, recent, anchors, strict)
    chosen, left, fresh = end_line(policy, line, settings_.capacity[0], settings_)
    importance = policy.importance(line)[0].numpy()
    wanted = numpy_choice(importance, slot_pos, position, capacity, recent, anchors)
    if len(wanted) == WIDTH:
        assert chosen[0].tolist() == wanted
        held = slot_pos[wanted]
        assert left[0, wanted].tolist() == ([-1] * WIDTH if strict else held.tolist())
        untouched = np.setdiff1d(np.arange(len(slot_pos)), wanted)
        assert (left[0].numpy()[untouched] == slot_pos[untouched]).all()
    assert len(set(chosen[0].tolist())) == WIDTH
    assert not fresh.any()


def test_equal_importance_goes_by_lowest_position_whatever_the_slot() -> None:
    slot_pos = torch.tensor([[9, 3, 7, 5]], dtype=torch.int32)
    chosen = choose_slots(torch.ones(1, 4), slot_pos, torch.zeros(1, 4, dtype=torch.bool), 3)
    assert chosen.tolist() == [[1, 3, 2]]


def test_rows_choose_independently() -> None:
    slot_pos = torch.arange(4, dtype=torch.int32).expand(2, 4)
    importance = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    chosen = choose_slots(importance, slot_pos, torch.zeros(2, 4, dtype=torch.bool), 2)
    assert chosen.tolist() == [[0, 1], [3, 2]]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_is_registered_under_its_name(name: str) -> None:
    assert POLICIES[name].name == name
