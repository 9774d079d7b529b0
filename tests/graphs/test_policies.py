"""Every policy against the plain numpy reference, and by the properties that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from linert.graphs.policies import POLICIES, FinishedLine, LineEndParams, base, choose_slots, end_line
from linert.graphs.policies.base import shared_importance
from linert.graphs.policies.rkv import NEAR_DUPLICATE
from linert.runtime.plugins.contracts import LINE_EVICT_INPUTS
from tests.graphs import policy_reference as reference

WIDTH, PREFIX, LINES, HEADS, HEAD_DIM = 4, 2, 9, 2, 6
NAMES = sorted(POLICIES)


@dataclass(frozen=True)
class Setting:
    """One way to run a cache of ``branches`` x 1 image x ``HEADS`` rows."""

    budget: int
    spare: int
    recent: int
    anchors: int
    strict: bool
    score_max: bool
    average_heads: bool
    share_guidance: bool
    branches: int
    seed: int

    @property
    def capacity(self) -> int:
        return PREFIX + self.budget * WIDTH

    @property
    def rows(self) -> int:
        return self.branches * HEADS

    def params(self) -> LineEndParams:
        flags = (self.strict, self.score_max, self.average_heads, self.share_guidance)
        return LineEndParams(
            torch.tensor([self.capacity]),
            torch.tensor(self.recent),
            torch.tensor(self.anchors),
            *(torch.tensor(int(flag)) for flag in flags),
        )


@st.composite
def a_setting(draw: st.DrawFn) -> Setting:
    budget = draw(st.integers(1, LINES))
    recent = draw(st.integers(0, (budget - 1) * WIDTH))
    return Setting(
        budget,
        draw(st.integers(0, 5)),
        recent,
        draw(st.integers(0, (budget - 1) * WIDTH - recent)),
        *(draw(st.booleans()) for _ in range(4)),
        branches=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 10_000)),
    )


class Buffer:
    """A line buffer filled line by line with made-up attention, keys and values."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rng = np.random.default_rng(setting.seed)
        slots = setting.capacity + setting.spare
        self.scores = np.zeros((setting.rows, slots), np.float32)
        self.slot_pos = np.full((setting.rows, slots), -1, np.int32)
        self.slot_pos[:, :PREFIX] = np.arange(PREFIX)
        self.keys, self.values = self.rng.normal(size=(2, setting.rows, slots, HEAD_DIM)).astype(np.float32)
        self.position = PREFIX
        self.write_slots = np.tile(np.arange(PREFIX, PREFIX + WIDTH), (setting.rows, 1))

    def write_line(self) -> None:
        """Write a line's tokens, and pay every token held some attention.

        Amounts are few and dyadic: ties are common, and sums exact in any order.
        """
        for row, slots in enumerate(self.write_slots):
            self.slot_pos[row, slots] = np.arange(self.position, self.position + WIDTH)
            self.scores[row, slots] = 0
            self.keys[row, slots], self.values[row, slots] = self.rng.normal(size=(2, WIDTH, HEAD_DIM))
        paid = self.rng.integers(0, 6, self.scores.shape).astype(np.float32) / 8
        self.scores += np.where(self.slot_pos >= 0, paid, 0)
        self.position += WIDTH

    def line(self) -> FinishedLine:
        return FinishedLine(
            torch.from_numpy(self.scores.copy()),
            torch.from_numpy(self.slot_pos.copy()),
            torch.full((self.setting.rows, 1), self.position, dtype=torch.int32),
            torch.from_numpy(self.keys.copy()),
            torch.from_numpy(self.values.copy()),
            PREFIX,
            WIDTH,
            PREFIX + LINES * WIDTH,
            HEADS,
            self.setting.branches,
        )

    def row(self, row: int) -> reference.Row:
        return reference.Row(
            self.scores[row],
            self.slot_pos[row],
            self.keys[row],
            self.values[row],
            self.position,
            PREFIX,
            WIDTH,
            self.setting.score_max,
        )

    def reference_importance(self, name: str) -> np.ndarray:
        """By the numpy definitions, averaged over what is to choose alike."""
        setting = self.setting
        values = np.stack(
            [reference.IMPORTANCE[name](self.row(row)).astype(np.float64) for row in range(setting.rows)]
        ).reshape(setting.branches, HEADS, -1)
        if setting.average_heads:
            values = np.broadcast_to(values.mean(1, keepdims=True), values.shape)
        if setting.share_guidance:
            values = np.broadcast_to(values.mean(0, keepdims=True), values.shape)
        return values.reshape(setting.rows, -1)


@given(setting=a_setting(), name=st.sampled_from(NAMES))
@settings(max_examples=120, deadline=None)
def test_a_whole_image_against_the_reference(setting: Setting, name: str) -> None:
    policy, params, buffer = POLICIES[name](), setting.params(), Buffer(setting)
    for _ in range(LINES - 1):
        buffer.write_line()
        line = buffer.line()
        if name == "rkv":
            # Whether a key is another's near-duplicate is a matter of rounding there.
            cosines = [reference.similarities(buffer.row(row)) for row in range(setting.rows)]
            assume(min(abs(each - NEAR_DUPLICATE).min() for each in cosines) > 1e-5)
        importance = shared_importance(policy.importance(line, params), line, params).numpy()
        wanted_importance = buffer.reference_importance(name)
        # The prefix stays whatever it is worth.
        occupied = buffer.slot_pos >= PREFIX
        np.testing.assert_allclose(importance[occupied], wanted_importance[occupied], atol=1e-6, rtol=1e-5)
        chosen, left, scores = (t.numpy() for t in end_line(policy, line, params.capacity[0], params))

        for row in range(setting.rows):
            at_hand = buffer.row(row)
            # Two implementations round quotients differently: there, choose by the graph's importance.
            ranked = importance if name in ("leverage", "linear", "rkv", "snapkv") else wanted_importance
            wanted = reference.choose(at_hand, ranked[row], setting.capacity, setting.recent, setting.anchors)
            assert chosen[row].tolist() == wanted
            assert len(set(wanted)) == WIDTH
            for slot in wanted:
                assert not reference.protected(
                    at_hand, slot, setting.capacity, setting.recent, setting.anchors
                )
            empty = [slot for slot in range(PREFIX, setting.capacity) if buffer.slot_pos[row, slot] < 0][
                :WIDTH
            ]
            assert wanted[: len(empty)] == empty
            after = buffer.slot_pos[row].copy()
            if setting.strict:
                after[wanted] = -1
            assert (left[row] == after).all()
            resident = left[row][left[row] >= 0]
            assert len(set(resident.tolist())) == len(resident)
        assert (scores == buffer.scores * policy.carried).all()
        if setting.average_heads:
            by_branch = chosen.reshape(setting.branches, HEADS, WIDTH)
            assert (by_branch == by_branch[:, :1]).all()
        if setting.share_guidance:
            by_branch = chosen.reshape(setting.branches, HEADS, WIDTH)
            assert (by_branch == by_branch[:1]).all()
        buffer.slot_pos, buffer.scores, buffer.write_slots = left, scores, chosen
    if setting.budget == LINES:
        buffer.write_line()
        assert (np.sort(buffer.slot_pos[:, : setting.capacity], 1) == np.arange(setting.capacity)).all()


@given(setting=a_setting(), name=st.sampled_from(NAMES), lines=st.integers(1, LINES - 1))
@settings(max_examples=60, deadline=None)
def test_lazy_and_strict_choose_alike_from_the_same_scores(setting: Setting, name: str, lines: int) -> None:
    policy, buffer = POLICIES[name](), Buffer(setting)
    params = setting.params()
    for line in range(lines):
        buffer.write_line()
        lazy, strict = (
            end_line(policy, buffer.line(), params.capacity[0], params._replace(strict=torch.tensor(mode)))
            for mode in (0, 1)
        )
        assert torch.equal(lazy[0], strict[0])
        assert torch.equal(lazy[2], strict[2])
        assert (lazy[1] == torch.from_numpy(buffer.slot_pos)).all()
        mixed = lazy if line % 2 else strict
        buffer.write_slots, buffer.slot_pos, buffer.scores = (t.numpy() for t in mixed)


def test_equal_importance_goes_by_lowest_position_whatever_the_slot() -> None:
    slot_pos = torch.tensor([[9, 3, 7, 5]], dtype=torch.int32)
    chosen = choose_slots(torch.ones(1, 4), slot_pos, torch.zeros(1, 4, dtype=torch.bool), 3)
    assert chosen.tolist() == [[1, 3, 2]]


def test_empty_slots_go_by_index_whatever_order_a_runtime_gives_equal_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_highest_index(values: torch.Tensor, count: int) -> torch.Tensor:
        backwards = torch.sort(values.flip(1), dim=1, stable=True).indices
        return values.shape[1] - 1 - backwards[:, :count]

    monkeypatch.setattr(base, "_ascending", by_highest_index)
    slot_pos = torch.tensor([[4, -1, 2, -1, -1, 3]], dtype=torch.int32)
    importance = torch.tensor([[-8.0, 0.0, -9.0, 0.0, 0.0, 5.0]])
    for width, wanted in ((2, [1, 3]), (4, [1, 3, 4, 2])):
        chosen = choose_slots(importance, slot_pos, torch.zeros(1, 6, dtype=torch.bool), width)
        assert chosen.tolist() == [wanted]


def test_rows_choose_independently() -> None:
    slot_pos = torch.arange(4, dtype=torch.int32).expand(2, 4)
    importance = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    chosen = choose_slots(importance, slot_pos, torch.zeros(2, 4, dtype=torch.bool), 2)
    assert chosen.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_is_registered_under_its_name_and_has_a_reference(name: str) -> None:
    assert POLICIES[name].name == name
    assert name in reference.IMPORTANCE


@pytest.mark.parametrize(("name", "width", "window"), [("linear", 16, 0), ("rkv", 16, 8), ("rkv", 6, 0)])
def test_the_score_window_restarts_scores_only_inside_a_line(name: str, width: int, window: int) -> None:
    assert POLICIES[name]().score_window(width) == window


def test_what_policies_are_told_is_what_the_operation_takes() -> None:
    assert (*LineEndParams._fields, "position", "line", "write_slots") == tuple(LINE_EVICT_INPUTS)
