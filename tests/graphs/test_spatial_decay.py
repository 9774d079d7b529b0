"""Both forms of spatial decay against a double loop over all pairs of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.spatial_decay import Decay, DecayState, attend, factors, fold, step_index, weights
from linert.graphs.spatial_decay_step import StepInputs, reference

PREFIX = 3


def brute_force(q: Tensor, k: Tensor, v: Tensor, width: int, a: Tensor, b: Tensor, *, signed: bool) -> Tensor:
    """The definition, in float64, of ``[B, H, n, D]``; the first positions are the prefix, that nothing decays."""
    q, k, v, a, b = (part.double() for part in (q, k, v, a, b))
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        for s in range(t + 1):
            weight = torch.ones_like(a)
            if s >= PREFIX:
                at, source = divmod(t - PREFIX, width), divmod(s - PREFIX, width)
                across = at[1] - source[1]
                weight = a ** (at[0] - source[0]) * b ** (across if signed else abs(across))
            product = (q[:, :, t] * k[:, :, s]).sum(-1)
            out[:, :, t] += (weight * product)[..., None] * v[:, :, s]
    return out


def all_pairs(q: Tensor, k: Tensor, v: Tensor, width: int, decay: Decay) -> Tensor:
    at = torch.arange(q.shape[2])
    return attend(q, k, v, weights(at, at, PREFIX, width, decay).to(q.dtype))


def row_by_row(
    q: Tensor, k: Tensor, v: Tensor, width: int, decay: Decay, kept: torch.dtype = torch.float32
) -> Tensor:
    """Token by token; ``kept``: what the state is rounded to between rows."""
    sequences, heads, positions, size = q.shape
    rows, slots = sequences * heads, PREFIX + width
    line = torch.full((rows, 1, slots, size), 7.0, dtype=q.dtype)
    matrices = 1 if decay.signed else width
    state = DecayState(line, line.clone(), torch.zeros(rows, matrices, size, size))
    table = factors(width, decay)
    none = torch.zeros(sequences, dtype=torch.int64)
    out = []
    for t in range(positions):
        column = (t - PREFIX) % width if t >= PREFIX else 0
        index = step_index(none + t, none, PREFIX, width, signed=decay.signed)
        weighed = F.embedding(index, table).permute(0, 2, 1).reshape(rows, 1, 1, -1)
        slot = t if t < PREFIX else PREFIX + column
        attended, *line = reference(
            StepInputs(
                *(part[:, :, t].reshape(rows, 1, 1, -1) for part in (q, k, v)),
                state,
                torch.full((rows,), slot),
                torch.full((rows,), column if matrices > 1 else 0),
                *weighed.split([slots, 1], dim=-1),
            )
        )
        out.append(attended.reshape(sequences, heads, -1))
        state = DecayState(*line, state.above)
        if t >= PREFIX and column == width - 1:
            state = state._replace(above=fold(state, width, decay).to(kept).float())
    return torch.stack(out, dim=2)


def numbers(positions: int, heads: int = 2, size: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, PREFIX + positions, size, generator=generator) for _ in range(3)]


def decay_of(a: list[float], b: list[float], *, signed: bool) -> Decay:
    """``a``: the factor from row to row, or where ``signed``, along the raster from one row to the next."""
    return Decay(torch.tensor(a).log(), torch.tensor(b).log(), signed)


def whole_row(decay: Decay, width: int) -> Tensor:
    """The factor from a row to the next, of tokens in one column."""
    factor = decay.rows.exp()
    return factor * decay.columns.exp() ** (width - 1) if decay.signed else factor


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 6),
    lines=st.integers(1, 5),
    a=st.floats(1e-4, 1.0),
    b=st.floats(1e-4, 1.0),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_forms_equal_the_definition(
    width: int, lines: int, a: float, b: float, signed: bool, seed: int
) -> None:
    q, k, v = numbers(width * lines, seed=seed)
    decay = decay_of([a, 0.7], [b, 0.9], signed=signed)
    double = Decay(decay.rows.double(), decay.columns.double(), signed)
    wanted = brute_force(q, k, v, width, whole_row(double, width), double.columns.exp(), signed=signed)
    torch.testing.assert_close(all_pairs(q, k, v, width, decay), wanted.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(row_by_row(q, k, v, width, decay), wanted.float(), atol=1e-4, rtol=1e-4)


EXTREMES = [(0.9, 0.9), (0.9999, 0.9999), (1e-4, 0.5), (0.5, 1e-4), (1e-4, 0.9999), (1.0, 1.0), (1.0, 0.3)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("a", "b"), EXTREMES)
def test_the_forms_agree_over_a_large_grid(a: float, b: float, signed: bool) -> None:
    width = 32
    q, k, v = numbers(width * width, 1, 8)
    decay = decay_of([a], [b], signed=signed)
    one, other = all_pairs(q, k, v, width, decay), row_by_row(q, k, v, width, decay)
    assert (one - other).abs().max() <= 1e-4 * max(1.0, one.abs().max().item())


ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of a single number, a few times: queries, keys and values are rounded, and so is the result."""


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("halves", ROUNDING)
@pytest.mark.parametrize(("a", "b"), EXTREMES)
def test_halves_lose_no_more_than_their_own_rounding(
    a: float, b: float, halves: torch.dtype, signed: bool
) -> None:
    width = 16
    q, k, v = numbers(width * width, 1, 8)
    decay = decay_of([a], [b], signed=signed)
    wanted = all_pairs(*(part.double() for part in (q, k, v)), width, decay)
    rounded = row_by_row(*(part.to(halves) for part in (q, k, v)), width, decay)
    assert rounded.dtype is halves
    assert (rounded.double() - wanted).abs().max() <= ROUNDING[halves] * wanted.abs().max()


@pytest.mark.parametrize("halves", [torch.float16, torch.bfloat16])
def test_states_are_float32_for_a_reason(halves: torch.dtype) -> None:
    """With decays near 1 a state is a sum of hundreds of terms: in halves it loses what the products have."""
    width = 32
    q, k, v = (part.to(halves).float() for part in numbers(width * width, 1, 8))
    decay = decay_of([0.999], [0.999], signed=False)
    wanted = all_pairs(*(part.double() for part in (q, k, v)), width, decay)
    scale = wanted.abs().max()
    exact = (row_by_row(q, k, v, width, decay) - wanted).abs().max() / scale
    rounded = (row_by_row(q, k, v, width, decay, halves) - wanted).abs().max() / scale
    assert exact < 1e-5
    assert rounded > 100 * exact


def test_padding_before_the_prefix_is_not_seen() -> None:
    """Sequences of unequal prefixes, in one batch, as each by itself."""
    width, starts = 4, torch.tensor([0, 2])
    table = factors(width, decay_of([0.9], [0.8], signed=False))
    for position in (2, 3, 8):
        index = step_index(torch.full((2,), position), starts, PREFIX, width, signed=False)
        prefix = F.embedding(index, table)[:, :PREFIX, 0]
        assert prefix.tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
