"""What every cache policy shares: protection, the choice of slots, and eviction.

A policy says how much each slot matters; this module turns that into the W slots that the next line overwrites.
Axes: R = layers x sequences x KV heads, C = slots, W = line width, D = head size. Layers of the same slots end their lines
together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from linert.graphs.line_evict import Importance

EMPTY_STEP = 1e30
"""Between the keys of empty slots, and from them to every importance."""


class LineEndParams(NamedTuple):
    """Run-time settings of the cache, as :data:`linert.runtime.plugins.contracts.LINE_EVICT_INPUTS` describes them."""

    capacity: Tensor
    recent_tokens: Tensor
    anchor_tokens: Tensor
    strict: Tensor
    score_max: Tensor
    average_heads: Tensor
    share_guidance: Tensor


@dataclass(frozen=True)
class FinishedLine:
    """The buffer of one or more layers at the end of a line; rows go layer by layer.

    ``scores [R, C]`` float32: attention received. ``slot_pos [R, C]`` int32: position held, -1 empty.
    ``position [R, 1]`` int32: position of the next token, the first of the next line. ``keys [R, C, D]``: keys after
    position encoding, for a policy that reads them; ``values [R, C, D]`` likewise. ``positions``: of the whole sequence, prefix and image.
    ``branches``: 2 when a layer's conditional rows are followed by unconditional ones, else 1.
    """

    scores: Tensor
    slot_pos: Tensor
    position: Tensor
    keys: Tensor | None
    values: Tensor | None
    prefix_len: int
    line_width: int
    positions: int
    kv_heads: int
    branches: int
    layers: int = 1

    @property
    def visible(self) -> Tensor:
        """Slots ``[R, C]`` bool that hold a token."""
        return self.slot_pos >= 0


class Policy(ABC):
    """A cache policy. Subclasses set ``name`` and say how important each slot is.

    ``window``: only the last so many queries of a line count in the scores; None counts all of them.
    ``carried``: share of a kept token's score that goes on from line to line; 0 starts again.
    ``reads_keys``, ``reads_values``: the policy looks at keys, or at values, as well. ``plugin_importance``: which of the LineEvict
    operation's kinds of importance it is; None where the operation is given what standard operators worked out. ``usual``: settings
    of the cache (:class:`~linert.runtime.bundles.cache_settings.CacheSettings`) that suit it better than the declared defaults, by name.
    """

    name: ClassVar[str]
    window: ClassVar[int | None] = None
    carried: ClassVar[float] = 0.0
    reads_keys: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    plugin_importance: ClassVar[Importance | None] = None
    usual: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        """Importance ``[R, C]`` float32, between -1e30 and infinity; the least important unprotected slots go first."""

    @property
    def replaces_scores(self) -> bool:
        """Whether a line's end leaves other scores than it found."""
        return self.carried != 1

    def score_window(self, line_width: int) -> int:
        """The ``score_window`` input of decode: scores restart this many queries before a line's end; 0 never."""
        return self.window if self.window is not None and self.window < line_width else 0


def protected_slots(line: FinishedLine, capacity: Tensor, params: LineEndParams) -> Tensor:
    """Slots ``[R, C]`` bool that nothing may overwrite: prefix, anchors, recent lines, and those beyond ``capacity``.

    ``capacity``: ``[]``, or ``[R, 1]`` where it differs.
    """
    slot = torch.arange(line.slot_pos.shape[1], dtype=torch.int64)[None]
    image_index = line.slot_pos - line.prefix_len
    anchor = (image_index >= 0) & (image_index < params.anchor_tokens)
    # Not below 0: an empty slot (-1) is never recent.
    recent = line.slot_pos >= (line.position - params.recent_tokens).clamp(min=0)
    return (slot < line.prefix_len) | (slot >= capacity) | anchor | recent


def pool_along_raster(values: Tensor, line: FinishedLine, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Pool ``values [R, C]`` over neighbouring sequence positions; a position that no slot holds counts as zero.

    ``pool`` maps ``[R, 1, P + 1]`` to the same shape. The result ``[R, C]`` is meaningless for empty slots.
    """
    positions = line.positions
    index = torch.where(line.visible, line.slot_pos, positions).long()
    laid_out = torch.zeros(values.shape[0], positions + 1).scatter(
        1, index, torch.where(line.visible, values, 0.0)
    )
    return pool(laid_out[:, None])[:, 0].gather(1, index)


def shared_importance(importance: Tensor, line: FinishedLine, params: LineEndParams) -> Tensor:
    """Average ``importance [R, C]`` over the heads and over the branches that are to choose alike.

    They have chosen alike since the first line, so that a slot holds the same position in all of them.
    """
    shape = importance.shape
    grouped = importance.reshape(line.layers, line.branches, -1, line.kv_heads, shape[1])
    if line.kv_heads > 1:
        grouped = torch.where(params.average_heads != 0, grouped.mean(3, keepdim=True), grouped)
    if line.branches > 1:
        grouped = torch.where(params.share_guidance != 0, grouped.mean(1, keepdim=True), grouped)
    return grouped.reshape(shape)


def choose_slots(importance: Tensor, slot_pos: Tensor, protected: Tensor, width: int) -> Tensor:
    """Choose the ``width`` slots that the next line overwrites, in the order in which it overwrites them.

    Empty slots are chosen first (lowest index first), then the least important; equal importance goes by lowest
    position, so that every backend agrees. They are overwritten in the order of the positions held: a token that is
    evicted lazily then stays about as long as the next line is to its left.

    Args:
        importance: ``[R, C]`` float32.
        slot_pos: ``[R, C]`` int32.
        protected: ``[R, C]`` bool; at least ``width`` slots of every row must be free of it.

    Returns:
        ``[R, width]`` int64.
    """
    slots = slot_pos.shape[1]
    # Empty slots are told apart by their index: ONNX Runtime's TopK on CUDA orders equal values as it likes above 256 slots.
    empty = torch.arange(-slots, 0, dtype=torch.int32)
    key = torch.where(slot_pos < 0, empty.float() * EMPTY_STEP, importance)
    key = torch.where(protected, float("inf"), key)
    by_position = _ascending(torch.where(slot_pos < 0, empty, slot_pos), slots)
    least = _ascending(key.gather(1, by_position), width)
    return by_position.gather(1, least.gather(1, _ascending(least, width)))


def _ascending(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest entries a row, ascending; equal entries by lowest index."""
    if torch.compiler.is_exporting():
        # ONNX TopK orders equal values by index; torch.topk promises no order.
        return torch.topk(values, count, dim=1, largest=False, sorted=True).indices
    return torch.sort(values, dim=1, stable=True).indices[:, :count]


def evict(slot_pos: Tensor, chosen: Tensor, strict: Tensor) -> Tensor:
    """``slot_pos [R, C]`` after the slots ``chosen [R, W]`` were given to the next line."""
    evicted_pos = slot_pos.gather(1, chosen)
    return slot_pos.scatter(
        1, chosen, torch.where(strict != 0, torch.full_like(evicted_pos, -1), evicted_pos)
    )


def end_line(
    policy: Policy, line: FinishedLine, capacity: Tensor, params: LineEndParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the next line's slots and evict what they hold.

    ``capacity``: as for :func:`protected_slots`.

    Returns:
        ``write_slots [R, W]`` int64, and the new ``slot_pos`` and ``scores`` ``[R, C]``.
    """
    protected = protected_slots(line, capacity, params)
    importance = shared_importance(policy.importance(line, params), line, params)
    chosen = choose_slots(importance, line.slot_pos, protected, line.line_width)
    return chosen, evict(line.slot_pos, chosen, params.strict), carried_scores(policy, line)


def carried_scores(policy: Policy, line: FinishedLine) -> Tensor:
    """Scores ``[R, C]`` that the next line begins with."""
    if not policy.replaces_scores:
        return line.scores
    return line.scores * policy.carried if policy.carried else restarted(line)


def restarted(line: FinishedLine) -> Tensor:
    """Scores ``[R, C]`` of zero.

    In a graph they depend on what the slots hold: a runtime copies a constant output from the host once the operators have run,
    and does not when it replays them as a CUDA graph.
    """
    return torch.where(line.slot_pos < -1, line.scores, 0.0)
