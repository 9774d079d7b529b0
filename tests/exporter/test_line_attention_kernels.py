"""The LineAttention kernels against the PyTorch reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from linert.exporter.tensorrt.launch import line_attention
from linert.graphs.line_attention import reference
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from tests.graphs.test_line_attention import Inputs, bundled, random_inputs

Shape = tuple[int, int, int, int, str]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of what is attended: one rounding to the type of the values, about 3."""


@dataclasses.dataclass(frozen=True)
class InParts(LineAttentionLaunch):
    """As many slots to a part as the test says."""

    wanted: int = 0

    @property
    def part_slots(self) -> int:
        return self.wanted

    @classmethod
    def of(cls, launch: LineAttentionLaunch, wanted: int) -> InParts:
        return cls(*dataclasses.astuple(launch), wanted)


def laid_out(shape: Shape, warps: int, tile: int) -> LineAttentionLaunch:
    """A launch of so many times the warps that the shape needs, and of programs that read so much at once."""
    return LineAttentionLaunch(*shape, warps * LineAttentionLaunch.tuned(*shape).warps, tile)


def inputs_of(rows: int, group: int, slots: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    inputs = random_inputs(rows, group, slots, head_dim, seed)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        inputs[name] = inputs[name].to(dtype)
    return inputs


def poisoned(inputs: Inputs) -> Inputs:
    """A copy in which everything that nobody wrote is not a number."""
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    written = inputs["slot_pos"] >= 0
    for name in ("k_cache", "v_cache"):
        copies[name][:, 0][~written] = float("nan")
    return copies


def check(inputs: Inputs, launch: LineAttentionLaunch | None = None) -> None:
    dtype = inputs["q"].dtype
    wide = {name: t.float() if t.dtype is dtype else t for name, t in inputs.items()}
    attended, after = reference(bundled(wide))
    device_inputs = bundled({name: tensor.to(DEVICE) for name, tensor in poisoned(inputs).items()})
    state = device_inputs.state
    result = line_attention(device_inputs, launch)
    torch.testing.assert_close(result.cpu().float(), attended, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(state.scores.cpu(), after.scores, atol=3e-6, rtol=1e-6)
    assert torch.equal(state.slot_pos.cpu(), after.slot_pos)
    written = after.slot_pos >= 0
    for name in ("k_cache", "v_cache"):
        ours, theirs = getattr(state, name).cpu()[:, 0], getattr(after, name)[:, 0].to(dtype)
        assert torch.equal(ours[written], theirs[written])
        assert ours[~written].isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "group", "slots", "head_dim"),
    [
        *[(4, 1, 97, 64), (3, 1, 97, 100), (2, 4, 145, 128), (2, 3, 33, 48), (2, 1, 1, 4), (20, 1, 5, 4)],
        *[(2, 8, 33, 128), (1, 16, 9, 256)],
    ],
)
def test_kernels_do_what_the_reference_does(
    rows: int, group: int, slots: int, head_dim: int, dtype: torch.dtype
) -> None:
    check(inputs_of(rows, group, slots, head_dim, dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_many_slots_are_shared_by_programs(dtype: torch.dtype) -> None:
    launch = LineAttentionLaunch.tuned(2, 1, 601, 64, str(dtype).removeprefix("torch."))
    assert launch.split
    assert launch.parts > 4
    check(inputs_of(2, 1, 601, 64, dtype))


def test_rows_enough_are_not_shared() -> None:
    assert not LineAttentionLaunch.tuned(2560, 1, 601, 64, "float16").split
    assert LineAttentionLaunch.tuned(40, 1, 601, 64, "float16").split
    assert not LineAttentionLaunch.tuned(40, 1, 64, 64, "float16").split


@given(
    rows=st.integers(1, 5),
    group=st.integers(1, 5),
    slots=st.integers(1, 80),
    head_dim=st.integers(1, 10).map(lambda quarter: 4 * quarter),
    part_slots=st.integers(1, 80),
    warps=st.sampled_from([1, 2, 4]),
    tile=st.sampled_from([1, 256, 1024]),
    seed=st.integers(0, 1000),
    score_max=st.booleans(),
    restart=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_in_any_parts(
    rows: int,
    group: int,
    slots: int,
    head_dim: int,
    part_slots: int,
    warps: int,
    tile: int,
    seed: int,
    score_max: bool,
    restart: bool,
) -> None:
    inputs = inputs_of(rows, group, slots, head_dim, torch.float32, seed)
    inputs["score_max"] = torch.tensor(score_max)
    if restart:
        inputs["fresh_from"] = torch.full_like(inputs["fresh_from"], -1)
    launch = laid_out((rows, group, slots, head_dim, "float32"), warps, tile)
    check(inputs, InParts.of(launch, min(part_slots, slots)))


def test_a_buffer_with_nothing_but_the_new_token() -> None:
    inputs = inputs_of(3, 2, 70, 16, torch.float32)
    inputs["slot_pos"] = torch.full_like(inputs["slot_pos"], -1)
    check(inputs)
    check(inputs, InParts.of(LineAttentionLaunch.tuned(3, 2, 70, 16, "float32"), 20))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 9000, 64, "float32"), "9000 slots"),
        ((2, 17, 9, 64, "float32"), "17 query heads"),
        ((2, 1, 9, 66, "float32"), "heads of 66"),
        ((2, 1, 9, 64, "int8"), "caches of int8"),
        ((0, 1, 9, 64, "float32"), "0 rows"),
    ],
)
def test_shapes_that_the_kernels_cannot_do_are_refused(shape: Shape, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LineAttentionLaunch.tuned(*shape)


def test_a_tensor_of_another_shape_is_refused() -> None:
    inputs = inputs_of(2, 1, 9, 8, torch.float32)
    inputs["k"] = inputs["k"][:1]
    with pytest.raises(ValueError, match=r"k is torch.float32 \(1, 1, 1, 8\)"):
        check(inputs)
