"""The settings of the sampler: how tokens are drawn."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import msgspec

from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.setting import Setting, StageInput

MOST_COUNT = 2**31 - 1
"""Largest number of steps or tokens that a setting takes."""


class GuidanceSchedule(StrEnum):
    """How the scale of guidance goes through an image that is drawn in groups: the same for all tokens, or linearly from 1 up to it."""

    CONSTANT = "constant"
    LINEAR = "linear"


def _grows(schedule: GuidanceSchedule, raster: Raster) -> bool:
    return schedule == GuidanceSchedule.LINEAR


class SamplingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are drawn.

    ``guidance``: scale of classifier-free guidance; 1 or less uses the conditional logits alone.
    ``guidance_interval``: decode steps after this one (from 0) are unguided; -1 never. ``top_k`` 0 and
    ``top_p`` 1 keep every token. ``greedy`` takes the most likely token. ``guidance_schedule`` and ``steps``
    are of images that are drawn in groups: how the scale goes through the image, and the number of groups, 0 for the bundle's usual one.
    """

    guidance: Annotated[
        float,
        Setting(
            help="Scale of classifier-free guidance; 1 or less draws without.",
            stage_input=StageInput(name="guidance", dtype="float32"),
        ),
    ] = 1.0
    guidance_interval: Annotated[
        int,
        Setting(
            help="Last guided decode step, counted in tokens where images are drawn in groups; -1 guides all.",
            stage_input=StageInput(name="guidance_interval", dtype="int64"),
        ),
    ] = -1
    guidance_schedule: Annotated[
        GuidanceSchedule,
        Setting(
            help="Of models that draw in groups: one scale for all tokens, or one that grows linearly from 1.",
            stage_input=StageInput(name="guidance_linear", dtype="int64", value=_grows),
        ),
    ] = GuidanceSchedule.CONSTANT
    temperature: Annotated[
        float,
        Setting(
            help="Divides the logits.",
            stage_input=StageInput(name="temperature", dtype="float32"),
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Setting(
            help="Most likely tokens that are drawn from; 0 keeps all.",
            stage_input=StageInput(name="top_k", dtype="int64"),
        ),
    ] = 0
    top_p: Annotated[
        float,
        Setting(
            help="Probability of the most likely tokens that are drawn from; 1 keeps all.",
            stage_input=StageInput(name="top_p", dtype="float32"),
        ),
    ] = 1.0
    greedy: Annotated[
        bool,
        Setting(
            help="Take the most likely token instead of a draw.",
            stage_input=StageInput(name="greedy", dtype="int64"),
        ),
    ] = False

    steps: Annotated[
        int,
        Setting(
            help="Of models that draw in groups: decode steps of an image, of the numbers that the bundle has; 0 takes its usual one.",
            exported=False,
        ),
    ] = 0

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p have anything to do."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)

    @property
    def guided(self) -> bool:
        """Whether images are drawn with unconditional rows."""
        return self.guidance > 1

    def faults(self, *, guided: bool) -> list[str]:
        """What is wrong with these settings for a bundle with (``guided``) or without unconditional rows."""
        faults = []
        if not math.isfinite(self.guidance) or self.guidance < 0:
            faults.append(f"guidance {self.guidance} must be a finite number of at least 0")
        elif not guided and self.guidance > 1:
            faults.append(
                f"guidance {self.guidance} needs unconditional rows and the bundle was exported without: "
                "export it with --guidance above 1"
            )
        if not -1 <= self.guidance_interval <= MOST_COUNT:
            faults.append(f"guidance_interval {self.guidance_interval} must be -1 or a step number")
        if not math.isfinite(self.temperature) or self.temperature <= 0:
            faults.append(f"temperature {self.temperature} must be a finite number above 0")
        if not 0 <= self.top_k <= MOST_COUNT:
            faults.append(f"top_k {self.top_k} must be at least 0 and at most {MOST_COUNT}")
        if self.steps < 0:
            faults.append(f"steps {self.steps} must be at least 0")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p {self.top_p} must be above 0 and at most 1")
        return faults
