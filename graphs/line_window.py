"""Windows of a line buffer: attention reads it, and when all layers are done one commit writes what was accepted.

Until its column is really reached, a slot that the line in progress will overwrite holds a token that single steps still see, and a draft
that is rejected must leave no trace. So the window's keys and values lie apart: query t sees the buffer but for the slots of
the columns up to its own, and the window's positions up to its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linert.graphs.line_attention import LineBufferState
from linert.graphs.memory import Projections, WindowStep
from linert.graphs.window import Accepted, Window

HIDDEN = -1e30
"""Added to the logits of what a query does not see."""


class Seen(NamedTuple):
    """What a layer's window hands from attention to the commit.

    ``k``, ``v``: ``[R, 1, T, D]``. ``received [R, T, C + T]`` float32: the attention that every query gave the slots, and behind them the
    positions of the window, averaged over the query heads.
    """

    k: Tensor
    v: Tensor
    received: Tensor


class LineWindowStep(WindowStep):
    """A window of every layer's line buffer.

    Args:
        window: where it lies.
        inputs: the decode stage's, by name.
    """

    def __init__(self, window: Window, inputs: Mapping[str, Tensor]) -> None:
        self.window = window
        self.geometry = geometry = window.geometry
        config = geometry.config
        columns = self._per_row(window.columns)
        slots = inputs["write_slots"].gather(2, columns.expand(config.layers, -1, -1))
        # The prefix lies in the slots of its positions' numbers.
        own = self._per_row(torch.maximum(window.at, window.starts[:, None]))
        slots = torch.where(geometry.per_row(window.in_prefix)[:, None], own, slots)
        # Positions that are not fed share the slot of the last that is, and hide it no later.
        fed, last = self._per_row(window.fed), self._per_row(window.last_fed)[:, None]
        last = last.expand(config.layers, -1, -1)
        self.slots = torch.where(fed, slots, slots.gather(2, last))
        self.offset = self._per_row(torch.minimum(window.offset, window.last_fed[:, None])).to(torch.int32)
        self.sees = torch.where(self._per_row(window.sees), 0.0, HIDDEN)
        self.positions = self._per_row(window.at).to(torch.int32)
        self.score_window, self.score_max = inputs["score_window"], inputs["score_max"] != 0

    def _per_row(self, values: Tensor) -> Tensor:
        """Repeat ``values [B, ...]`` for every KV head: ``[R, ...]``."""
        heads = self.geometry.config.kv_heads
        return values[:, None].expand(-1, heads, *values.shape[1:]).flatten(0, 1)

    def attend(self, layer: int, new: Projections, state: Sequence[Tensor]) -> tuple[Tensor, Seen]:
        geometry, width = self.geometry, self.window.width
        rows, group = geometry.rows, geometry.query_group
        buffer = LineBufferState(*state)
        # [B, T, heads, D] -> [R, 1, G T, D]
        q = new.q.transpose(1, 2).reshape(rows, 1, group * width, -1)
        k, v = (part.transpose(1, 2).reshape(rows, 1, width, -1) for part in new[1:])
        # The offset from which on a slot is hidden: -1 where it is empty, none where the window does not write it.
        hidden_from = torch.full_like(buffer.slot_pos, width).scatter(1, self.slots[layer], self.offset)
        hidden_from = torch.where(buffer.slot_pos < 0, -1, hidden_from)
        hidden = (hidden_from[:, None] <= self.window.offset[:, None].to(torch.int32)).float() * HIDDEN
        bias = torch.cat([hidden, self.sees], dim=-1).repeat(1, group, 1)[:, None]
        logits = torch.cat([q @ buffer.k_cache.mT, q @ k.mT], dim=-1).float() + bias
        probs = logits.softmax(-1)
        of_buffer, of_window = probs.type_as(q).split([buffer.k_cache.shape[2], width], dim=-1)
        attended = of_buffer @ buffer.v_cache + of_window @ v
        received = probs.reshape(rows, group, width, -1).mean(1)
        attended = attended.reshape(geometry.sequences, geometry.config.heads, width, -1)
        return attended.transpose(1, 2), Seen(k, v, received)

    def commit(
        self, layer: int, seen: Seen, state: Sequence[Tensor], accepted: Accepted
    ) -> tuple[Tensor, ...]:
        buffer = LineBufferState(*state)
        last = self._per_row(accepted.last)[:, None]
        written = self._per_row(accepted.written)
        # What is not written takes the place of the last that is, with the same: a slot is written once, or twice alike.
        slots = torch.where(written, self.slots[layer], self.slots[layer].gather(1, last))
        positions = torch.where(written, self.positions, self.positions.gather(1, last))
        k, v = (self._of_written(part.squeeze(1), written, last) for part in (seen.k, seen.v))
        rows = torch.arange(len(slots))[:, None]
        place = (rows, torch.zeros_like(slots), slots)
        weights, kept = self._accounting(accepted)
        sums = (weights[:, None] @ seen.received).squeeze(1)
        largest = (weights[:, :, None] * seen.received).amax(1)
        old = buffer.scores * kept
        received = torch.where(self.score_max, largest, sums)
        of_buffer, of_window = received.split([old.shape[1], self.window.width], dim=-1)
        scores = torch.where(self.score_max, torch.maximum(old, of_buffer), old + of_buffer)
        of_window = torch.where(written, of_window, of_window.gather(1, last))
        return (
            buffer.k_cache.index_put(place, k),
            buffer.v_cache.index_put(place, v),
            scores.scatter(1, slots, of_window),
            buffer.slot_pos.scatter(1, slots, positions),
        )

    def _of_written(self, values: Tensor, written: Tensor, last: Tensor) -> Tensor:
        """``values [R, T, D]`` where they are written, elsewhere the last that is."""
        chosen = values.gather(1, last[:, :, None].expand(-1, -1, values.shape[2]))
        return torch.where(written[:, :, None], values, chosen)

    def _accounting(self, accepted: Accepted) -> tuple[Tensor, Tensor]:
        """Which queries count in the scores, ``[R, T]`` float32, and whether what was counted before still does, ``[R, 1]``.

        Where a policy counts a line's last queries alone, the scores start again with the first of them.
        """
        window, line_width = self.window, self.geometry.config.line_width
        restart = (line_width - self.score_window - window.column) % line_width
        restarts = (self.score_window > 0) & (restart <= accepted.last)
        first = torch.where(restarts, restart, 0)
        counted = accepted.mask & (window.offset >= first[:, None])
        return self._per_row(counted.float()), self.geometry.per_row((~restarts).float())[:, None]
