"""What an export asks of the cache, and the defaults where it asks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from linert.exporter.bundle_request import CacheShape, raster_of
from linert.exporter.models import LoadedTransformer
from linert.graphs.policies import POLICIES
from linert.runtime.bundles.cache_settings import FULL, CacheSettings
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.setting import settings_of
from linert.runtime.drawing.cache_request import CacheRequest, quarter
from linert.runtime.errors import RequestError

DEFAULT_POLICY = "leverage"


@dataclass(frozen=True)
class CacheWishes:
    """What an export asks of the cache; empty tuples leave it open. ``capacities``: lines of buffers, a variant of the bundle each."""

    policies: tuple[str, ...]
    request: CacheRequest
    capacities: tuple[int, ...] = ()

    def settle(
        self, transformer: LoadedTransformer, *, guided: bool, one_of_many: bool = False
    ) -> list[CacheShape]:
        """The cache of every variant, the one that holds the default settings first; an empty one for a model without a cache.

        Args:
            guided: whether images have unconditional rows.
            one_of_many: images of other sizes have buffers of the same lines: more than this image's are all of its lines.

        Raises:
            RequestError: something is asked of a cache that is not there, or the default fits no variant.
        """
        if not transformer.family.cached:
            if self.policies or not self.request.empty or self.capacities:
                why = "whose cache evicts nothing" if transformer.family.grouped else "which has no KV cache"
                raise RequestError(
                    f"{transformer.path} is {transformer.family.a_title}, {why}: leave policies, budgets and "
                    "--capacity-lines out"
                )
            return [CacheShape()]
        shapes = self._shapes(transformer, guided=guided, one_of_many=one_of_many)
        return [replace(shape, usual=differences(shape, self.request, guided=guided)) for shape in shapes]

    def _shapes(
        self, transformer: LoadedTransformer, *, guided: bool, one_of_many: bool
    ) -> Sequence[CacheShape]:
        policies = self.policies or (DEFAULT_POLICY,)
        raster, layers = raster_of(transformer.config), transformer.config.layers
        cache = usual_cache(raster, layers, policies, self.request, guided=guided)
        if not self.capacities:
            whole = (raster.lines,) * layers
            return [CacheShape(policies, cache, whole if FULL in policies else cache.budget_lines)]
        most = raster.lines if one_of_many else max(self.capacities)
        # Each variant holds what fits it; one alone is to hold everything that was asked for.
        alone = len(self.capacities) == 1
        shapes = [
            self._variant(raster, layers, policies, cache, lines, alone=alone, guided=guided)
            for lines in sorted({min(lines, most) for lines in self.capacities})
        ]
        if all(FULL not in shape.policies for shape in shapes) and FULL in policies:
            raise RequestError(
                f"the full policy needs a buffer of all {raster.lines} lines: name them in --capacity-lines or leave it out"
            )
        first = next((shape for shape in shapes if shape.cache == cache), None)
        if first is None:
            raise RequestError(
                f"the default, {cache.text}, fits no buffer of {', '.join(map(str, self.capacities))} lines: give --capacity-lines "
                f"{max(cache.budget_lines)} too"
            )
        return [first, *(shape for shape in shapes if shape is not first)]

    def _variant(
        self,
        raster: Raster,
        layers: int,
        policies: Sequence[str],
        cache: CacheSettings,
        lines: int,
        *,
        alone: bool,
        guided: bool,
    ) -> CacheShape:
        """The cache of the variant whose buffers have so many ``lines``: what of ``policies`` and of the default fits it."""
        capacity = (lines,) * layers
        if alone:
            return CacheShape(tuple(policies), cache, capacity)
        fitting = tuple(policy for policy in policies if policy != FULL or lines >= raster.lines)
        if not fitting or (cache.policy in fitting and max(cache.budget_lines) <= lines):
            return CacheShape(fitting, cache, capacity)
        policy = cache.policy if cache.policy in fitting else fitting[0]
        usual = msgspec.structs.replace(
            cache, **difference(policy, msgspec.structs.asdict(cache), self.request, guided=guided)
        )
        asked = CacheRequest(policy=policy, budget_lines=min(lines, max(cache.budget_lines)))
        return CacheShape(fitting, asked.settle(raster, capacity, usual), capacity)


def usual_cache(
    raster: Raster, layers: int, policies: Sequence[str], request: CacheRequest, *, guided: bool
) -> CacheSettings:
    """The cache settings that a bundle runs with by default."""
    usual = CacheSettings(
        policy=policies[0],
        budget_lines=(raster.lines if policies[0] == FULL else quarter(raster),) * layers,
        **usual_settings(policies[0], guided=guided),
    )
    cache = request.settle(raster, (raster.lines,) * layers, usual)
    cache.check(raster, (raster.lines,) * layers)
    return cache


def usual_settings(policy: str, *, guided: bool) -> dict[str, Any]:
    """The settings that suit a policy: the declared defaults, but for what it says itself."""
    declared = {setting.name: setting.declared.default for setting in settings_of(CacheSettings)}
    usual = declared | POLICIES[policy].usual
    # Where there are no unconditional rows, none can evict like others.
    return usual if guided else usual | {"share_guidance": False}


def differences(shape: CacheShape, request: CacheRequest, *, guided: bool) -> dict[str, dict[str, Any]]:
    """The :func:`difference` of every policy of ``shape`` from its cache, of the default that from what its budget holds of it."""
    cache = shape.cache
    if cache is None:
        return {}
    # Beside anchors or recent lines that were asked for, what was left of the others stays: runs would cut what was asked for instead.
    asked = request.recent_lines is not None or request.anchor_tokens is not None
    others = usual_settings(cache.policy, guided=guided) if asked else msgspec.structs.asdict(cache)
    return {policy: difference(policy, others, request, guided=guided) for policy in shape.policies}


def difference(
    policy: str, others: Mapping[str, Any], request: CacheRequest, *, guided: bool
) -> dict[str, Any]:
    """The usual settings of ``policy`` that are not those of the ``others``, where ``request`` says nothing."""
    return {
        name: value
        for name, value in usual_settings(policy, guided=guided).items()
        if value != others[name] and getattr(request, name) is None
    }
