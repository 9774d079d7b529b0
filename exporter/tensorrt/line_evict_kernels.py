"""The kernel of the LineEvict plugin, in Triton: a line's end in one launch over all layers, sequences and heads.

A program, one warp, takes one row after another. It finds the importance of the last slot to go by bisection, counting the slots
that are not more important, and settles those of equal importance by position and those of equal position by index: a few dozen
passes over the slots, which stay in the L1 cache. Axes: L = layers, R = sequences x KV heads, C = slots of a layer, W = line
width.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)

REACH = tl.constexpr(2)
"""Neighbours to either side that pooled attention is averaged over."""

COMPARED = tl.constexpr(256)
"""Pairs of chosen slots that are compared at a time."""


@triton.jit
def _importance(scores, slot_pos, slot, inside, now, score_max, W: tl.constexpr, KIND: tl.constexpr):
    """Importance of the slots ``slot`` of a row; ``KIND`` as :class:`linert.graphs.line_evict.Importance`, without pooled attention."""
    if KIND == 0:
        score = tl.load(scores + slot, mask=inside, other=0.0)
        pos = tl.load(slot_pos + slot, mask=inside, other=-1)
        seen_by = tl.minimum(now - pos, W).to(tl.float32)
        return tl.where(score_max, score, tl.div_rn(score, seen_by))
    if KIND == 1:
        return tl.load(scores + slot, mask=inside, other=0.0)
    if KIND == 2:
        return tl.load(slot_pos + slot, mask=inside, other=-1).to(tl.float32)
    return slot * 0.0


@triton.jit
def _first_position(slot_pos, slots, least, BLOCK: tl.constexpr):
    """The first position that a row holds, of ``least`` and those behind it; ``LARGEST`` where there is none."""
    first = tl.full([BLOCK], LARGEST, tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        pos = tl.load(slot_pos + slot, mask=slot < slots, other=-1)
        first = tl.minimum(first, tl.where(pos >= least, pos, LARGEST))
    return tl.min(first)


@triton.jit
def _pool(scores, slot_pos, pooled, neighbours, slots, adds, NEIGHBOURS: tl.constexpr, BLOCK: tl.constexpr):
    """Write to ``pooled``, or add to it, a row's attention averaged over the neighbours in the raster.

    Scores are laid out by position in ``neighbours [NEIGHBOURS]``, which is as many positions as a round looks at. Rounds begin at
    the first position that is held and was not looked at yet: there is one for every ``NEIGHBOURS`` positions of an image or
    less, and never more than slots. Nothing is written for empty slots.
    """
    window: tl.constexpr = NEIGHBOURS - 2 * REACH
    first = _first_position(slot_pos, slots, 0, BLOCK)
    while first < LARGEST:
        for start in range(0, NEIGHBOURS, BLOCK):
            tl.store(neighbours + start + tl.arange(0, BLOCK), tl.full([BLOCK], 0.0, tl.float32))
        # Other threads of this program read what is stored, here and below.
        tl.debug_barrier()
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            pos = tl.load(slot_pos + slot, mask=slot < slots, other=-1)
            score = tl.load(scores + slot, mask=slot < slots, other=0.0)
            away = tl.where(pos >= 0, pos - first, LARGEST)
            near = (away >= -REACH) & (away < window + REACH)
            tl.store(neighbours + REACH + away, score, mask=near)
        tl.debug_barrier()
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            pos = tl.load(slot_pos + slot, mask=slot < slots, other=-1)
            away = tl.where(pos >= 0, pos - first, LARGEST)
            here = (away >= 0) & (away < window)
            total = tl.full([BLOCK], 0.0, tl.float32)
            for step in tl.static_range(2 * REACH + 1):
                total += tl.load(neighbours + away + step, mask=here, other=0.0)
            total = tl.div_rn(total, tl.full([BLOCK], 2.0 * REACH + 1.0, tl.float32))
            if adds:
                total += tl.load(pooled + slot, mask=here, other=0.0)
            tl.store(pooled + slot, total, mask=here)
        tl.debug_barrier()
        first = _first_position(slot_pos, slots, tl.minimum(first, LARGEST - window) + window, BLOCK)


@triton.jit
def _ordered(key):
    """Whole numbers in the order of ``key`` float32: -0 is 0, and all that is not a number is equal and behind infinity.

    That is where :func:`torch.sort` and ONNX Runtime's TopK have it.
    """
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(key != key, LARGEST, bits)


@triton.jit
def _least(
    keys,
    slot_pos,
    slots,
    key,
    wanted,
    BY_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least key up to which there are ``wanted`` slots or more; or so the least position among the slots of ``key``."""
    low, high = tl.full([], SMALLEST, tl.int32), tl.full([], LARGEST, tl.int32)
    while low < high:
        # Half of a sum that may be too large.
        middle = (low & high) + ((low ^ high) >> 1)
        count = tl.full([BLOCK], 0, tl.int32)
        below = tl.full([BLOCK], SMALLEST, tl.int32)
        above = tl.full([BLOCK], LARGEST, tl.int32)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            number = tl.load(keys + slot)
            if BY_POSITION:
                pos = tl.load(slot_pos + slot, mask=slot < slots, other=LARGEST)
                there = number == key
                count += (there & (pos <= middle)).to(tl.int32)
                below = tl.maximum(below, tl.where(there & (pos <= middle), pos, SMALLEST))
                above = tl.minimum(above, tl.where(there & (pos > middle), pos, LARGEST))
            else:
                count += (number <= middle).to(tl.int32)
                below = tl.maximum(below, tl.where(number <= middle, number, SMALLEST))
                above = tl.minimum(above, tl.where(number > middle, number, LARGEST))
        total = tl.sum(count)
        if total >= wanted:
            # No number lies between the largest of these and the middle.
            high = tl.max(below)
            low = high if total == wanted else low
        else:
            low = tl.min(above)
    return high


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
    line,
    write_slots,
    write_slots_next,
    line_next,
    scratch,
    rows,
    layers,
    HEADS: tl.constexpr,
    BRANCHES: tl.constexpr,
    PREFIX: tl.constexpr,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
    LINES: tl.constexpr,
    KIND: tl.constexpr,
    CARRIES: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program takes some rows of some layers. Where their sequence is due it chooses their slots and evicts what these hold.

    Args:
        table: ``[L, 5]`` int64: a layer's slots, and the addresses of its scores, positions, new scores and new positions.
        capacity ... write_slots: the stage's inputs (:data:`linert.runtime.plugins.contracts.LINE_EVICT_INPUTS`).
        write_slots_next, line_next: ``[L, R, W]`` and ``[B]`` int64, the results.
        scratch: ``[programs, SLOTS_PAD]`` int32, or with pooled attention ``[programs, 2 SLOTS_PAD + NEIGHBOURS]``.
        rows, layers: R and L.
    """
    pooled_words: tl.constexpr = SLOTS_PAD + NEIGHBOURS if KIND == 4 else 0
    keys = scratch + tl.program_id(0).to(tl.int64) * (SLOTS_PAD + pooled_words)
    for task in range(tl.program_id(0), rows * layers, tl.num_programs(0)):
        row = (task % rows).to(tl.int64)
        layer = (task // rows).to(tl.int64)
        entry = table + layer * 5
        slots = tl.load(entry).to(tl.int32)
        scores = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
        slot_pos = tl.load(entry + 2).to(tl.pointer_type(tl.int32))
        scores_next = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
        slot_pos_next = tl.load(entry + 4).to(tl.pointer_type(tl.int32))
        fed = tl.load(position + row // HEADS)
        number = tl.load(line + row // HEADS)
        # Reckoned with 64 bits, like what follows: what does not fit in 32 is no other number.
        due = (number < LINES - 1) & (fed - PREFIX >= (number + 1) * W)
        if (layer == 0) & (row % HEADS == 0):
            tl.store(line_next + row // HEADS, number + due.to(tl.int64))
        if due:
            now = fed.to(tl.int32)
            usable = tl.minimum(tl.maximum(tl.load(capacity + layer), 0), slots).to(tl.int32)
            recent_from = tl.minimum(tl.maximum(now - tl.load(recent_tokens), 0), LARGEST).to(tl.int32)
            anchors = tl.minimum(tl.maximum(tl.load(anchor_tokens), 0), LARGEST).to(tl.int32)
            largest = tl.load(score_max) != 0
            # The rows that choose alike: all heads of a sequence, both branches of an image.
            branch_rows = rows // BRANCHES
            first, heads = row % branch_rows, 1
            if tl.load(average_heads) != 0:
                first, heads = first // HEADS * HEADS, HEADS
            branch, branches = row // branch_rows, 1
            if tl.load(share_guidance) != 0:
                branch, branches = branch * 0, BRANCHES
            alike = branch * branch_rows + first
            # The row before is read by other threads of this program.
            tl.debug_barrier()
            if KIND == 4:
                _pooled_importance(
                    scores,
                    slot_pos,
                    keys,
                    alike,
                    branch_rows,
                    slots,
                    heads,
                    branches,
                    SLOTS_PAD,
                    NEIGHBOURS,
                    BLOCK,
                )
            for start in range(0, slots, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                inside = slot < slots
                if KIND == 4:
                    key = tl.load(keys + slot).to(tl.float32, bitcast=True)
                else:
                    key = tl.full([BLOCK], 0.0, tl.float32)
                    for other_branch in range(branches):
                        sum_of_heads = tl.full([BLOCK], 0.0, tl.float32)
                        for head in range(heads):
                            at = (alike + other_branch * branch_rows + head) * slots
                            sum_of_heads += _importance(
                                scores + at, slot_pos + at, slot, inside, now, largest, W, KIND
                            )
                        key += tl.div_rn(sum_of_heads, tl.full([BLOCK], 0.0, tl.float32) + heads)
                    key = tl.div_rn(key, tl.full([BLOCK], 0.0, tl.float32) + branches)
                pos = tl.load(slot_pos + row * slots + slot, mask=inside, other=-1)
                image = pos - PREFIX
                anchored = (image >= 0) & (image < anchors)
                protected = (slot < PREFIX) | (slot >= usable) | anchored | (pos >= recent_from)
                key = tl.where(pos < 0, float("-inf"), key)
                key = tl.where(protected, float("inf"), key)
                # What lies behind the last slot goes behind everything.
                tl.store(keys + slot, tl.where(inside, _ordered(key), LARGEST))
            # Other threads of this program read what is stored, here and below.
            tl.debug_barrier()
            at = row * slots
            _choose(
                keys,
                slot_pos + at,
                slot_pos_next + at,
                scores_next + at,
                write_slots_next + (layer * rows + row) * W,
                slots,
                tl.load(strict) != 0,
                W,
                CARRIES,
                BLOCK,
            )
            tl.debug_barrier()
            _order(write_slots_next + (layer * rows + row) * W, slot_pos + at, W, W_PAD)
        else:
            _leave(
                slot_pos + row * slots,
                slot_pos_next + row * slots,
                scores + row * slots,
                scores_next + row * slots,
                write_slots + (layer * rows + row) * W,
                write_slots_next + (layer * rows + row) * W,
                slots,
                W,
                W_PAD,
                CARRIES,
                BLOCK,
            )


@triton.jit
def _leave(
    slot_pos,
    slot_pos_next,
    scores,
    scores_next,
    write_slots,
    write_slots_next,
    slots,
    W: tl.constexpr,
    W_PAD: tl.constexpr,
    CARRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a row as it is."""
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        tl.store(slot_pos_next + slot, tl.load(slot_pos + slot, mask=inside), mask=inside)
        if not CARRIES:
            tl.store(scores_next + slot, tl.load(scores + slot, mask=inside), mask=inside)
    number = tl.arange(0, W_PAD)
    tl.store(write_slots_next + number, tl.load(write_slots + number, mask=number < W), mask=number < W)


@triton.jit
def _pooled_importance(
    scores,
    slot_pos,
    keys,
    alike,
    branch_rows,
    slots,
    heads,
    branches,
    SLOTS_PAD: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to ``keys`` the bits of pooled attention, averaged over the rows that choose alike."""
    pooled = (keys + SLOTS_PAD).to(tl.pointer_type(tl.float32), bitcast=True)
    averages = keys.to(tl.pointer_type(tl.float32), bitcast=True)
    for other_branch in range(branches):
        for head in range(heads):
            at = (alike + other_branch * branch_rows + head) * slots
            _pool(scores + at, slot_pos + at, pooled, pooled + SLOTS_PAD, slots, head > 0, NEIGHBOURS, BLOCK)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            average = tl.div_rn(tl.load(pooled + slot), tl.full([BLOCK], 0.0, tl.float32) + heads)
            if other_branch > 0:
                average += tl.load(averages + slot)
            tl.store(averages + slot, average)
        tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        average = tl.load(averages + slot)
        tl.store(averages + slot, tl.div_rn(average, tl.full([BLOCK], 0.0, tl.float32) + branches))
    tl.debug_barrier()


@triton.jit
def _choose(
    keys,
    slot_pos,
    slot_pos_next,
    scores_next,
    write_slots,
    slots,
    empties,
    W: tl.constexpr,
    CARRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the ``W`` slots that go as they lie, and what is left of a row."""
    key = _least(keys, slot_pos, slots, 0, W, False, BLOCK)
    earlier = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, slots, BLOCK):
        earlier += (tl.load(keys + start + tl.arange(0, BLOCK)) < key).to(tl.int32)
    wanted = W - tl.sum(earlier)
    position = _least(keys, slot_pos, slots, key, wanted, True, BLOCK)
    earlier = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        pos = tl.load(slot_pos + slot, mask=slot < slots, other=LARGEST)
        earlier += ((tl.load(keys + slot) == key) & (pos < position)).to(tl.int32)
    # Of the slots with that key and position the first ones go.
    wanted -= tl.sum(earlier)
    gone, tied_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        other = tl.load(keys + slot)
        pos = tl.load(slot_pos + slot, mask=inside, other=LARGEST)
        tied = ((other == key) & (pos == position)).to(tl.int32)
        goes = (other < key) | ((other == key) & (pos < position))
        goes |= (tied > 0) & (tied_before + tl.cumsum(tied) <= wanted)
        tl.store(slot_pos_next + slot, tl.where(goes & empties, -1, pos), mask=inside)
        if not CARRIES:
            tl.store(scores_next + slot, tl.full([BLOCK], 0.0, tl.float32), mask=inside)
        place = gone + tl.cumsum(goes.to(tl.int32)) - 1
        tl.store(write_slots + place, slot.to(tl.int64), mask=goes)
        gone += tl.sum(goes.to(tl.int32))
        tied_before += tl.sum(tied)


@triton.jit
def _order(write_slots, slot_pos, W: tl.constexpr, W_PAD: tl.constexpr):
    """Put the chosen slots into the order of the positions that they hold, and then of their numbers."""
    others: tl.constexpr = COMPARED // W_PAD if W_PAD < COMPARED else 1
    number = tl.arange(0, W_PAD)
    mine = tl.load(write_slots + number, mask=number < W, other=0).to(tl.int32)
    mine_pos = tl.load(slot_pos + mine)
    place = tl.full([W_PAD], 0, tl.int32)
    for start in range(0, W, others):
        other_number = start + tl.arange(0, others)
        other = tl.load(write_slots + other_number, mask=other_number < W, other=0).to(tl.int32)
        other_pos = tl.load(slot_pos + other)
        earlier = (other_pos[None, :] < mine_pos[:, None]) | (
            (other_pos[None, :] == mine_pos[:, None]) & (other[None, :] < mine[:, None])
        )
        place += tl.sum((earlier & (other_number < W)[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(write_slots + place, mine.to(tl.int64), mask=number < W)
