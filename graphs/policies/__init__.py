"""Cache policies: one file each, registered here."""

from __future__ import annotations

from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy, choose_slots, end_line, evict
from linert.graphs.policies.full import Full
from linert.graphs.policies.h2o import H2O
from linert.graphs.policies.linear import Linear
from linert.graphs.policies.rkv import RKV
from linert.graphs.policies.snapkv import SnapKV
from linert.graphs.policies.streaming import Streaming

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
