"""Cache policies: one file each, registered here."""

from __future__ import annotations

from graphs.policies.base import FinishedLine, LineEndParams, Policy, choose_slots, end_line
from graphs.policies.full import Full
from graphs.policies.linear import Linear

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Full, Linear)}

__all__ = [
    "POLICIES",
    "FinishedLine",
    "LineEndParams",
    "Policy",
    "choose_slots",
    "end_line",
]
