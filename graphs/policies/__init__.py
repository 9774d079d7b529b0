"""Cache policies: one file each, registered here."""

from __future__ import annotations

from graphs.policies.base import FinishedLine, LineEndParams, Policy, choose_slots, end_line, evict
from graphs.policies.full import Full
from graphs.policies.h2o import H2O
from graphs.policies.linear import Linear
from graphs.policies.rkv import RKV
from graphs.policies.snapkv import SnapKV
from graphs.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Linear, Streaming, H2O, SnapKV, RKV, Full)
}

__all__ = [
    "POLICIES",
    "FinishedLine",
    "LineEndParams",
    "Policy",
    "choose_slots",
    "end_line",
    "evict",
]
