"""The kernel of the LineEvict plugin, in Triton: a line's end in one launch over all layers, sequences and heads.

Slots are ranked by counting, for each, those that go before it: no sort, no limit on how many are chosen, and equal
importance goes by position and then by index, as everywhere. Axes: L = layers, R = sequences x KV heads, C = slots of a
layer, W = line width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _importance(
    scores,
    slot_pos,
    at,
    slot,
    inside,
    slots,
    now,
    score_max,
    W: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Importance ``[BLOCK]`` of slots of the row that begins at entry ``at``; ``KIND`` as :class:`graphs.line_evict.Importance`."""
    held = tl.load(slot_pos + at + slot, mask=inside, other=-1)
    score = tl.load(scores + at + slot, mask=inside, other=0.0)
    if KIND == 0:
        seen_by = tl.minimum(now - held, W).to(tl.float32)
        if score_max:
            seen_by = tl.full([BLOCK], 1.0, tl.float32)
        return tl.div_rn(score, seen_by)
    if KIND == 1:
        return score
    if KIND == 2:
        return held.to(tl.float32)
    if KIND == 3:
        return tl.zeros([BLOCK], tl.float32)
    pooled = tl.zeros([BLOCK], tl.float32)
    for start in range(0, slots, BLOCK):
        other = start + tl.arange(0, BLOCK)
        there = other < slots
        other_held = tl.load(slot_pos + at + other, mask=there, other=-1)
        other_score = tl.load(scores + at + other, mask=there, other=0.0)
        near = (tl.abs(held[:, None] - other_held[None, :]) <= 2) & (other_held >= 0)[None, :]
        pooled += tl.sum(tl.where(near, other_score[None, :], 0.0), axis=1)
    return tl.div_rn(pooled, tl.full([BLOCK], 5.0, tl.float32))


@triton.jit
def line_evict(
    table,
    capacity,
    recent_tokens,
    anchor_tokens,
    strict,
    score_max,
    average_heads,
    share_guidance,
    position,
    write_slots,
    keys,
    ranks,
    rows,
    most_slots,
    HEADS: tl.constexpr,
    BRANCHES: tl.constexpr,
    PREFIX: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    CARRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, layer) chooses the slots of one row and evicts what they hold.

    Args:
        table: ``[L, 5]`` int64: a layer's slots, and the addresses of its scores, positions, new scores and new positions.
        capacity ... position: the stage's inputs (:class:`graphs.policies.LineEndParams`).
        write_slots: ``[L, R, W]`` int64, the result.
        keys, ranks: ``[L, R, most_slots]`` int32 scratch.
        rows, most_slots: R, and the C of the largest layer.
    """
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    entry = table + layer * 5
    slots = tl.load(entry).to(tl.int32)
    scores = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    slot_pos = tl.load(entry + 2).to(tl.pointer_type(tl.int32))
    scores_next = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    slot_pos_next = tl.load(entry + 4).to(tl.pointer_type(tl.int32))
    at = row * slots
    keys += (layer * rows + row) * most_slots
    ranks += (layer * rows + row) * most_slots
    write_slots += (layer * rows + row) * W
    now = tl.load(position + row // HEADS).to(tl.int32)
    # Compared as 64 bits: what does not fit in 32 is no other number.
    usable = tl.load(capacity + layer)
    recent_from = tl.maximum(now - tl.load(recent_tokens), 0)
    anchors = tl.load(anchor_tokens)
    empties = tl.load(strict) != 0
    largest = tl.load(score_max) != 0
    # The rows that choose alike: all heads of a sequence, both branches of an image.
    branch_rows = rows // BRANCHES
    first, heads = row % branch_rows, 1
    if tl.load(average_heads) != 0:
        first, heads = first // HEADS * HEADS, HEADS
    branch, branches = row // branch_rows, 1
    if tl.load(share_guidance) != 0:
        branch, branches = branch * 0, BRANCHES
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        key = tl.zeros([BLOCK], tl.float32)
        for other_branch in range(branches):
            sum_of_heads = tl.zeros([BLOCK], tl.float32)
            for head in range(heads):
                other = ((branch + other_branch) * branch_rows + first + head) * slots
                sum_of_heads += _importance(
                    scores, slot_pos, other, slot, inside, slots, now, largest, W, KIND, BLOCK
                )
            key += tl.div_rn(sum_of_heads, tl.zeros([BLOCK], tl.float32) + heads)
        key = tl.div_rn(key, tl.zeros([BLOCK], tl.float32) + branches)
        held = tl.load(slot_pos + at + slot, mask=inside, other=-1)
        image = held - PREFIX
        anchored = (image >= 0) & (image < anchors)
        protected = (slot < PREFIX) | (slot >= usable) | anchored | (held >= recent_from)
        key = tl.where(held < 0, float("-inf"), key)
        tl.store(keys + slot, _ordered(tl.where(protected, float("inf"), key)), mask=inside)
    # Other threads of this program read what was stored.
    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        held = tl.load(slot_pos + at + slot, mask=inside, other=-1)
        key = tl.load(keys + slot, mask=inside, other=0)
        rank = tl.zeros([BLOCK], tl.int32)
        for other_start in range(0, slots, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            there = other < slots
            other_held = tl.load(slot_pos + at + other, mask=there, other=-1)
            other_key = tl.load(keys + other, mask=there, other=0)
            less = (other_key[None, :] < key[:, None]) | (
                (other_key[None, :] == key[:, None]) & _earlier(other_held, other, held, slot)
            )
            rank += tl.sum((less & there[None, :]).to(tl.int32), axis=1)
        tl.store(ranks + slot, rank, mask=inside)
        left = tl.where((rank < W) & empties, -1, held)
        tl.store(slot_pos_next + at + slot, left, mask=inside)
        if not CARRIES:
            tl.store(scores_next + at + slot, tl.zeros([BLOCK], tl.float32), mask=inside)
    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        held = tl.load(slot_pos + at + slot, mask=inside, other=-1)
        chosen = tl.load(ranks + slot, mask=inside, other=W) < W
        place = tl.zeros([BLOCK], tl.int32)
        for other_start in range(0, slots, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            there = other < slots
            other_held = tl.load(slot_pos + at + other, mask=there, other=-1)
            other_chosen = tl.load(ranks + other, mask=there, other=W) < W
            before = _earlier(other_held, other, held, slot) & other_chosen[None, :]
            place += tl.sum(before.to(tl.int32), axis=1)
        tl.store(write_slots + place, slot.to(tl.int64), mask=chosen)


@triton.jit
def _ordered(key):
    """Whole numbers in the order of ``key`` float32: -0 is 0, and all that is not a number is equal and behind infinity.

    That is where :func:`torch.sort` and ONNX Runtime's TopK have it.
    """
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(key != key, 0x7FFFFFFF, bits)


@triton.jit
def _earlier(other_held, other, held, slot):
    """Whether ``other [BLOCK]`` goes before ``slot [BLOCK]`` by position held and then by index: ``[slot, other]``."""
    return (other_held[None, :] < held[:, None]) | (
        (other_held[None, :] == held[:, None]) & (other[None, :] < slot[:, None])
    )
