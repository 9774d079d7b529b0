"""The kernels of the LineAttention plugin, in Triton.

K and V are read once, in one loop with a running softmax. Threads hold parts of several keys; the slots that a group of threads
reads have a maximum, a sum of weights and a sum of values of their own until the loop ends, so that no warp waits for another
one in it. Positions are read a round ahead: a slot without a token is not read, and what is read does not wait for it. The new
token does not come from its slot but begins the sums: nothing is read that the same launch writes. The scores want final
probabilities, so that every logit goes through scratch memory (C float32 a query head, which stays in the L2 cache).

Axes: R = sequences x KV heads, G = query heads of a KV head, C = slots, D = head size, S = parts that C is split into. In the
loop: [G, REPEATS, LANES, D], where ``LANES`` groups of threads read a slot each and ``REPEATS`` of them before anything is reckoned.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Of float32: maxima begin here and not at -inf, whose difference to itself is no number."""


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
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    REPEATS: tl.constexpr,
    SCORED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One row and one part of its slots; with one part (not ``SPLIT``) the whole operation.

    Args:
        q ... score_max: the operation's inputs (:mod:`linert.graphs.line_attention`); caches, scores and positions are updated
            where they lie.
        attended: ``[R, 1, G, D]``, if not ``SPLIT``.
        logits: ``[R, G, C]`` float32 scratch.
        partial: if ``SPLIT``, float32 scratch: sums of values ``[R, S, G_PAD, D_PAD]``, then the largest logit and the sum of weights
            ``[R, S, G_PAD, 2]``.
        slots, part_slots: C, and how many of them a part has.
        VECTOR: numbers of a key that a thread reads at once.
        SCORED: slots that are accounted for at a time.
    """
    block: tl.constexpr = REPEATS * LANES
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * part_slots
    last = tl.minimum(first + part_slots, slots)
    k_cache += row * slots * D
    v_cache += row * slots * D
    slot_pos += row * slots
    logits += row * G * slots
    # All of four axes, so that threads hold what belongs together: G, REPEATS, LANES, D.
    g = tl.arange(0, G_PAD)[:, None, None, None]
    repeat = tl.arange(0, REPEATS)[None, :, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    d = tl.arange(0, D_PAD)[None, None, None, :]
    query = tl.load(q + (row * G + g) * D + d, mask=(g < G) & (d < D), other=0.0).to(tl.float32)
    new_key = tl.load(k + row * D + d, mask=d < D, other=0.0)
    new_value = tl.load(v + row * D + d, mask=d < D, other=0.0)
    now = tl.load(position + row)
    new_slot = tl.load(write_slot + row)
    # What TensorRT times plugins on may hold anything: a token for no slot is not written.
    new_slot = tl.where((new_slot >= 0) & (new_slot < slots), new_slot, -1).to(tl.int32)
    within = repeat * LANES + lane
    slot = first + within
    held = tl.load(slot_pos + slot, mask=slot < last, other=-1)

    own = (new_slot >= first) & (new_slot < last)
    new_logit = tl.sum(query * new_key.to(tl.float32), axis=3, keep_dims=True)
    new_logit = tl.where(own & (now >= 0), new_logit, float("-inf"))
    if own:
        tl.store(k_cache + new_slot * D + d, new_key, mask=d < D)
        tl.store(v_cache + new_slot * D + d, new_value, mask=d < D)
        tl.store(slot_pos + new_slot, now)
        tl.store(logits + g * slots + new_slot, new_logit, mask=g < G)
    new_largest = tl.maximum(new_logit, LOWEST)
    new_weight = tl.exp(new_logit - new_largest)
    largest = tl.where(lane == 0, new_largest, LOWEST)
    weight = tl.where(lane == 0, new_weight, 0.0)
    counts = (lane == 0) & own & (now >= 0)
    total = tl.where(counts, new_value.to(tl.float32) * new_weight, 0.0)

    keys, values = _read(k_cache, v_cache, slot, held, last, new_slot, d, D, VECTOR)
    held_ahead = tl.load(slot_pos + slot + block, mask=slot + block < last, other=-1)
    for start in range(first, last, block):
        slot = start + within
        ahead = slot + block
        keys_ahead, values_ahead = _read(k_cache, v_cache, ahead, held_ahead, last, new_slot, d, D, VECTOR)
        held_behind = tl.load(slot_pos + ahead + block, mask=ahead + block < last, other=-1)
        logit = tl.sum(query * keys.to(tl.float32), axis=3, keep_dims=True)
        tl.store(logits + g * slots + slot, logit, mask=(g < G) & (slot < last) & (slot != new_slot))
        logit = tl.where((held >= 0) & (slot != new_slot), logit, float("-inf"))
        highest = tl.maximum(largest, tl.max(logit, axis=1, keep_dims=True))
        shrink = tl.exp(largest - highest)
        probs = tl.exp(logit - highest)
        weight = weight * shrink + tl.sum(probs, axis=1, keep_dims=True)
        total = total * shrink + tl.sum(probs * values.to(tl.float32), axis=1, keep_dims=True)
        largest = highest
        keys, values, held, held_ahead = keys_ahead, values_ahead, held_ahead, held_behind

    # Loads of the accounting wait neither for the sums nor for other threads.
    number = tl.arange(0, SCORED)
    if not SPLIT:
        scores += row * slots
        held_there = tl.load(slot_pos + number, mask=number < slots, other=-1)
        score = tl.load(scores + number, mask=number < slots, other=0.0)
        since = tl.load(fresh_from + row)
        keep_largest = tl.load(score_max).to(tl.int1)
    highest = tl.max(largest, axis=2, keep_dims=True)
    share = tl.exp(largest - highest)
    weight = tl.sum(weight * share, axis=2, keep_dims=True)
    total = tl.sum(total * share, axis=2, keep_dims=True)
    if SPLIT:
        at_part = (row * tl.num_programs(1) + part) * G_PAD + g
        tl.store(partial + at_part * D_PAD + d, total)
        partial += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * G_PAD * D_PAD
        tl.store(partial + at_part * 2, highest)
        tl.store(partial + at_part * 2 + 1, weight)
    else:
        mean = (total / weight).to(attended.dtype.element_ty)
        tl.store(attended + (row * G + g) * D + d, mean, mask=(g < G) & (d < D))
        highest, weight = tl.reshape(highest, [G_PAD]), tl.reshape(weight, [G_PAD])
        # Logits were stored by other threads of this program.
        tl.debug_barrier()
        for _ in range(0, slots, SCORED):
            held_here = tl.where(number == new_slot, now, held_there)
            received = _received(logits, number, slots, held_here, highest, weight, G, G_PAD)
            accounted = _accounted(score, held_here, received, since, keep_largest)
            tl.store(scores + number, accounted, mask=number < slots)
            number += SCORED
            held_there = tl.load(slot_pos + number, mask=number < slots, other=-1)
            score = tl.load(scores + number, mask=number < slots, other=0.0)


@triton.jit
def _read(k_cache, v_cache, slot, held, last, new_slot, d, D: tl.constexpr, VECTOR: tl.constexpr):
    """Keys and values of slots that hold a token, the new one's left aside."""
    at = tl.max_contiguous(slot * D + d, [1, 1, 1, VECTOR])
    read = (held >= 0) & (slot < last) & (slot != new_slot) & (d < D)
    return tl.load(k_cache + at, mask=read, other=0.0), tl.load(v_cache + at, mask=read, other=0.0)


@triton.jit
def _accounted(score, held, received, since, keep_largest):
    """``score`` with what slots ``received`` added, or the larger of both; those held ``since`` a position start again."""
    kept = tl.where(held >= since, 0.0, score)
    return tl.where(keep_largest, tl.maximum(kept, received), kept + received)


@triton.jit
def _received(logits, slot, slots, held, largest, weight, G: tl.constexpr, G_PAD: tl.constexpr):
    """Attention that the slots ``slot`` of a row received, averaged over the query heads; those that hold nothing received none."""
    g = tl.arange(0, G_PAD)
    head = (g < G)[:, None]
    logit = tl.load(
        logits + g[:, None] * slots + slot[None, :], mask=head & (slot < slots)[None, :], other=0.0
    )
    logit = tl.where(head & (held >= 0)[None, :], logit, float("-inf"))
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
    PARTS_PAD: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    SCORED: tl.constexpr,
):
    """What the parts of :func:`attend` found, put together: program (row, b) accounts for the b-th ``SCORED`` slots, and the first
    of a row writes what it attended to.

    ``slot_pos`` holds the new token already.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SCORED + tl.arange(0, SCORED)
    scores += row * slots
    held = tl.load(slot_pos + row * slots + slot, mask=slot < slots, other=-1)
    score = tl.load(scores + slot, mask=slot < slots, other=0.0)
    since, keep_largest = tl.load(fresh_from + row), tl.load(score_max).to(tl.int1)
    g = tl.arange(0, G_PAD)
    part = tl.arange(0, PARTS_PAD)
    extremes = partial + tl.num_programs(0).to(tl.int64) * parts * G_PAD * D_PAD
    of_part = ((row * parts + part)[None, :] * G_PAD + g[:, None]) * 2
    is_part = (part < parts)[None, :]
    high = tl.load(extremes + of_part, mask=is_part, other=LOWEST)
    weight = tl.load(extremes + of_part + 1, mask=is_part, other=0.0)
    highest = tl.max(high, axis=1)
    weight = tl.sum(weight * tl.exp(high - highest[:, None]), axis=1)
    if tl.program_id(1) == 0:
        d = tl.arange(0, D_PAD)
        total = tl.full([G_PAD, D_PAD], 0.0, tl.float32)
        for start in range(0, parts, PARTS_AT_ONCE):
            some = start + tl.arange(0, PARTS_AT_ONCE)
            at = (row * parts + some)[None, :] * G_PAD + g[:, None]
            there = (some < parts)[None, :]
            share = tl.exp(tl.load(extremes + at * 2, mask=there, other=LOWEST) - highest[:, None])
            sums = tl.load(
                partial + at[:, :, None] * D_PAD + d[None, None, :], mask=there[:, :, None], other=0.0
            )
            total += tl.sum(sums * share[:, :, None], axis=1)
        _store_attended(attended, row, total, weight, G, G_PAD, D, D_PAD)
    received = _received(logits + row * G * slots, slot, slots, held, highest, weight, G, G_PAD)
    tl.store(scores + slot, _accounted(score, held, received, since, keep_largest), mask=slot < slots)
