"""Cache settings as people ask for them, resolved against the budget and a bundle's defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import msgspec

from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import (
    FULL,
    CacheSettings,
    least_budget,
    pyramid,
)
from linert.runtime.bundles.raster import Raster, recent_tokens
from linert.runtime.bundles.setting import settings_of
from linert.runtime.drawing.samples import shortened
from linert.runtime.errors import RequestError

PYRAMID = "pyramid"
UNIFORM = "uniform"

MOST_LINES = 1_000_000
"""Lines that are taken for meant; what fits is looked at where the image is known."""


@dataclass(frozen=True)
class CacheRequest:
    """Cache settings as asked for; None was not given. ``budget_lines``: a number, or a fraction of the image like ``1/6``."""

    policy: str | None = None
    budget_lines: int | str | None = None
    layer_budgets: str | None = None
    mode: str | None = None
    recent_lines: float | None = None
    anchor_tokens: int | None = None
    aggregation: str | None = None
    head_scores: str | None = None
    share_guidance: bool | None = None

    @property
    def empty(self) -> bool:
        return self == CacheRequest()

    def settle_for(self, bundle: Bundle) -> tuple[Bundle, CacheSettings | None]:
        """Fill in a bundle's defaults, None for one that has no cache, and take the variant with the smallest buffers that hold them.

        Raises:
            RequestError: something is asked of a cache that is not there.
            GeometryError: a pyramid does not fit.
            BundleError: a file of the variant is missing or changed.
        """
        manifest = bundle.manifest
        if self.empty and manifest.cache is None:
            return bundle, None
        default = manifest.require_cache("cache options").policy
        defaults = manifest.require_cache("cache options", self.policy or default)
        settings = self.settle(manifest.raster, bundle.widest.capacity_lines, defaults)
        return bundle.fitting(settings), settings

    def settle(self, raster: Raster, capacity_lines: Sequence[int], defaults: CacheSettings) -> CacheSettings:
        """Fill in what was not given.

        The defaults' recent lines and anchor tokens are cut to what the budget holds; numbers that were given are
        left for :meth:`CacheSettings.check`.

        Args:
            raster: the image.
            capacity_lines: lines of each layer's buffer.
            defaults: what was not asked for.

        Raises:
            RequestError: ``layer_budgets`` is neither a shape nor a list of numbers.
            GeometryError: a pyramid does not fit.
        """
        # What is no number is within no bounds; what is negative is left for the check.
        if self.recent_lines is not None and not -MOST_LINES < self.recent_lines < MOST_LINES:
            raise RequestError(f"--recent-lines {self.recent_lines}: give a number of lines, like 1 or 0.5")
        policy = defaults.policy if self.policy is None else self.policy
        budgets = self._budgets(raster, len(capacity_lines), policy, defaults)
        recent, anchors = protection(
            raster,
            min(budgets),
            self.recent_lines,
            self.anchor_tokens,
            defaults.recent_lines,
            defaults.anchor_tokens,
        )
        if self.layer_budgets == PYRAMID and policy != FULL:
            least = least_budget(raster, recent, anchors)
            budgets = pyramid(budgets[0], len(budgets), least, min(capacity_lines))
        asked = {setting.name: getattr(self, setting.name) for setting in settings_of(CacheSettings)}
        settings = {
            name: getattr(defaults, name) if value is None else value for name, value in asked.items()
        }
        settings |= {
            "policy": policy,
            "budget_lines": budgets,
            "recent_lines": recent,
            "anchor_tokens": anchors,
        }
        return msgspec.convert(settings, type=CacheSettings)

    def _budgets(self, raster: Raster, layers: int, policy: str, defaults: CacheSettings) -> tuple[int, ...]:
        """Lines of each layer; for a pyramid the mean in every one."""
        if self.layer_budgets not in (None, PYRAMID, UNIFORM):
            if self.budget_lines is not None:
                raise RequestError("--layer-budgets lists every layer's lines: leave --budget-lines out")
            parts = [part.strip() for part in str(self.layer_budgets).split(",")]
            if not all(re.fullmatch("-?[0-9]{1,9}", part) for part in parts):
                raise RequestError(
                    f"--layer-budgets {shortened(str(self.layer_budgets), 60)}: give {UNIFORM}, {PYRAMID}, or one number of lines a layer"
                )
            return tuple(int(part) for part in parts)
        if self.budget_lines is not None:
            asked = self.budget_lines
            return (asked if isinstance(asked, int) else budget_lines(asked, raster.lines),) * layers
        if policy == FULL:
            return (raster.lines,) * layers
        if not defaults.evicts:
            return (quarter(raster),) * layers
        if self.layer_budgets is None:
            return defaults.budget_lines
        return (round(sum(defaults.budget_lines) / layers),) * layers


def budget_lines(text: str, lines: int) -> int:
    """Whole lines of a budget like ``4`` or ``1/6`` (of the image, rounded to the nearest, at least 1)."""
    # An exponent could ask for a number of any length.
    known = re.fullmatch(r"[0-9]{1,9}(/[0-9]{1,9}|\.[0-9]{1,9})?|\.[0-9]{1,9}", text.strip())
    value = Fraction(text) if known and not re.search("/0+$", text.strip()) else Fraction(0)
    if value <= 0 or (value >= 1 and value.denominator != 1):
        raise RequestError(
            f"budget {shortened(text, 60)!r} is neither a number of lines nor a fraction like 1/4"
        )
    return max(1, int(value * lines + Fraction(1, 2))) if value < 1 else int(value)


def quarter(raster: Raster) -> int:
    """The default budget: a quarter of the image's lines, at least one."""
    return max(1, raster.lines // 4)


def protection(
    raster: Raster,
    budget: int,
    recent: float | None,
    anchors: int | None,
    usual_recent: float,
    usual_anchors: int,
) -> tuple[float, int]:
    """Recent lines and anchor tokens: as given, else the usual ones as far as ``budget`` lines hold them.

    Recent lines come first, but for a quarter of what the line in progress leaves: a few anchors are worth more than
    the last recent tokens.
    """
    room = (budget - 1) * raster.line_width
    least = min(usual_anchors, math.ceil(room / 4)) if anchors is None else anchors
    if recent is None:
        recent = max(0.0, min(float(usual_recent), (room - least) / raster.line_width))
    if anchors is None:
        anchors = max(0, min(usual_anchors, room - recent_tokens(raster, recent)))
    return recent, anchors
