"""The kernels of the LineWindowAttention and LineWindowCommit plugins, in Triton.

A window has queries enough for products of matrices: the queries of a row, T positions of G heads, are rows of one. What a query sees
are the C slots of the buffer and behind them the T positions of the window, together the S entries; programs share them. What no query
sees is not read. Each program reads its entries once, with a running softmax; logits go through scratch memory, since what is received
wants final probabilities. Nothing is written over an input until the commit.

Axes: R = sequences x KV heads, G = query heads of a KV head, T = positions of the window, Q = G x T queries of a row, C = slots,
S = C + T entries, D = head size, P = parts that S is split into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linert.exporter.tensorrt.line_attention_kernels import LOWEST

UNSEEN = tl.constexpr(-1e29)
"""A bias below it hides an entry."""


@triton.jit
def attend_window(
    q,
    k,
    v,
    k_cache,
    v_cache,
    bias,
    logits,
    partial,
    slots,
    part_entries,
    G: tl.constexpr,
    T: tl.constexpr,
    Q_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """One row and one part of its entries.

    Args:
        q ... bias: the operation's inputs (:mod:`linert.graphs.line_window_attention`).
        logits: ``[R, Q, S]`` float32 scratch.
        partial: float32 scratch: sums of values ``[R, P, Q_PAD, D_PAD]``, then the largest logit and the sum of weights
            ``[R, P, Q_PAD, 2]``.
        slots, part_entries: C, and how many entries a part has.
        BLOCK: entries that are reckoned at a time.
        WIDENED: make float32 of halves before they are multiplied, which is the same, and slower.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    entries = slots + T
    first = part * part_entries
    last = tl.minimum(first + part_entries, entries)
    query = tl.arange(0, Q_PAD)
    asked = query < G * T
    d = tl.arange(0, D_PAD)
    queries = tl.load(
        q + (row * G * T + query[:, None]) * D + d[None, :],
        mask=asked[:, None] & (d[None, :] < D),
        other=0.0,
    )
    largest = tl.full([Q_PAD], LOWEST, tl.float32)
    weight = tl.zeros([Q_PAD], tl.float32)
    total = tl.zeros([Q_PAD, D_PAD], tl.float32)
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        there = asked[:, None] & (entry < last)[None, :]
        hidden = tl.load(
            bias + (row * T + query % T)[:, None] * entries + entry[None, :], mask=there, other=float("-inf")
        )
        seen = (tl.max(hidden, axis=0) > UNSEEN) & (entry < last)
        keys = _of_entries(k_cache, k, row, entry, seen, slots, d, T, D)
        values = _of_entries(v_cache, v, row, entry, seen, slots, d, T, D)
        logit = _product(queries, tl.trans(keys), WIDENED) + hidden
        tl.store(logits + (row * G * T + query)[:, None] * entries + entry[None, :], logit, mask=there)
        highest = tl.maximum(largest, tl.max(logit, axis=1))
        shrink = tl.exp(largest - highest)
        probs = tl.exp(logit - highest[:, None])
        weight = weight * shrink + tl.sum(probs, axis=1)
        total = total * shrink[:, None] + _product(probs.to(values.dtype), values, WIDENED)
        largest = highest
    at_part = (row * tl.num_programs(1) + part) * Q_PAD + query
    tl.store(partial + at_part[:, None] * D_PAD + d[None, :], total)
    partial += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * Q_PAD * D_PAD
    tl.store(partial + at_part * 2, largest)
    tl.store(partial + at_part * 2 + 1, weight)


@triton.jit
def _product(one, other, WIDENED: tl.constexpr):
    """Of two matrices, in float32: tensor cores multiply halves, and nothing rounds float32."""
    if WIDENED:
        return tl.dot(one.to(tl.float32), other.to(tl.float32), input_precision="ieee")
    return tl.dot(one, other, input_precision="ieee")


@triton.jit
def _of_entries(cache, window, row, entry, seen, slots, d, T: tl.constexpr, D: tl.constexpr):
    """Keys or values of ``entry``: of slots from the cache, of what lies behind them from the window."""
    in_head = (d < D)[None, :]
    of_slot = tl.load(
        cache + (row * slots + entry)[:, None] * D + d[None, :],
        mask=(seen & (entry < slots))[:, None] & in_head,
        other=0.0,
    )
    of_window = tl.load(
        window + (row * T + entry - slots)[:, None] * D + d[None, :],
        mask=(seen & (entry >= slots))[:, None] & in_head,
        other=0.0,
    )
    return tl.where((entry < slots)[:, None], of_slot, of_window)


@triton.jit
def combine_window(
    attended,
    received,
    logits,
    partial,
    slots,
    parts,
    G: tl.constexpr,
    T: tl.constexpr,
    T_PAD: tl.constexpr,
    Q_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCORED: tl.constexpr,
):
    """What the parts of :func:`attend_window` found, put together: program (row, b) writes what the b-th ``SCORED`` entries received,
    and the first of a row what was attended to.

    Args:
        attended, received: the operation's outputs.
        logits, partial, slots: as of :func:`attend_window`.
        parts: P.
    """
    row = tl.program_id(0).to(tl.int64)
    entries = slots + T
    entry = tl.program_id(1) * SCORED + tl.arange(0, SCORED)
    t = tl.arange(0, T_PAD)
    d = tl.arange(0, D_PAD)
    there = t < T
    extremes = partial + tl.num_programs(0).to(tl.int64) * parts * Q_PAD * D_PAD
    total_received = tl.zeros([T_PAD, SCORED], tl.float32)
    for g in range(G):
        query = g * T + t
        largest = tl.full([T_PAD], LOWEST, tl.float32)
        for part in range(parts):
            at = ((row * parts + part) * Q_PAD + query) * 2
            largest = tl.maximum(largest, tl.load(extremes + at, mask=there, other=LOWEST))
        weight = tl.zeros([T_PAD], tl.float32)
        for part in range(parts):
            at = ((row * parts + part) * Q_PAD + query) * 2
            high = tl.load(extremes + at, mask=there, other=LOWEST)
            weight += tl.load(extremes + at + 1, mask=there, other=1.0) * tl.exp(high - largest)
        logit = tl.load(
            logits + (row * G * T + query)[:, None] * entries + entry[None, :],
            mask=there[:, None] & (entry < entries)[None, :],
            other=float("-inf"),
        )
        total_received += tl.exp(logit - largest[:, None]) / weight[:, None]
        if tl.program_id(1) == 0:
            total = tl.zeros([T_PAD, D_PAD], tl.float32)
            for part in range(parts):
                at = (row * parts + part) * Q_PAD + query
                share = tl.exp(tl.load(extremes + at * 2, mask=there, other=LOWEST) - largest)
                sums = tl.load(partial + at[:, None] * D_PAD + d[None, :], mask=there[:, None], other=0.0)
                total += sums * share[:, None]
            tl.store(
                attended + (row * G * T + query)[:, None] * D + d[None, :],
                (total / weight[:, None]).to(attended.dtype.element_ty),
                mask=there[:, None] & (d < D)[None, :],
            )
    tl.store(
        received + (row * T + t)[:, None] * entries + entry[None, :],
        total_received / G,
        mask=there[:, None] & (entry < entries)[None, :],
    )


@triton.jit
def commit_window(
    k,
    v,
    received,
    k_cache,
    v_cache,
    scores,
    slot_pos,
    write_slots,
    source,
    position,
    counted,
    kept,
    score_max,
    slot_pos_next,
    slots,
    T: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SCORED: tl.constexpr,
):
    """One layer: program (row, b) accounts for the b-th ``SCORED`` slots, and the first of a row writes keys and values.

    What TensorRT times plugins on may hold anything: what is of no position of the window, or for no slot, is not written.

    Args:
        k ... score_max: the operation's inputs (:mod:`linert.graphs.line_window_commit`), ``write_slots`` the layer's. Caches and
            scores are updated where they lie.
        slot_pos_next: ``[R, C]``.
        slots: C.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SCORED + tl.arange(0, SCORED)
    there = slot < slots
    d = tl.arange(0, D_PAD)
    entries = slots + T
    received += row * T * entries
    write_slots += row * T
    source += row * T
    position += row * T
    counted += row * T
    keep_largest = tl.load(score_max).to(tl.int1)
    score = tl.load(scores + row * slots + slot, mask=there, other=0.0) * tl.load(kept + row)
    held = tl.load(slot_pos + row * slots + slot, mask=there, other=-1)
    gained = tl.zeros([SCORED], tl.float32)
    for t in range(T):
        given = tl.load(received + t * entries + slot, mask=there, other=0.0) * tl.load(counted + t)
        gained = tl.where(keep_largest, tl.maximum(gained, given), gained + given)
    score = tl.where(keep_largest, tl.maximum(score, gained), score + gained)
    for t in range(T):
        origin = tl.load(source + t)
        target = tl.load(write_slots + t)
        written = (origin >= 0) & (origin < T) & (target >= 0) & (target < slots)
        origin = tl.where(written, origin, 0)
        own = 0.0
        for asking in range(T):
            given = tl.load(received + asking * entries + slots + origin) * tl.load(counted + asking)
            own = tl.where(keep_largest, tl.maximum(own, given), own + given)
        hit = written & (slot == target)
        score = tl.where(hit, own, score)
        held = tl.where(hit, tl.load(position + t), held)
        if written & (tl.program_id(1) == 0):
            taken = (row * T + origin) * D + d
            at = (row * slots + target) * D + d
            tl.store(k_cache + at, tl.load(k + taken, mask=d < D), mask=d < D)
            tl.store(v_cache + at, tl.load(v + taken, mask=d < D), mask=d < D)
    tl.store(scores + row * slots + slot, score, mask=there)
    tl.store(slot_pos_next + row * slots + slot, held, mask=there)
