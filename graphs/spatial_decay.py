"""Linear attention whose decay follows the distance of two tokens in the image (after LASAD, arXiv 2507.01652).

The query at row r and column c weighs the token at (r', c'), which comes before it in raster order or is itself, with
``a^(r - r') b^|c - c'|``: a row decay and a column decay a head, between 0 and 1, and nothing else (no softmax, no denominator).
The published formula is not public; this one is ours, and is the distance that the name says.

The same attention in two forms: :func:`parallel` for training and reference, over whole images; and a recurrence that needs one line of states:

    S_c   what the rows above hold of column c, decayed to this row
    R_c   sum over c' > c of b^(c' - c) S_c'                   made once a row, from right to left
    L     what lies above on the left, above, and in this row so far: L <- b L + S_c + k v^T
    o   = q (L + R_c)

and S_c becomes ``a (S_c + k v^T)`` for the next row. A prefix is seen by all of the image without decay, as one more state P.

Axes: R = sequences x heads, W = columns, N = image tokens, D = size of a key, E = size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decay(NamedTuple):
    """Logarithms, below 0, of the decay from row to row and from column to column: ``[R]`` each, or broadcastable to it."""

    rows: Tensor
    columns: Tensor


class DecayState(NamedTuple):
    """What an image's past leaves, in float32: sums of many terms, each of which may be small beside the sum.

    ``columns``: S, ``[R, W, D, E]``. ``right``: R, likewise. ``running``: L, ``[R, D, E]``. ``prefix``: P, likewise.
    """

    columns: Tensor
    right: Tensor
    running: Tensor
    prefix: Tensor


def log_weights(width: int, tokens: int, decay: Decay) -> Tensor:
    """Logarithms of the weights ``[R, tokens, tokens]`` of every token's (last axis) for every query; -inf where it comes later."""
    at = torch.arange(tokens)
    row, column = at // width, at % width
    down = row[:, None] - row[None]
    across = (column[:, None] - column[None]).abs()
    found = down * decay.rows[:, None, None] + across * decay.columns[:, None, None]
    return found.masked_fill(at[None] > at[:, None], float("-inf"))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, width: int, decay: Decay, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of all queries at once.

    Args:
        q, k: ``[R, n, D]``, the first n tokens of an image in raster order.
        v: ``[R, n, E]``.
        width: tokens in a row of the image.
        prefix: keys ``[R, T, D]`` and values ``[R, T, E]`` that all of them see without decay.

    Returns:
        ``[R, n, E]``.
    """
    weights = (q @ k.mT) * log_weights(width, q.shape[1], decay).exp()
    attended = weights @ v
    if prefix is None:
        return attended
    keys, values = prefix
    return attended + q @ (keys.mT @ values)


def empty_state(rows: int, width: int, key_dim: int, value_dim: int) -> DecayState:
    """Before anything was seen."""
    line = torch.zeros(rows, width, key_dim, value_dim)
    one = torch.zeros(rows, key_dim, value_dim)
    return DecayState(line, line.clone(), one, one.clone())


def see_prefix(state: DecayState, k: Tensor, v: Tensor) -> DecayState:
    """Take a position of the prefix, ``k [R, D]`` and ``v [R, E]``, into the state."""
    return state._replace(prefix=state.prefix + outer(k, v))


def step(
    q: Tensor, k: Tensor, v: Tensor, column: Tensor, state: DecayState, decay: Decay
) -> tuple[Tensor, DecayState]:
    """Take the token at ``column`` into the state and read what it sees.

    Args:
        q, k: ``[R, D]``.
        v: ``[R, E]``.
        column: ``[R]`` int64, of the token in its row.

    Returns:
        ``[R, E]``, and the state after it.
    """
    pair = outer(k, v)
    index = column[:, None, None, None].expand(-1, 1, *pair.shape[1:])
    above = state.columns.gather(1, index).squeeze(1)
    right = state.right.gather(1, index).squeeze(1)
    running = decay.columns.exp()[:, None, None] * state.running + above + pair
    attended = (q.float()[:, None] @ (running + right + state.prefix)).squeeze(1)
    folded = decay.rows.exp()[:, None, None] * (above + pair)
    columns = state.columns.scatter(1, index, folded[:, None])
    return attended.to(q.dtype), state._replace(columns=columns, running=running)


def end_row(state: DecayState, decay: Decay) -> DecayState:
    """Make the right-hand sums of the next row, and begin it."""
    width = state.columns.shape[1]
    factor = decay.columns.exp()[:, None, None]
    held = torch.zeros_like(state.running)
    right = [held]
    for column in range(width - 1, 0, -1):
        held = factor * (held + state.columns[:, column])
        right.append(held)
    return state._replace(right=torch.stack(right[::-1], dim=1), running=torch.zeros_like(state.running))


def outer(k: Tensor, v: Tensor) -> Tensor:
    """``k v^T``: ``[R, D, E]`` float32."""
    return k.float()[:, :, None] * v.float()[:, None]
