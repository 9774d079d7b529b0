"""Windows of a line buffer: attention reads it, and when all layers are done one commit writes what was accepted.

Until its column is really reached, a slot that the line in progress will overwrite holds a token that single steps still see, and a draft
that is rejected must leave no trace. So the window's keys and values lie apart: query t sees the buffer but for the slots of
the columns up to its own, and the window's positions up to its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from linert.graphs.line_attention import LineBufferState
from linert.graphs.line_window_attention import HIDDEN, LineWindowAttentionInputs, line_window_attention
from linert.graphs.line_window_commit import WindowCommit, WindowLayer, line_window_commit
from linert.graphs.memory import Projections, WindowStep
from linert.graphs.pieces import joined, parted
from linert.graphs.window import Accepted, Window


class LineWindowStep(WindowStep):
    """A window of every layer's line buffer.

    What does not depend on a layer's keys is worked out for all layers of one capacity together: on small models an operation costs
    more than its numbers.

    Args:
        window: where it lies.
        inputs: the decode stage's, by name.
        state: every layer's.
    """

    def __init__(
        self, window: Window, inputs: Mapping[str, Tensor], state: Sequence[Sequence[Tensor]]
    ) -> None:
        self.window = window
        self.geometry = geometry = window.geometry
        self.buffers = [LineBufferState(*tensors) for tensors in state]
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
        self.positions = self._per_row(window.at).to(torch.int32)
        self.score_window, self.score_max = inputs["score_window"], inputs["score_max"] != 0
        self.bias = self._bias()

    def _groups(self) -> list[list[int]]:
        """Layers of one capacity that follow each other."""
        capacities = self.geometry.capacities
        return [
            list(group) for _, group in itertools.groupby(range(len(capacities)), lambda k: capacities[k])
        ]

    def _per_row(self, values: Tensor) -> Tensor:
        """Repeat ``values [B, ...]`` for every KV head: ``[R, ...]``."""
        heads = self.geometry.config.kv_heads
        return values[:, None].expand(-1, heads, *values.shape[1:]).flatten(0, 1)

    def _bias(self) -> list[Tensor]:
        """What is added to the logits of every layer, ``[R, 1, T, C + T]``."""
        window, width = self.window, self.window.width
        rows = self.geometry.rows
        offset = self._per_row(torch.minimum(window.offset, window.last_fed[:, None])).to(torch.int32)
        seen = torch.where(self._per_row(window.sees), 0.0, HIDDEN)
        bias: list[Tensor] = []
        for group in self._groups():
            slot_pos = joined([self.buffers[layer].slot_pos for layer in group])
            slots = self.slots[group[0] : group[-1] + 1].flatten(0, 1)
            of_group = [len(group), -1, -1]
            # The offset from which on a slot is hidden: -1 where it is empty, none where the window does not write it.
            offsets = offset.expand(of_group).flatten(0, 1)
            hidden_from = torch.full_like(slot_pos, width).scatter(1, slots, offsets)
            hidden_from = torch.where(slot_pos < 0, -1, hidden_from)
            hidden = (hidden_from[:, None] <= window.offset[:, None].to(torch.int32)).float() * HIDDEN
            of_window = seen.expand([len(group), -1, -1, -1]).flatten(0, 1)
            bias += parted(torch.cat([hidden, of_window], dim=-1)[:, None], rows)
        return bias

    def attend(self, layer: int, new: Projections) -> tuple[Tensor, WindowLayer]:
        geometry, width = self.geometry, self.window.width
        rows, buffer = geometry.rows, self.buffers[layer]
        # [B, T, heads, D] -> [R, G, T, D]
        q = new.q.transpose(1, 2).reshape(rows, geometry.query_group, width, -1)
        k, v = (part.transpose(1, 2).reshape(rows, 1, width, -1) for part in new[1:])
        inputs = LineWindowAttentionInputs(q, k, v, buffer.k_cache, buffer.v_cache, self.bias[layer])
        attended, received, k_cache, v_cache = line_window_attention(inputs)
        attended = attended.reshape(geometry.sequences, geometry.config.heads, width, -1)
        return attended.transpose(1, 2), WindowLayer(
            k, v, received, k_cache, v_cache, buffer.scores, buffer.slot_pos
        )

    def commit(self, seen: Sequence[WindowLayer], accepted: Accepted) -> Sequence[tuple[Tensor, ...]]:
        layers = self.geometry.config.layers
        # What is not written takes the place of the last that is, with the same: a slot is written once, or twice alike.
        source = torch.where(accepted.written, self.window.offset, accepted.last[:, None])
        source = self._per_row(source)
        slots = self.slots.gather(2, source.expand(layers, -1, -1))
        counted, kept = self._accounting(accepted)
        written = WindowCommit(slots, source, self.positions.gather(1, source), counted, kept, self.score_max)
        return line_window_commit(self.geometry, seen, written)

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
