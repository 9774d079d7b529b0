"""What an export asks of the cache, and the defaults where it asks nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linert.exporter.bundle_export import raster_of
from linert.exporter.models import LoadedTransformer
from linert.runtime.bundles.geometry import FULL, Aggregation, CacheSettings, HeadScores, Mode, Raster
from linert.runtime.drawing.cache_request import CacheRequest, quarter
from linert.runtime.errors import RequestError

DEFAULT_POLICY = "linear"
DEFAULT_MODE = Mode.LAZY
DEFAULT_RECENT_LINES = 1
DEFAULT_ANCHOR_TOKENS = 16
DEFAULT_AGGREGATION = Aggregation.MEAN
DEFAULT_HEAD_SCORES = HeadScores.OWN
DEFAULT_SHARE_GUIDANCE = False


@dataclass(frozen=True)
class CacheWishes:
    """What an export asks of the cache; an empty tuple and None leave it open."""

    policies: tuple[str, ...]
    request: CacheRequest
    capacity_lines: int | None

    def plan(
        self, transformer: LoadedTransformer
    ) -> tuple[tuple[str, ...], CacheSettings | None, tuple[int, ...]]:
        """Policies, default settings and lines of every layer's buffer; nothing for a model without a cache.

        Raises:
            RequestError: something is asked of a cache that is not there.
        """
        if not transformer.family.cached:
            if self.policies or not self.request.empty or self.capacity_lines is not None:
                raise RequestError(
                    f"{transformer.path} is a {transformer.family.title}, which has no KV cache: leave policies, budgets and "
                    "--capacity-lines out"
                )
            return (), None, ()
        policies = self.policies or (DEFAULT_POLICY,)
        raster, layers = raster_of(transformer.config), transformer.config.layers
        return policies, *cache_plan(raster, layers, policies, self.request, self.capacity_lines)


def cache_plan(
    raster: Raster, layers: int, policies: Sequence[str], request: CacheRequest, capacity_lines: int | None
) -> tuple[CacheSettings, tuple[int, ...]]:
    """The cache settings that a bundle runs with by default, and the lines of each layer's buffer."""
    usual = CacheSettings(
        policy=policies[0],
        mode=DEFAULT_MODE,
        budget_lines=(raster.lines if policies[0] == FULL else quarter(raster),) * layers,
        recent_lines=DEFAULT_RECENT_LINES,
        anchor_tokens=DEFAULT_ANCHOR_TOKENS,
        aggregation=DEFAULT_AGGREGATION,
        head_scores=DEFAULT_HEAD_SCORES,
        share_guidance=DEFAULT_SHARE_GUIDANCE,
    )
    cache = request.settle(raster, (raster.lines,) * layers, usual)
    cache.check(raster, (raster.lines,) * layers)
    if capacity_lines is not None:
        return cache, (capacity_lines,) * layers
    if FULL in policies:
        return cache, (raster.lines,) * layers
    return cache, cache.budget_lines
