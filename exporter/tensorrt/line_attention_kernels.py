"""The kernels of the LineAttention plugin, in Triton.

K and V are read once, in one loop with a running softmax. The scores want final probabilities, so that every logit goes
through scratch memory (C float32 a query head, which stays in the L2 cache). The new token's key and value are put in
registers over what their slot held and are stored after the reads: nothing is read that the same launch writes.

Axes: R = sequences x KV heads, G = query heads of a KV head, C = slots, D = head size, S = parts that C is split into.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _account(scores, at, inside, held, received, since, keep_largest):
    """Add what slots ``received``, or keep the largest; those held ``since`` a position start again."""
    score = tl.load(scores + at, mask=inside, other=0.0)
    kept = tl.where(held >= since, 0.0, score)
    tl.store(scores + at, tl.where(keep_largest, tl.maximum(kept, received), kept + received), mask=inside)


@triton.jit
def _received(logits, row, slot, inside, largest, weight, slots, G: tl.constexpr, G_PAD: tl.constexpr):
    """Attention ``[BLOCK]`` that ``slot`` received, averaged over the query heads."""
    g = tl.arange(0, G_PAD)
    logit = tl.load(
        logits + (row * G + g[:, None]) * slots + slot[None, :],
        mask=(g[:, None] < G) & inside[None, :],
        other=float("-inf"),
    )
    return tl.sum(tl.exp(logit - largest[:, None]) / weight[:, None], axis=0) / G


@triton.jit
def _store_attended(
    attended, row, total, weight, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """Write the weighted mean ``total / weight`` of one row."""
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    tl.store(
        attended + (row * G + g[:, None]) * D + d[None, :],
        (total / weight[:, None]).to(attended.dtype.element_ty),
        mask=(g[:, None] < G) & (d[None, :] < D),
    )


@triton.jit
def attend(
    q,
    k,
    v,
    k_cache,
    v_cache,
    scores,
    slot_pos,
    write_slot,
    position,
    fresh_from,
    score_max,
    attended,
    logits,
    partial,
    slots,
    part_slots,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One row and one part of its slots; with one part (not ``SPLIT``) the whole operation.

    Args:
        q ... score_max: the operation's inputs (:mod:`graphs.line_attention`); caches, scores and positions are updated
            where they lie.
        attended: ``[R, 1, G, D]``, if not ``SPLIT``.
        logits: ``[R, G, C]`` float32 scratch.
        partial: ``[R, S, G_PAD, D_PAD + 2]`` float32 scratch, if ``SPLIT``: sums of values, largest logit, sum of weights.
        slots, part_slots: C, and how many of them a part has.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * part_slots
    last = tl.minimum(first + part_slots, slots)
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    query = tl.load(
        q + (row * G + g[:, None]) * D + d[None, :], mask=(g[:, None] < G) & (d[None, :] < D), other=0.0
    ).to(tl.float32)
    new_key = tl.load(k + row * D + d, mask=d < D, other=0.0)
    new_value = tl.load(v + row * D + d, mask=d < D, other=0.0)
    new_slot = tl.load(write_slot + row)
    # What TensorRT times plugins on may hold anything: a token for no slot is not written.
    new_slot = tl.where((new_slot >= 0) & (new_slot < slots), new_slot, -1).to(tl.int32)
    now = tl.load(position + row)
    largest = tl.full([G_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, D_PAD], tl.float32)
    for start in range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < last
        fresh = (slot == new_slot) & inside
        held = tl.where(fresh, now, tl.load(slot_pos + row * slots + slot, mask=inside, other=-1))
        visible = held >= 0
        # Slots without a token may hold anything, so that they are not even read.
        read = (visible & (slot != new_slot))[:, None] & (d[None, :] < D)
        at = (row * slots + slot)[:, None] * D + d[None, :]
        keys = tl.where(fresh[:, None], new_key[None, :], tl.load(k_cache + at, mask=read, other=0.0))
        values = tl.where(fresh[:, None], new_value[None, :], tl.load(v_cache + at, mask=read, other=0.0))
        logit = tl.sum(query[:, None, :] * keys.to(tl.float32)[None, :, :], axis=2)
        logit = tl.where(visible[None, :], logit, float("-inf"))
        tl.store(
            logits + (row * G + g[:, None]) * slots + slot[None, :],
            logit,
            mask=(g[:, None] < G) & inside[None, :],
        )
        highest = tl.maximum(largest, tl.max(logit, axis=1))
        # A block may have no token at all.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(largest - shift)
        probs = tl.exp(logit - shift[:, None])
        total = total * shrink[:, None] + tl.sum(
            probs[:, :, None] * values.to(tl.float32)[None, :, :], axis=1
        )
        weight = weight * shrink + tl.sum(probs, axis=1)
        largest = highest
    if (new_slot >= first) & (new_slot < last):
        target = (row * slots + new_slot) * D + d
        tl.store(k_cache + target, new_key, mask=d < D)
        tl.store(v_cache + target, new_value, mask=d < D)
        tl.store(slot_pos + row * slots + new_slot, now)
    if SPLIT:
        base = partial + ((row * tl.num_programs(1) + part) * G_PAD + g) * (D_PAD + 2)
        tl.store(base[:, None] + d[None, :], total)
        tl.store(base + D_PAD, largest)
        tl.store(base + D_PAD + 1, weight)
    else:
        _store_attended(attended, row, total, weight, G, G_PAD, D, D_PAD)
        # Logits were stored by other threads of this program.
        tl.debug_barrier()
        since = tl.load(fresh_from + row)
        keep_largest = tl.load(score_max).to(tl.int1)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = slot < slots
            held = tl.load(slot_pos + row * slots + slot, mask=inside, other=-1)
            held = tl.where(slot == new_slot, now, held)
            received = _received(logits, row, slot, inside, largest, weight, slots, G, G_PAD)
            _account(scores, row * slots + slot, inside, held, received, since, keep_largest)


@triton.jit
def combine(
    scores,
    slot_pos,
    fresh_from,
    score_max,
    attended,
    logits,
    partial,
    slots,
    parts,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the parts of :func:`attend` found, put together: program (row, b) accounts for the b-th ``BLOCK`` slots.

    ``slot_pos`` holds the new token already.
    """
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    largest = tl.full([G_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD, D_PAD], tl.float32)
    for part in range(parts):
        base = partial + ((row * parts + part) * G_PAD + g) * (D_PAD + 2)
        high = tl.load(base + D_PAD)
        highest = tl.maximum(largest, high)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        before, here = tl.exp(largest - shift), tl.exp(high - shift)
        weight = weight * before + tl.load(base + D_PAD + 1) * here
        total = total * before[:, None] + tl.load(base[:, None] + d[None, :]) * here[:, None]
        largest = highest
    if tl.program_id(1) == 0:
        _store_attended(attended, row, total, weight, G, G_PAD, D, D_PAD)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    held = tl.load(slot_pos + row * slots + slot, mask=inside, other=-1)
    received = _received(logits, row, slot, inside, largest, weight, slots, G, G_PAD)
    since, keep_largest = tl.load(fresh_from + row), tl.load(score_max).to(tl.int1)
    _account(scores, row * slots + slot, inside, held, received, since, keep_largest)
