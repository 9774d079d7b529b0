"""Everything that is damaged."""

from __future__ import annotations

from fuzzing.bases import Bases, Target
from fuzzing.bundle_targets import BundleTarget, ManifestTarget, RunTarget, TokensTarget, TraceTarget
from fuzzing.input_targets import CaptionsTarget, CheckpointTarget, FolderTarget, PromptsTarget

__all__ = ["TARGETS", "Bases", "Target"]

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        *(ManifestTarget, BundleTarget, CheckpointTarget, FolderTarget, TraceTarget, TokensTarget, RunTarget),
        *(PromptsTarget, CaptionsTarget),
    )
}
