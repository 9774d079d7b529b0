"""The kernels of the SpatialDecayStep and SpatialDecayWindow plugins, in Triton.

A program reads one row's keys and a part of its values: the new tokens' are put in registers over what their slot held, and
are stored by the programs that own them, so that nothing is read that the same launch writes. Slots that weigh nothing are not
read. A token for no slot is not written, and no matrix is zero: what TensorRT times plugins on may hold anything. All sums
are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spatial_decay_step(
    q,
    k,
    v,
    k_line,
    v_line,
    above,
    write_slot,
    matrix,
    weighed,
    above_weighed,
    attended,
    slots,
    matrices,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PART: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """One row, and ``E_PART`` of its values.

    Args:
        q ... above_weighed: the operation's inputs (:mod:`linert.graphs.spatial_decay_step`); the line in progress is updated where it
            lies.
        attended: ``[R, 1, 1, E]``.
        slots, matrices: C and M.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = tl.arange(0, D_PAD)
    e = part * E_PART + tl.arange(0, E_PART)
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    new_key = tl.load(k + row * D + d, mask=d < D, other=0.0)
    new_value = tl.load(v + row * E + e, mask=e < E, other=0.0)
    new_slot = tl.load(write_slot + row)
    written = (new_slot >= 0) & (new_slot < slots)
    new_slot = tl.where(written, new_slot, -1).to(tl.int32)
    total = tl.zeros([E_PART], tl.float32)
    for start in range(0, slots, SLOTS_BLOCK):
        slot = start + tl.arange(0, SLOTS_BLOCK)
        share = tl.load(weighed + row * slots + slot, mask=slot < slots, other=0.0)
        fresh = slot == new_slot
        read = (share != 0.0) & (slot != new_slot)
        at = (row * slots + slot)[:, None]
        keys = tl.load(k_line + at * D + d[None, :], mask=read[:, None] & (d[None, :] < D), other=0.0)
        keys = tl.where(fresh[:, None], new_key[None, :], keys)
        values = tl.load(v_line + at * E + e[None, :], mask=read[:, None] & (e[None, :] < E), other=0.0)
        values = tl.where(fresh[:, None], new_value[None, :], values)
        product = tl.sum(query[None, :] * keys.to(tl.float32), axis=1) * share
        total += tl.sum(product[:, None] * values.to(tl.float32), axis=0)
    number = tl.load(matrix + row)
    there = (number >= 0) & (number < matrices)
    base = above + (row * matrices + tl.where(there, number, 0)) * D * E
    keys_above = tl.where(there, D, 0)
    far = tl.zeros([E_PART], tl.float32)
    for first in range(0, D, D_BLOCK):
        some = first + tl.arange(0, D_BLOCK)
        inside = (some[:, None] < keys_above) & (e[None, :] < E)
        held = tl.load(base + some[:, None] * E + e[None, :], mask=inside, other=0.0)
        asked = tl.load(q + row * D + some, mask=some < D, other=0.0).to(tl.float32)
        far += tl.sum(asked[:, None] * held, axis=0)
    total += far * tl.load(above_weighed + row)
    tl.store(attended + row * E + e, total.to(attended.dtype.element_ty), mask=e < E)
    target = row * slots + new_slot
    if written:
        tl.store(v_line + target * E + e, new_value, mask=e < E)
    if written & (part == 0):
        tl.store(k_line + target * D + d, new_key, mask=d < D)


@triton.jit
def spatial_decay_window(
    q,
    k,
    v,
    k_line,
    v_line,
    above,
    place,
    matrix,
    weighed,
    above_weighed,
    attended,
    slots,
    matrices,
    T: tl.constexpr,
    T_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PART: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """One row, and ``E_PART`` of its values, of a window of T positions.

    Args:
        q ... above_weighed: the operation's inputs (:mod:`linert.graphs.spatial_decay_window`); the line in progress is updated where it
            lies.
        attended: ``[R, 1, T, E]``.
        slots, matrices: C and M.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    t = tl.arange(0, T_PAD)
    d = tl.arange(0, D_PAD)
    e = part * E_PART + tl.arange(0, E_PART)
    position = row * T + t
    asked = t < T
    queries = tl.load(
        q + position[:, None] * D + d[None, :], mask=asked[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    total = tl.zeros([T_PAD, E_PART], tl.float32)
    for start in range(0, slots, SLOTS_BLOCK):
        slot = start + tl.arange(0, SLOTS_BLOCK)
        share = tl.load(
            weighed + position[:, None] * slots + slot[None, :],
            mask=asked[:, None] & (slot < slots)[None, :],
            other=0.0,
        )
        read = (tl.sum((share != 0.0).to(tl.int32), axis=0) > 0) & (slot < slots)
        for new in range(T):
            read = read & (slot != _slot(place, row * T + new, slots))
        at = (row * slots + slot)[:, None]
        keys = tl.load(k_line + at * D + d[None, :], mask=read[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v_line + at * E + e[None, :], mask=read[:, None] & (e < E)[None, :], other=0.0)
        for new in range(T):
            fresh = (slot == _slot(place, row * T + new, slots))[:, None]
            key = tl.load(k + (row * T + new) * D + d, mask=d < D, other=0.0)
            value = tl.load(v + (row * T + new) * E + e, mask=e < E, other=0.0)
            keys = tl.where(fresh, key[None, :], keys)
            values = tl.where(fresh, value[None, :], values)
        products = tl.sum(queries[:, None, :] * keys.to(tl.float32)[None, :, :], axis=2) * share
        total += tl.sum(products[:, :, None] * values.to(tl.float32)[None, :, :], axis=1)
    for asking in range(T):
        number = tl.load(matrix + row * T + asking)
        there = (number >= 0) & (number < matrices)
        base = above + (row * matrices + tl.where(there, number, 0)) * D * E
        keys_above = tl.where(there, D, 0)
        far = tl.zeros([E_PART], tl.float32)
        for first in range(0, D, D_BLOCK):
            some = first + tl.arange(0, D_BLOCK)
            inside = (some[:, None] < keys_above) & (e[None, :] < E)
            held = tl.load(base + some[:, None] * E + e[None, :], mask=inside, other=0.0)
            query = tl.load(q + (row * T + asking) * D + some, mask=some < D, other=0.0).to(tl.float32)
            far += tl.sum(query[:, None] * held, axis=0)
        far = far * tl.load(above_weighed + row * T + asking)
        total += tl.where((t == asking)[:, None], far[None, :], 0.0)
    tl.store(
        attended + position[:, None] * E + e[None, :],
        total.to(attended.dtype.element_ty),
        mask=asked[:, None] & (e < E)[None, :],
    )
    for new in range(T):
        target = _slot(place, row * T + new, slots)
        value = tl.load(v + (row * T + new) * E + e, mask=e < E, other=0.0)
        if target >= 0:
            tl.store(v_line + (row * slots + target) * E + e, value, mask=e < E)
            if part == 0:
                key = tl.load(k + (row * T + new) * D + d, mask=d < D, other=0.0)
                tl.store(k_line + (row * slots + target) * D + d, key, mask=d < D)


@triton.jit
def _slot(place, position, slots):
    """The slot that a window's ``position`` of all rows' is written to; -1 where that is none of the ``slots``."""
    slot = tl.load(place + position * 3 + 2)
    return tl.where((slot >= 0) & (slot < slots), slot, -1).to(tl.int32)
