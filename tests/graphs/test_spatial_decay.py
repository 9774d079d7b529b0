"""Both forms of spatial decay against a double loop over all pairs of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.spatial_decay import Decay, DecayState, empty_state, end_row, parallel, see_prefix, step


def brute_force(q: Tensor, k: Tensor, v: Tensor, width: int, a: Tensor, b: Tensor) -> Tensor:
    """The definition, in float64."""
    q, k, v, a, b = (part.double() for part in (q, k, v, a, b))
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=torch.float64)
    for t in range(q.shape[1]):
        for s in range(t + 1):
            down, across = t // width - s // width, abs(t % width - s % width)
            weight = a**down * b**across * (q[:, t] * k[:, s]).sum(-1)
            out[:, t] += weight[:, None] * v[:, s]
    return out


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    width: int,
    decay: Decay,
    prefix: tuple[Tensor, Tensor] | None = None,
    halve: torch.dtype | None = None,
) -> Tensor:
    """Token by token; ``halve`` keeps states in that type between steps."""
    rows, tokens = q.shape[:2]
    state = empty_state(rows, width, q.shape[2], v.shape[2])
    for key, value in zip(*(part.unbind(1) for part in prefix), strict=True) if prefix else ():
        state = see_prefix(state, key, value)
    out = []
    for t in range(tokens):
        column = torch.full((rows,), t % width)
        found, state = step(q[:, t], k[:, t], v[:, t], column, state, decay)
        out.append(found)
        if t % width == width - 1:
            state = end_row(state, decay)
        if halve is not None:
            state = DecayState(*(part.to(halve).float() for part in state))
    return torch.stack(out, dim=1)


def numbers(
    rows: int, tokens: int, key_dim: int = 5, value_dim: int = 3, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(rows, tokens, size, generator=generator) for size in shapes)
    return q, k, v


def decay_of(a: Tensor, b: Tensor) -> Decay:
    return Decay(a.log(), b.log())


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 6),
    lines=st.integers(1, 5),
    a=st.floats(1e-6, 1.0),
    b=st.floats(1e-6, 1.0),
    seed=st.integers(0, 99),
)
def test_both_forms_equal_the_definition(width: int, lines: int, a: float, b: float, seed: int) -> None:
    q, k, v = numbers(2, width * lines, seed=seed)
    rows, columns = torch.tensor([a, 0.7]), torch.tensor([b, 0.9])
    wanted = brute_force(q, k, v, width, rows, columns).float()
    decay = decay_of(rows, columns)
    torch.testing.assert_close(parallel(q, k, v, width, decay), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recurrent(q, k, v, width, decay), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b"), [(0.9, 0.9), (0.999, 0.999), (1e-4, 0.5), (0.5, 1e-4), (1.0, 1.0), (1.0, 0.3)]
)
def test_the_forms_agree_over_a_large_grid(a: float, b: float) -> None:
    width, rows = 32, 2
    q, k, v = numbers(rows, width * width, 8, 8)
    # A prefix of three positions, which nothing decays.
    _, keys, values = numbers(rows, 3, 8, 8, seed=1)
    decay = decay_of(torch.full((rows,), a), torch.full((rows,), b))
    one = parallel(q, k, v, width, decay, (keys, values))
    other = recurrent(q, k, v, width, decay, (keys, values))
    assert (one - other).abs().max() <= 1e-4 * max(1.0, one.abs().max().item())


@pytest.mark.parametrize("halves", [torch.float16, torch.bfloat16])
def test_states_are_float32_for_a_reason(halves: torch.dtype) -> None:
    """With decays near 1 a state is a sum of hundreds of terms: in halves it loses what the products have."""
    width = 32
    q, k, v = (part.to(halves).float() for part in numbers(1, width * width, 8, 8))
    decay = decay_of(torch.tensor([0.999]), torch.tensor([0.999]))
    wanted = parallel(q.double(), k.double(), v.double(), width, Decay(*(part.double() for part in decay)))
    scale = wanted.abs().max()
    exact = (recurrent(q, k, v, width, decay) - wanted).abs().max() / scale
    rounded = (recurrent(q, k, v, width, decay, halve=halves) - wanted).abs().max() / scale
    assert exact < 1e-5
    assert rounded > 100 * exact
