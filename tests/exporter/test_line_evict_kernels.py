"""The LineEvict kernel against the traced stage: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from linert.exporter.tensorrt.launch import line_evict
from linert.graphs.families.llamagen import LlamaGenConfig
from linert.graphs.line_buffer import LineEnd
from linert.graphs.line_evict import Importance
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES
from linert.graphs.policies.given import Given
from linert.runtime.plugins.line_evict import LineEvict, LineEvictLaunch
from tests.exporter.test_line_attention_kernels import DEVICE
from tests.exporter.watched_memory import watched

NAMES = sorted(name for name, policy in POLICIES.items() if policy.plugin_importance is not None)
GRID = 6


@dataclass(frozen=True)
class Case:
    """A stage and settings; ``budgets`` in lines, one a layer, ``spare`` slots beyond the largest, ``lost`` the share of scores that
    are not a number."""

    policy: str
    budgets: tuple[int, ...]
    guided: bool
    recent: int
    anchors: int
    flags: tuple[bool, bool, bool, bool]
    seed: int
    heads: int = 2
    spare: int = 0
    lost: float = 0.0

    @property
    def stage(self) -> LineEnd:
        config = LlamaGenConfig(
            len(self.budgets), 4 * self.heads, self.heads, 8, 16, 2, grid=GRID, prefix_len=1
        )
        capacities = tuple(1 + lines * GRID + self.spare for lines in self.budgets)
        memory = memory_of(config, images=2, guided=self.guided, capacities=capacities)
        return LineEnd(POLICIES[self.policy](), memory)


def tensors_of(
    case: Case, stage: LineEnd
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Settings, scores and positions in the middle of an image.

    Scores are multiples of 1/64, of which there are few: sums are exact and many are equal. Rows that share a choice hold the
    same positions, as they would.
    """
    generator = torch.Generator().manual_seed(case.seed)
    rows = stage.geometry.rows
    now = 1 + 4 * GRID
    settings = [
        torch.tensor([1 + lines * GRID for lines in case.budgets]),
        torch.tensor(case.recent),
        torch.tensor(case.anchors),
        *(torch.tensor(int(flag)) for flag in case.flags),
        torch.full((stage.geometry.sequences,), now),
        # Some images have ended the line already.
        torch.tensor([(3, 4), (3, 3), (4, 3)][case.seed % 3]).repeat(stage.geometry.branches),
        torch.randint(0, 1 + 3 * GRID, (len(case.budgets), rows, GRID), generator=generator),
    ]
    scores, slot_pos = [], []
    shared = case.flags[2] or case.flags[3]
    for capacity in stage.geometry.capacities:
        received = torch.randint(0, 40, (rows, capacity), generator=generator) / 64
        if case.lost:
            received[torch.rand(rows, capacity, generator=generator) < case.lost] = float("nan")
        scores.append(received)
        positions = torch.full((rows, capacity), -1, dtype=torch.int32)
        for row in range(rows):
            some = torch.randperm(now - 1, generator=generator)[: capacity - 1] + 1
            positions[row, 1 : 1 + len(some)] = some.to(torch.int32)
        positions[:, 0] = 0
        positions[torch.rand(rows, capacity, generator=generator) < 0.1] = -1
        slot_pos.append(positions[:1].expand(rows, -1).contiguous() if shared else positions)
    return settings, scores, slot_pos


def check(case: Case) -> None:
    stage = case.stage
    assert stage.operation is not None
    settings, scores, slot_pos = tensors_of(case, stage)
    wanted = stage(*settings, *scores, *slot_pos)
    capacities = stage.geometry.capacities
    launch = LineEvictLaunch(capacities, stage.geometry.rows, *list(stage.operation.attributes.values())[1:])
    results = line_evict(
        launch, *([tensor.to(DEVICE) for tensor in part] for part in (settings, scores, slot_pos))
    )
    for spec, ours, theirs in zip(stage.outputs, results, wanted, strict=True):
        # Of scores that are not a number the same ones are carried on.
        assert torch.equal(ours.cpu().nan_to_num(-1), theirs.nan_to_num(-1)), spec.name


@given(
    policy=st.sampled_from(NAMES),
    budgets=st.lists(st.integers(3, 5), min_size=1, max_size=2).map(tuple),
    guided=st.booleans(),
    recent=st.integers(0, GRID),
    anchors=st.integers(0, GRID),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 1000),
    spare=st.integers(0, 70),
    lost=st.sampled_from([0.0, 0.0, 0.2, 0.9]),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_kernel_does_what_the_stage_does(
    policy: str,
    budgets: tuple[int, ...],
    guided: bool,
    recent: int,
    anchors: int,
    flags: tuple[bool, bool, bool, bool],
    seed: int,
    spare: int,
    lost: float,
) -> None:
    flags = (*flags[:3], flags[3] and guided)
    check(Case(policy, budgets, guided, recent, anchors, flags, seed, spare=spare, lost=lost))


@pytest.mark.parametrize("policy", NAMES)
def test_more_slots_than_a_program_looks_at(policy: str) -> None:
    check(Case(policy, (12, 20, 12), True, 3, 2, (True, False, False, False), 5, heads=1))


@pytest.mark.parametrize("policy", NAMES)
def test_scores_that_are_no_numbers_go_last(policy: str) -> None:
    check(Case(policy, (3, 4), False, 2, 1, (True, False, False, False), 3, lost=1.0))


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("importance", [Importance.ATTENTION_PER_QUERY, Importance.POOLED_ATTENTION])
def test_work_grows_as_slots_do(importance: Importance, equal: bool) -> None:
    few, many = (work_of_a_row(slots, importance, equal) for slots in (256, 2048))
    # Of a bisection's steps there are some more. Comparing every slot with every other one is 64 times the work.
    assert many < 8 * 1.6 * few
    assert many < 2048 * 1000


def work_of_a_row(slots: int, importance: Importance, equal: bool) -> int:
    """How many numbers a line's end of 24 slots loads, stores and reckons; ``equal`` scores are settled by position.

    The image has six times as many positions as there are slots.
    """
    generator = torch.Generator().manual_seed(slots)
    launch = LineEvictLaunch((slots,), 1, 24, 1_000_000, 1, 1, 1, int(importance), 0)
    now = 6 * slots
    settings = [torch.tensor(number) for number in (24, 0, 0, 0, 0, 0)]
    scores = torch.zeros(1, slots) if equal else torch.rand(1, slots, generator=generator)
    slot_pos = torch.randperm(now, generator=generator)[:slots].to(torch.int32)[None]
    with watched() as memory:
        memory.allow(0, 1 << 62)
        due = [torch.tensor([now]), torch.tensor([0]), torch.zeros(1, 1, 24, dtype=torch.int64)]
        line_evict(launch, [torch.tensor([slots]), *settings, *due], [scores], [slot_pos])
    return memory.moved + memory.reckoned


def test_shapes_and_types_of_the_plugin_are_the_stage_s() -> None:
    for name in NAMES:
        stage = Case(name, (3, 4), True, 0, 0, (False,) * 4, 0).stage
        assert stage.operation is not None
        operation = LineEvict(**stage.operation.attributes)
        types = {torch.int64: "int64", torch.int32: "int32", torch.float32: "float32"}
        assert operation.input_types == tuple(types[spec.dtype] for spec in stage.inputs)
        assert operation.output_types == tuple(types[spec.dtype] for spec in stage.outputs)
        shapes = operation.output_shapes([spec.shape for spec in stage.inputs])
        assert shapes == [spec.shape for spec in stage.outputs]


def test_shapes_that_the_kernel_cannot_do_are_refused() -> None:
    with pytest.raises(ValueError, match="9000"):
        LineEvictLaunch((9000,), 4, 24, 24, 1, 2, 2, 0, 0)
    with pytest.raises(ValueError, match="5 rows"):
        LineEvictLaunch((97,), 5, 24, 24, 1, 2, 2, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_an_importance_that_was_worked_out_before_may_be_anything(seed: int) -> None:
    """So do the policies have it that the operation does not know: negative numbers, equal ones, infinity."""
    case = Case("linear", (3, 4), True, 2, 1, (True, False, False, False), seed)
    geometry = case.stage.geometry
    stage = LineEnd(
        Given(), memory_of(geometry.config, images=2, guided=True, capacities=geometry.capacities)
    )
    settings, scores, slot_pos = tensors_of(case, stage)
    importance = [-3.0 * score.round(decimals=1) for score in scores]
    importance[0][:, ::7] = -1e30
    importance[1][:, ::5] = float("inf")
    assert stage.operation is not None
    launch = LineEvictLaunch(
        geometry.capacities, geometry.rows, *list(stage.operation.attributes.values())[1:]
    )
    results = line_evict(
        launch, *([tensor.to(DEVICE) for tensor in part] for part in (settings, importance, slot_pos))
    )
    for spec, ours, theirs in zip(
        stage.outputs, results, stage(*settings, *importance, *slot_pos), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs), spec.name
