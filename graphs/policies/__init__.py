"""Cache policies: one file each, registered here."""

from __future__ import annotations

from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy, choose_slots, end_line, evict
from linert.graphs.policies.fading import Fading
from linert.graphs.policies.full import Full
from linert.graphs.policies.h2o import H2O
from linert.graphs.policies.leverage import Leverage
from linert.graphs.policies.linear import Linear
from linert.graphs.policies.rkv import RKV
from linert.graphs.policies.snapkv import SnapKV
from linert.graphs.policies.streaming import Streaming
from linert.runtime.bundles.cache_settings import faults_of

POLICIES: dict[str, type[Policy]] = {}
"""Policies by name, the default first. A bundle may hold any of them."""


def register(policy: type[Policy]) -> type[Policy]:
    """Let exports know a policy; it is returned, so that this can stand above a class.

    Raises:
        ValueError: there is another of its name, or what it says to be usual are no settings of the cache.
    """
    if faults := faults_of(policy.usual):
        raise ValueError(f"what is usual under {policy.name}: {'; '.join(faults)}")
    if POLICIES.setdefault(policy.name, policy) is not policy:
        raise ValueError(f"there is a policy {policy.name} already: {POLICIES[policy.name].__module__}")
    return policy


for _policy in (Leverage, Linear, Streaming, H2O, Fading, SnapKV, RKV, Full):
    register(_policy)

__all__ = [
    "POLICIES",
    "FinishedLine",
    "LineEndParams",
    "Policy",
    "choose_slots",
    "end_line",
    "evict",
    "register",
]
