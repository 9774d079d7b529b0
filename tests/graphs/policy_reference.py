"""Every cache policy once more, in plain numpy and one row at a time: what the graphs are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    """The buffer of one (sequence, KV head) at a line end: ``scores [C]``, ``slot_pos [C]``, ``keys`` and ``values`` ``[C, D]``."""

    scores: np.ndarray
    slot_pos: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    position: int
    prefix_len: int
    line_width: int
    score_max: bool

    def slots(self) -> dict[int, int]:
        """Position to slot."""
        return {int(position): slot for slot, position in enumerate(self.slot_pos) if position >= 0}


def full(row: Row) -> np.ndarray:
    return np.zeros(len(row.scores))


def linear(row: Row) -> np.ndarray:
    if row.score_max:
        return row.scores
    queries = [min(row.line_width, row.position - int(position)) for position in row.slot_pos]
    return row.scores.astype(float) / queries


def streaming(row: Row) -> np.ndarray:
    return row.slot_pos.astype(float)


def h2o(row: Row) -> np.ndarray:
    return row.scores


def fading(row: Row) -> np.ndarray:
    return row.scores


def _neighbours(row: Row, position: int, reach: int) -> list[float]:
    slots = row.slots()
    near = range(position - reach, position + reach + 1)
    return [float(row.scores[slots[p]]) if p in slots else 0.0 for p in near]


def snapkv(row: Row) -> np.ndarray:
    values = np.zeros(len(row.scores))
    for position, slot in row.slots().items():
        values[slot] = sum(_neighbours(row, position, 2)) / 5
    return values


def similarities(row: Row) -> np.ndarray:
    """Cosines ``[n, n]`` of the keys in the slots that hold one."""
    keys = row.keys[list(row.slots().values())]
    directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return directions @ directions.T


def rkv(row: Row) -> np.ndarray:
    slots = row.slots()
    similarity: dict[tuple[int, int], float] = {}
    for one, slot in slots.items():
        for other, other_slot in slots.items():
            if one != other:
                a, b = row.keys[slot], row.keys[other_slot]
                similarity[one, other] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        duplicates = [p for p in slots if p != one and similarity[one, p] > 0.5]
        if duplicates:
            similarity[one, max(duplicates)] = 0.0
    redundancy = {
        p: np.exp(sum(similarity[other, p] for other in slots if other != p) / len(slots)) for p in slots
    }
    total = sum(redundancy.values())
    queries = 1 if row.score_max else min(8, row.line_width)
    values = np.zeros(len(row.scores))
    for position, slot in slots.items():
        importance = max(_neighbours(row, position, 3)) / queries
        values[slot] = 0.1 * importance - 0.9 * redundancy[position] / total
    return values


def leverage(row: Row) -> np.ndarray:
    slots = [slot for position, slot in row.slots().items() if position >= row.prefix_len]
    importance = np.zeros(len(row.scores))
    for slot in slots:
        apart = row.keys[slot] - row.keys[slots].astype(float).mean(0)
        importance[slot] = np.linalg.norm(row.values[slot]) * np.linalg.norm(apart)
    return importance


IMPORTANCE: dict[str, Callable[[Row], np.ndarray]] = {
    policy.__name__: policy for policy in (full, linear, streaming, h2o, fading, snapkv, rkv, leverage)
}


def protected(row: Row, slot: int, capacity: int, recent_tokens: int, anchor_tokens: int) -> bool:
    position = row.slot_pos[slot]
    index = position - row.prefix_len
    return bool(
        slot < row.prefix_len
        or slot >= capacity
        or 0 <= index < anchor_tokens
        or position >= max(0, row.position - recent_tokens)
    )


def choose(
    row: Row, importance: np.ndarray, capacity: int, recent_tokens: int, anchor_tokens: int
) -> list[int]:
    """The slots of the next line: empty ones, then the least important, ties by position; in the order of positions."""
    candidates = []
    for slot, position in enumerate(row.slot_pos):
        if position < 0 and row.prefix_len <= slot < capacity:
            candidates.append((0, 0.0, slot, slot))
        elif position >= 0 and not protected(row, slot, capacity, recent_tokens, anchor_tokens):
            candidates.append((1, float(importance[slot]), int(position), slot))
    chosen = [slot for *_, slot in sorted(candidates)[: row.line_width]]
    return sorted(chosen, key=lambda slot: (row.slot_pos[slot], slot))
