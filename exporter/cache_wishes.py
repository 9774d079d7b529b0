"""What an export asks of the cache, and the defaults where it asks nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linert.exporter.bundle_export import raster_of
from linert.exporter.models import LoadedTransformer
from linert.runtime.bundles.cache_settings import FULL, CacheSettings
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.setting import settings_of
from linert.runtime.drawing.cache_request import CacheRequest, quarter
from linert.runtime.errors import RequestError

DEFAULT_POLICY = "linear"


@dataclass(frozen=True)
class CacheWishes:
    """What an export asks of the cache; an empty tuple and None leave it open."""

    policies: tuple[str, ...]
    request: CacheRequest
    capacity_lines: int | None

    def settle(
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
        return policies, *settle_cache(raster, layers, policies, self.request, self.capacity_lines)


def settle_cache(
    raster: Raster, layers: int, policies: Sequence[str], request: CacheRequest, capacity_lines: int | None
) -> tuple[CacheSettings, tuple[int, ...]]:
    """The cache settings that a bundle runs with by default, and the lines of each layer's buffer."""
    usual = CacheSettings(
        policy=policies[0],
        budget_lines=(raster.lines if policies[0] == FULL else quarter(raster),) * layers,
        **{setting.name: setting.declared.default for setting in settings_of(CacheSettings)},
    )
    cache = request.settle(raster, (raster.lines,) * layers, usual)
    cache.check(raster, (raster.lines,) * layers)
    if capacity_lines is not None:
        return cache, (capacity_lines,) * layers
    if FULL in policies:
        return cache, (raster.lines,) * layers
    return cache, cache.budget_lines
