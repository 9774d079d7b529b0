"""The kernels of linear attention against the PyTorch references: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from linert.exporter.tensorrt.launch import spatial_decay_step, spatial_decay_window
from linert.graphs.spatial_decay import DecayState
from linert.graphs.spatial_decay_step import StepInputs, reference
from linert.graphs.spatial_decay_window import WindowInputs
from linert.graphs.spatial_decay_window import reference as window_reference
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindowLaunch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to what is attended: one rounding to the type of the values, about 3."""


@dataclasses.dataclass(frozen=True)
class InParts(SpatialDecayStepLaunch):
    """As many values to a part as the test says."""

    wanted: int = 0

    @property
    def part_values(self) -> int:
        return self.wanted


def inputs_of(
    rows: int, slots: int, matrices: int, key: int, value: int, dtype: torch.dtype, seed: int = 0
) -> StepInputs:
    """A row half full: the slots behind the new token's weigh nothing, and hold no number."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slot = torch.randint(slots, (rows,), generator=generator)
    weighed = torch.rand(rows, 1, 1, slots, generator=generator)
    hidden = torch.arange(slots) > slot[:, None]
    lines = [normal(rows, 1, slots, size) for size in (key, value)]
    for line in lines:
        line[:, 0][hidden] = float("nan")
    state = DecayState(*lines, torch.randn(rows, matrices, key, value, generator=generator))
    new = normal(rows, 1, 1, key), normal(rows, 1, 1, key), normal(rows, 1, 1, value)
    matrix = torch.randint(matrices, (rows,), generator=generator)
    share = torch.rand(rows, 1, 1, 1, generator=generator)
    return StepInputs(*new, state, slot, matrix, weighed.masked_fill(hidden[:, None, None], 0.0), share)


def check(inputs: StepInputs, launch: SpatialDecayStepLaunch | None = None) -> None:
    clean = DecayState(*(part.nan_to_num() for part in inputs.state))
    wanted, k_line, v_line = reference(inputs._replace(state=clean))
    on_device = [tensor.to(DEVICE).clone() for tensor in inputs.flat()]
    device_inputs = StepInputs(*on_device[:3], DecayState(*on_device[3:6]), *on_device[6:])
    result = spatial_decay_step(device_inputs, launch).cpu()
    bound = TOLERANCE[inputs.q.dtype] * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(result, wanted, atol=bound, rtol=0)
    hidden = inputs.weighed[:, 0, 0] == 0
    for ours, theirs in ((device_inputs.state.k_line, k_line), (device_inputs.state.v_line, v_line)):
        assert torch.equal(ours.cpu()[:, 0][~hidden], theirs[:, 0][~hidden])
        assert ours.cpu()[:, 0][hidden].isnan().all()
    assert torch.equal(device_inputs.state.above.cpu(), inputs.state.above)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "slots", "matrices", "key", "value"),
    [(4, 25, 24, 64, 64), (3, 17, 16, 32, 32), (2, 9, 1, 48, 20), (1, 1, 1, 4, 4), (300, 5, 2, 8, 8)],
)
def test_the_kernel_does_what_the_reference_does(
    rows: int, slots: int, matrices: int, key: int, value: int, dtype: torch.dtype
) -> None:
    check(inputs_of(rows, slots, matrices, key, value, dtype))


@given(
    rows=st.integers(1, 4),
    slots=st.integers(1, 70),
    matrices=st.integers(1, 5),
    key=st.integers(1, 40),
    value=st.integers(1, 40),
    part=st.sampled_from([1, 4, 16, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_in_any_parts(
    rows: int, slots: int, matrices: int, key: int, value: int, part: int, seed: int
) -> None:
    inputs = inputs_of(rows, slots, matrices, key, value, torch.float32, seed)
    check(inputs, InParts(rows, slots, matrices, key, value, "float32", part))


def test_few_rows_are_shared_by_programs() -> None:
    few = SpatialDecayStepLaunch(24, 25, 24, 64, 64, "float16")
    assert (few.parts, few.part_values) == (4, 16)
    assert SpatialDecayStepLaunch(6144, 25, 24, 64, 64, "float16").parts == 1


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 9000, 1, 64, 64, "float32"), "9000 slots"),
        ((2, 9, 1, 300, 64, "float32"), "keys of 300"),
        ((2, 9, 1, 64, 0, "float32"), "values of 0"),
        ((2, 9, 1, 64, 64, "int8"), "caches of int8"),
        ((0, 9, 1, 64, 64, "float32"), "0 rows"),
    ],
)
def test_shapes_that_the_kernel_cannot_do_are_refused(
    shape: tuple[int, int, int, int, int, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SpatialDecayStepLaunch(*shape)


def window_inputs_of(
    rows: int, width: int, slots: int, matrices: int, key: int, value: int, dtype: torch.dtype, seed: int = 0
) -> WindowInputs:
    """Positions of a window lie beside each other, the last of them once more; slots behind them weigh nothing, and hold no number."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    first = torch.randint(max(1, slots - width + 1), (rows, 1), generator=generator)
    fed = torch.randint(1, width + 1, (rows, 1), generator=generator)
    source = torch.minimum(torch.arange(width), fed - 1).clamp(max=slots - 1)
    slot = (first + source).clamp(max=slots - 1)
    hidden = torch.arange(slots) > slot[:, :, None]
    lines = [normal(rows, 1, slots, size) for size in (key, value)]
    for line in lines:
        line[:, 0][hidden.all(1)] = float("nan")
    at = source[:, :, None]
    k, v = (normal(rows, width, size).gather(1, at.expand(-1, -1, size)) for size in (key, value))
    place = torch.stack([torch.arange(rows)[:, None].expand_as(slot), torch.zeros_like(slot), slot], dim=-1)
    weighed = torch.rand(rows, width, slots, generator=generator).masked_fill(hidden, 0.0)
    state = DecayState(*lines, torch.randn(rows, matrices, key, value, generator=generator))
    matrix = torch.randint(matrices, (rows, width), generator=generator)
    share = torch.rand(rows, 1, width, 1, generator=generator)
    return WindowInputs(normal(rows, 1, width, key), k, v, state, place, matrix, weighed[:, None], share)


def check_window(inputs: WindowInputs) -> None:
    clean = DecayState(*(part.nan_to_num() for part in inputs.state))
    wanted, k_line, v_line = window_reference(inputs._replace(state=clean))
    on_device = [tensor.to(DEVICE).clone() for tensor in inputs.flat()]
    device_inputs = WindowInputs(*on_device[:3], DecayState(*on_device[3:6]), *on_device[6:])
    result = spatial_decay_window(device_inputs).cpu()
    bound = TOLERANCE[inputs.q.dtype] * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(result, wanted, atol=bound, rtol=0)
    for ours, theirs in ((device_inputs.state.k_line, k_line), (device_inputs.state.v_line, v_line)):
        assert torch.equal(ours.cpu().nan_to_num(), theirs)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "width", "slots", "matrices", "key", "value"),
    [(3, 4, 25, 24, 32, 64), (2, 8, 9, 1, 20, 12), (1, 1, 1, 1, 4, 4), (70, 2, 5, 2, 4, 4)],
)
def test_the_window_kernel_does_what_the_reference_does(
    rows: int, width: int, slots: int, matrices: int, key: int, value: int, dtype: torch.dtype
) -> None:
    check_window(window_inputs_of(rows, width, slots, matrices, key, value, dtype))


@given(
    rows=st.integers(1, 3),
    width=st.integers(1, 6),
    slots=st.integers(1, 20),
    matrices=st.integers(1, 4),
    key=st.integers(1, 20),
    value=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_windows_of_any_shape(
    rows: int, width: int, slots: int, matrices: int, key: int, value: int, seed: int
) -> None:
    check_window(window_inputs_of(rows, width, slots, matrices, key, value, torch.float32, seed))


def test_windows_that_are_too_wide_are_refused() -> None:
    with pytest.raises(ValueError, match="windows of 65 positions; can be 1 to 64"):
        SpatialDecayWindowLaunch(SpatialDecayStepLaunch(1, 9, 1, 4, 4, "float32"), 65)
