"""What every cache policy shares: protection, the choice of slots, and eviction.

A policy says how much each slot matters; this module turns that into the W slots that the next line overwrites.
Axes: R = sequences x KV heads, C = slots, W = line width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class LineEndParams(NamedTuple):
    """Run-time scalars (shape ``[]``, int64) of the cache.

    ``capacity`` ``[layers]``: slots in use, of those that the buffer has. ``recent_lines``: newest lines that
    stay. ``anchor_tokens``: first image tokens that stay. ``strict``: nonzero empties a chosen slot at
    once, zero leaves it visible until it is overwritten.
    """

    capacity: Tensor
    recent_lines: Tensor
    anchor_tokens: Tensor
    strict: Tensor


@dataclass(frozen=True)
class FinishedLine:
    """One layer's buffer at the end of a line.

    ``scores [R, C]`` float32: attention received. ``slot_pos [R, C]`` int32: position held, -1 empty.
    ``position [R, 1]`` int32: position of the next token, the first of the next line.
    """

    scores: Tensor
    slot_pos: Tensor
    position: Tensor
    prefix_len: int
    line_width: int


class Policy(ABC):
    """A cache policy. Subclasses set ``name`` and say how important each slot is."""

    name: ClassVar[str]

    @abstractmethod
    def importance(self, line: FinishedLine) -> Tensor:
        """Importance ``[R, C]`` float32, finite; the least important unprotected slots go first."""


def protected_slots(line: FinishedLine, capacity: Tensor, params: LineEndParams) -> Tensor:
    """Slots ``[R, C]`` bool that nothing may overwrite: prefix, anchors, recent lines, and those beyond ``capacity``."""
    slot = torch.arange(line.slot_pos.shape[1], dtype=torch.int64)[None]
    image_index = line.slot_pos - line.prefix_len
    anchor = (image_index >= 0) & (image_index < params.anchor_tokens)
    recent = line.slot_pos >= line.position - params.recent_lines * line.line_width
    return (slot < line.prefix_len) | (slot >= capacity) | anchor | recent


def choose_slots(importance: Tensor, slot_pos: Tensor, protected: Tensor, width: int) -> Tensor:
    """Choose the ``width`` slots that the next line overwrites, in the order in which it overwrites them.

    Empty slots come first (lowest index first), then the least important; equal importance goes by lowest
    position, so that every backend agrees.

    Args:
        importance: ``[R, C]`` float32.
        slot_pos: ``[R, C]`` int32.
        protected: ``[R, C]`` bool; at least ``width`` slots of every row must be free of it.

    Returns:
        ``[R, width]`` int64.
    """
    key = torch.where(slot_pos < 0, float("-inf"), importance)
    key = torch.where(protected, float("inf"), key)
    slots = slot_pos.shape[1]
    by_position = _ascending(slot_pos, slots)
    least = _ascending(key.gather(1, by_position), width)
    return by_position.gather(1, least)


def _ascending(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest entries a row, ascending; equal entries by lowest index."""
    if torch.compiler.is_exporting():
        # ONNX TopK orders equal values by index; torch.topk promises no order.
        return torch.topk(values, count, dim=1, largest=False, sorted=True).indices
    return torch.sort(values, dim=1, stable=True).indices[:, :count]


def end_line(
    policy: Policy, line: FinishedLine, capacity: Tensor, params: LineEndParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the next line's slots and evict what they hold.

    Returns:
        ``write_slots [R, W]`` int64, and the new ``slot_pos`` and ``scores`` ``[R, C]``.
    """
    protected = protected_slots(line, capacity, params)
    chosen = choose_slots(policy.importance(line), line.slot_pos, protected, line.line_width)
    held = line.slot_pos.gather(1, chosen)
    left = torch.where(params.strict != 0, torch.full_like(held, -1), held)
    return chosen, line.slot_pos.scatter(1, chosen, left), torch.zeros_like(line.scores)
