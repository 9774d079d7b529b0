"""Linear attention whose decay follows the distance of two tokens in the image (after LASAD, arXiv 2507.01652).

The query at row r and column c weighs the token at (r', c'), which comes before it in raster order or is itself, with
``a^(r - r') b^|c - c'|``: a row decay and a column decay a head, between 0 and 1, and nothing else (no softmax, no denominator).
What comes before the image is seen without decay. The published formula is not public; this one is ours, and is the distance
that the name says. Signed decay has ``c - c'`` in the place of ``|c - c'|``, and ``a = g b^(W - 1)`` with g between 0 and 1: along
the raster every token is weighed by b, and by g from a row to the next. Where g is b as well it is the ordinary decay of a sequence.

The same attention in two forms: all weights at once (:func:`weights`) for training and reference; and line by line, with one
matrix a column for everything above, which is all that a decode step reads of it:

    o = q T_c + sum over c' <= c of b^(c - c') (q k_c') v_c' + sum over the prefix of (q k) v
    at a line's end  T_c <- a (T_c + sum over c' of b^|c - c'| k_c' v_c'^T)

Signed decay has one matrix for all columns: ``o = b^c q T + ...`` and ``T <- a T + g sum b^(W - 1 - c') k_c' v_c'^T``. Everything that
decays does so by factors below 1, so that nothing overflows whatever the decays.

Axes: R = sequences x heads, H = heads, W = columns of the image, M = matrices of a state (W or 1), C = slots (prefix + W),
D = size of a key, E = size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Decay(NamedTuple):
    """Logarithms, at most 0, of what is weighed from one row to the next and from one column to the next: ``[H]`` each.

    ``rows``: of a, or where the decay is ``signed`` of g.
    """

    rows: Tensor
    columns: Tensor
    signed: bool

    def whole_row(self, width: int) -> Tensor:
        """The logarithm of a: ``[H]``."""
        return self.rows + (width - 1) * self.columns if self.signed else self.rows


def weights(held: Tensor, seen: Tensor, prefix_len: int, width: int, decay: Decay) -> Tensor:
    """What queries at positions ``held [n]`` give keys at positions ``seen [m]``: ``[H, n, m]``, 0 where the key comes later.

    Positions count from the beginning of the prefix.
    """
    query, key = (held - prefix_len)[:, None], (seen - prefix_len)[None]
    down = query // width - key // width
    across = query % width - key % width
    if not decay.signed:
        across = across.abs()
    found = down * decay.whole_row(width)[:, None, None] + across * decay.columns[:, None, None]
    found = found.masked_fill(key < 0, 0.0).masked_fill(key > query, float("-inf"))
    return found.exp()


def attend(q: Tensor, k: Tensor, v: Tensor, weighed: Tensor) -> Tensor:
    """``[..., n, E]``: queries ``[..., n, D]`` read keys ``[..., m, D]`` and values ``[..., m, E]``, ``weighed [..., n, m]``."""
    return ((q @ k.mT) * weighed) @ v


class DecayState(NamedTuple):
    """What a layer keeps of a sequence.

    ``k_line``, ``v_line``: ``[R, 1, C, D or E]``, keys and values of the prefix and of the line in progress. ``above``: T,
    ``[R, M, D, E]`` float32: sums of many terms, each of which may be small beside the sum.
    """

    k_line: Tensor
    v_line: Tensor
    above: Tensor


def factors(width: int, decay: Decay) -> Tensor:
    """``[W + 2, H]`` float32: powers of b from 0 to W - 1, then 1 and 0; :func:`step_index` says which of them weigh what."""
    powers = torch.arange(width)[:, None] * decay.columns.float()
    constant = torch.tensor([[1.0], [0.0]]).expand(-1, powers.shape[1])
    return torch.cat([powers.exp(), constant])


def step_index(held: Tensor, starts: Tensor, prefix_len: int, width: int, *, signed: bool) -> Tensor:
    """Which of :func:`factors` weigh what the tokens at positions ``held [B]`` read.

    Args:
        starts: ``[B]``, padding at the beginning of the prefix.

    Returns:
        ``[B, C + 1]`` int64: for each slot, and last for T.
    """
    visible, hidden = width, width + 1
    slot = torch.arange(prefix_len)[None]
    last = torch.maximum(held, starts)[:, None]
    prefix = torch.where((slot >= starts[:, None]) & (slot <= last), visible, hidden)
    column = ((held - prefix_len) % width)[:, None]
    back = column - torch.arange(width)[None]
    row = torch.where((back >= 0) & (held >= prefix_len)[:, None], back, hidden)
    return torch.cat([prefix, row, column if signed else torch.full_like(column, visible)], dim=1)


def fold(state: DecayState, width: int, decay: Decay, due: Tensor | None = None) -> Tensor:
    """``above`` for the next line, ``[R, M, D, E]``, when all of a line lies in the last W slots.

    ``due``: ``[R]`` bool, the rows of which that is so; the others stay as they are. None is all.
    """
    columns = torch.arange(width)
    apart = (
        width - 1 - columns[None] if decay.signed else (columns[:, None] - columns).abs()
    )  # [M, W]: how far a token decays on its way to a matrix
    powers = factors(width, decay)
    heads = powers.shape[1]
    reached = F.embedding(apart, powers).permute(2, 0, 1) * decay.rows.float().exp()[:, None, None]
    keys = state.k_line[:, 0, -width:].float().unflatten(0, (-1, heads))  # [B, H, W, D]
    values = state.v_line[:, :, -width:].float()
    spread = keys.mT[:, :, None] * reached[:, :, None]  # [B, H, M, D, W]
    fresh = spread.flatten(0, 1).flatten(1, 2) @ values.squeeze(1)
    left = decay.whole_row(width).float().exp()
    left = left[None, :, None, None, None].expand(len(keys), -1, 1, 1, 1).flatten(0, 1)
    fresh = fresh.unflatten(1, (len(apart), -1))
    if due is not None:
        # Sums and products, so that what is replaced where it lies has one reader.
        ends = due[:, None, None, None]
        left, fresh = torch.where(ends, left, 1.0), torch.where(ends, fresh, 0.0)
    return state.above * left + fresh
