"""What a comparison compares: cells, the grid that makes them, and their names."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from linert.runtime.bundles.cache_settings import FULL, CacheSettings
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.bundles.setting import settings_of
from linert.runtime.drawing.cache_request import CacheRequest, budget_lines
from linert.runtime.errors import GeometryError, RequestError


@dataclass(frozen=True)
class Cell:
    """One configuration. ``budget``: as it was asked for, like ``1/6``."""

    cache: CacheSettings
    budget: str

    @property
    def key(self) -> str:
        """A folder name."""
        digest = hashlib.sha256(msgspec.json.encode(self.cache)).hexdigest()
        return f"{self.cache.policy}-{digest[:12]}"


@dataclass(frozen=True)
class Grid:
    """What is to be combined with what.

    ``settings``: values to try of further settings, by their names in a :class:`CacheRequest`; one that has none stays at the
    bundle's default.
    """

    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def cells(self, manifest: Manifest) -> tuple[list[Cell], list[str]]:
        """The full cache first, then every combination that fits once, and why others do not.

        Raises:
            RequestError: the bundle lacks a policy, full or room, or nothing fits.
        """
        lines = manifest.raster.lines
        full = Cell(settled(manifest, CacheRequest(policy=FULL)), "1")
        if FULL not in manifest.policies:
            raise RequestError(
                "compare measures against the full cache and the bundle does not hold it: export it with "
                f"--policy {','.join([*manifest.policies, 'full'])}"
            )
        cells, refused = {full.cache: full}, []
        tried = {name: values for name, values in self.settings.items() if values}
        policies = [policy for policy in self.policies if policy != FULL]
        for budget, policy, *chosen in itertools.product(self.budgets, policies, *tried.values()):
            request = CacheRequest(
                policy=policy,
                budget_lines=budget_lines(budget, lines),
                **dict(zip(tried, chosen, strict=True)),
            )
            try:
                cache = settled(manifest, request)
                manifest.check_cache(cache)
            except GeometryError as error:
                refused.append(f"{policy}, {budget}: {error}")
                continue
            cells.setdefault(cache, Cell(cache, budget))
        if len(cells) == 1 and refused:
            raise RequestError(f"no cell of the grid fits: {refused[0]}")
        return list(cells.values()), refused


def settled(manifest: Manifest, request: CacheRequest) -> CacheSettings:
    """What a bundle makes of ``request``."""
    defaults = manifest.require_cache("compare weighs cache policies", request.policy)
    return request.settle(manifest.raster, manifest.capacity_lines, defaults)


def labels_of(cells: Sequence[Cell]) -> list[str]:
    """The policy of each cell, and whatever else differs between the cells that evict."""
    evicting = [cell.cache for cell in cells if cell.cache.evicts]
    varying = [
        setting
        for setting in settings_of(CacheSettings)
        if len({getattr(cache, setting.name) for cache in evicting}) > 1
    ]
    labels = []
    for cell in cells:
        cache = cell.cache
        parts = [cache.policy]
        if cache.evicts:
            parts += [setting.label(cache) for setting in varying]
            parts += ["layers differ"] * (len(set(cache.budget_lines)) > 1)
        labels.append(", ".join(parts))
    return labels
