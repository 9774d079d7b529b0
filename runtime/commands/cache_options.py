"""The options by which commands choose a cache policy and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import click

from runtime.errors import RequestError
from runtime.geometry import (
    Aggregation,
    CacheSettings,
    HeadScores,
    Mode,
    Raster,
    least_budget,
    pyramid,
    recent_tokens,
)

PYRAMID = "pyramid"
UNIFORM = "uniform"


@dataclass(frozen=True)
class CacheRequest:
    """Cache settings as asked for; None was not given."""

    policy: str | None = None
    budget_lines: int | None = None
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
        policy = self.policy or defaults.policy
        budgets = self._budgets(raster, len(capacity_lines), policy, defaults)
        recent, anchors = protection(
            raster,
            min(budgets),
            self.recent_lines,
            self.anchor_tokens,
            defaults.recent_lines,
            defaults.anchor_tokens,
        )
        if self.layer_budgets == PYRAMID and policy != "full":
            least = least_budget(raster, recent, anchors)
            budgets = pyramid(budgets[0], len(budgets), least, min(capacity_lines))
        return CacheSettings(
            policy,
            Mode(self.mode or defaults.mode),
            budgets,
            recent,
            anchors,
            Aggregation(self.aggregation or defaults.aggregation),
            HeadScores(self.head_scores or defaults.head_scores),
            defaults.share_guidance if self.share_guidance is None else self.share_guidance,
        )

    def _budgets(self, raster: Raster, layers: int, policy: str, defaults: CacheSettings) -> tuple[int, ...]:
        """Lines of each layer; for a pyramid the mean in every one."""
        if self.layer_budgets not in (None, PYRAMID, UNIFORM):
            if self.budget_lines is not None:
                raise RequestError("--layer-budgets lists every layer's lines: leave --budget-lines out")
            try:
                return tuple(int(part) for part in str(self.layer_budgets).split(","))
            except ValueError:
                raise RequestError(
                    f"--layer-budgets {self.layer_budgets}: give {UNIFORM}, {PYRAMID}, or one number of lines a layer"
                ) from None
        if self.budget_lines is not None:
            return (self.budget_lines,) * layers
        if policy == "full":
            return (raster.lines,) * layers
        if defaults.policy == "full":
            return (quarter(raster),) * layers
        if self.layer_budgets is None:
            return defaults.budget_lines
        return (round(sum(defaults.budget_lines) / layers),) * layers


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


def cache_options(policy: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the cache options; it gets them as one ``cache`` argument, a :class:`CacheRequest`.

    ``policy=False`` leaves ``--policy`` out, for a command that takes several.
    """
    options = [
        click.option("--policy", help="Cache policy, of those that the bundle holds."),
        click.option("--budget-lines", type=int, help="Lines in the cache, the one in progress included."),
        click.option(
            "--layer-budgets",
            help="How layers share the budget: uniform, pyramid (much to the first, little to the last), or a "
            "list of lines like 6,5,4,3.",
        ),
        click.option(
            "--mode",
            type=click.Choice([str(m) for m in Mode]),
            help="Whether an evicted slot empties at once or stays visible until it is overwritten.",
        ),
        click.option("--recent-lines", type=float, help="Newest lines that stay; 0.5 is half a line."),
        click.option("--anchor-tokens", type=int, help="First image tokens that stay."),
        click.option(
            "--aggregation",
            type=click.Choice([str(a) for a in Aggregation]),
            help="How the attention of many queries becomes one score.",
        ),
        click.option(
            "--head-scores",
            type=click.Choice([str(h) for h in HeadScores]),
            help="Every head evicts by its own scores, or all by the averaged ones.",
        ),
        click.option(
            "--share-guidance/--no-share-guidance",
            default=None,
            help="Conditional and unconditional rows evict alike, or each for itself.",
        ),
    ]
    names = [field.name for field in fields(CacheRequest)]
    if not policy:
        del options[0]
        names.remove("policy")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(**arguments: Any) -> Any:
            values = {name: arguments.pop(name) for name in names}
            return function(cache=CacheRequest(**values), **arguments)

        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate
