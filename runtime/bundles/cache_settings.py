"""The settings of the cache: what a run keeps of the line buffer.

A layer's line buffer has ``prefix_len + lines * line_width`` slots. A run uses a budget of them, the line in
progress included. Kept always: the prefix, the first ``anchor_tokens`` image tokens and the last ``recent_lines`` lines.
"""

# Annotations are evaluated here, not kept as text: they hold the declarations of the settings.
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from linert.runtime.bundles.raster import Raster, recent_tokens
from linert.runtime.bundles.setting import Setting, StageInput, settings_of
from linert.runtime.errors import GeometryError
from linert.runtime.text import brief, lines_text

FULL = "full"
"""The policy that evicts nothing: its budget is the whole image."""


class Mode(StrEnum):
    """What happens to a slot that was chosen: ``strict`` empties it at once (the semantics of LineAR), ``lazy``
    leaves it visible until it is overwritten."""

    STRICT = "strict"
    LAZY = "lazy"


class Aggregation(StrEnum):
    """How a slot's score sums up the attention that many queries paid it: the ``mean`` (for the policies that go on
    from line to line, the sum), or the ``max``."""

    MEAN = "mean"
    MAX = "max"


class HeadScores(StrEnum):
    """Whether every KV head evicts by its ``own`` scores, or all of a sequence by the ``averaged`` ones."""

    OWN = "own"
    AVERAGED = "averaged"


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the cache keeps.

    ``budget_lines``: lines of each layer, the one in progress counted. ``recent_lines``: newest lines that stay, cut to
    whole tokens. ``share_guidance``: the conditional and the
    unconditional row of an image evict alike.
    """

    policy: str
    mode: Annotated[
        Mode,
        Setting(
            help="Whether an evicted slot empties at once or stays visible until it is overwritten.",
            default=Mode.LAZY,
            stage_input=StageInput(name="strict", dtype="int64", value=lambda mode, _: mode is Mode.STRICT),
        ),
    ]
    budget_lines: tuple[int, ...]
    recent_lines: Annotated[
        float,
        Setting(
            help="Newest lines that stay; 0.5 is half a line.",
            default=1,
            least=0,
            label=lambda lines: f"{lines:g} recent lines",
            stage_input=StageInput(
                name="recent_tokens", dtype="int64", value=lambda lines, raster: recent_tokens(raster, lines)
            ),
        ),
    ]
    anchor_tokens: Annotated[
        int,
        Setting(
            help="First image tokens that stay.",
            default=16,
            least=0,
            label=lambda tokens: f"{tokens} anchor tokens",
            stage_input=StageInput(name="anchor_tokens", dtype="int64"),
        ),
    ]
    aggregation: Annotated[
        Aggregation,
        Setting(
            help="How the attention of many queries becomes one score.",
            default=Aggregation.MEAN,
            label=lambda aggregation: f"{aggregation} attention",
            stage_input=StageInput(
                name="score_max", dtype="int64", value=lambda aggregation, _: aggregation is Aggregation.MAX
            ),
        ),
    ]
    head_scores: Annotated[
        HeadScores,
        Setting(
            help="Every head evicts by its own scores, or all by the averaged ones.",
            default=HeadScores.OWN,
            label=lambda scores: f"heads {scores}",
            stage_input=StageInput(
                name="average_heads", dtype="int64", value=lambda scores, _: scores is HeadScores.AVERAGED
            ),
        ),
    ]
    share_guidance: Annotated[
        bool,
        Setting(
            help="Conditional and unconditional rows evict alike, or each for itself.",
            default=False,
            label=lambda shared: f"guidance {'shared' if shared else 'apart'}",
            stage_input=StageInput(name="share_guidance", dtype="int64"),
        ),
    ]

    @property
    def evicts(self) -> bool:
        """Whether anything ever leaves the cache."""
        return self.policy != FULL

    def capacity(self, raster: Raster) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(raster.slots(lines) for lines in self.budget_lines)

    @property
    def text(self) -> str:
        """One line for people: numbers, and what is not as usual."""
        parts = [f"{self.policy} ({self.mode})", f"{lines_text(self.budget_lines)} lines"]
        if self.evicts:
            parts += [
                setting.label(self)
                for setting in settings_of(CacheSettings)
                if setting.name != "mode"
                and (setting.type in (int, float) or getattr(self, setting.name) != setting.declared.default)
            ]
        return ", ".join(parts)

    def check(self, raster: Raster, capacity_lines: Sequence[int]) -> None:
        """Raise :class:`GeometryError` naming every setting that does not fit.

        Args:
            raster: the image.
            capacity_lines: lines of each layer's buffer.
        """
        numbers = {"budget_lines": (min(self.budget_lines, default=0), 1)} | {
            setting.name: (getattr(self, setting.name), setting.declared.least)
            for setting in settings_of(CacheSettings)
            if setting.declared.least is not None
        }
        faults = [
            f"{name} is {value}, must be at least {least}"
            for name, (value, least) in numbers.items()
            # What is no number is not below it either.
            if not value >= least or value == math.inf
        ]
        if len(self.budget_lines) != len(capacity_lines):
            faults.append(f"budgets for {len(self.budget_lines)} layers; the model has {len(capacity_lines)}")
        elif not faults:
            faults += self._budget_faults(raster, capacity_lines)
        if faults:
            raise GeometryError("cache settings: " + "; ".join(faults))

    def _budget_faults(self, raster: Raster, capacity_lines: Sequence[int]) -> list[str]:
        least, most = min(self.budget_lines), max(self.budget_lines)
        if most > raster.lines:
            return [f"a budget of {most} lines is above the image's {raster.lines} lines"]
        over = [
            (layer, budget, capacity)
            for layer, (budget, capacity) in enumerate(zip(self.budget_lines, capacity_lines, strict=True))
            if budget > capacity
        ]
        if over:
            layer, budget, capacity = over[0]
            return [
                f"a budget of {budget} lines is above the {capacity} that the bundle's buffer has in layer {layer}: "
                f"export with --capacity-lines {budget}"
            ]
        if not self.evicts:
            if least != raster.lines:
                return [f"the full policy evicts nothing: its budget is {raster.lines} lines, not {least}"]
            return []
        needed = least_budget(raster, self.recent_lines, self.anchor_tokens)
        if least < min(needed, raster.lines):
            width = raster.line_width
            return [
                f"a budget of {least} lines ({least * width} tokens) cannot hold {self.anchor_tokens} anchor "
                f"tokens, {self.recent_lines:g} recent lines and the line in progress: give at least {needed} "
                "lines, or protect less"
            ]
        return []


def faults_of(settings: Mapping[str, object]) -> list[str]:
    """What of ``settings``, some of the declared ones by name, no run could have: another name, type, or range."""
    declared = {setting.name: setting for setting in settings_of(CacheSettings)}
    faults = [f"{brief(name, 40)!r} is no setting of the cache" for name in settings.keys() - declared]
    for name in settings.keys() & declared:
        least = declared[name].declared.least
        try:
            value: Any = msgspec.convert(settings[name], declared[name].type)
        except msgspec.ValidationError as error:
            faults.append(f"{name}: {brief(str(error))}")
        else:
            if least is not None and not least <= value < math.inf:
                faults.append(f"{name} is {value}, must be at least {least}")
    return sorted(faults)


def cache_text(cache: CacheSettings | None) -> str:
    """One line for people, of a model that need not have a cache."""
    return cache.text if cache else "none: what the model remembers is of one size"


NOTHING_EVICTED = "nothing is evicted: every token has a slot of its own"
"""For people, of a model whose layers keep all that was drawn."""


def least_budget(raster: Raster, recent_lines: float, anchor_tokens: int) -> int:
    """Lines that hold what is protected and the line in progress."""
    protected = recent_tokens(raster, recent_lines) + anchor_tokens
    return 1 + math.ceil(protected / raster.line_width)


def pyramid(mean: int, layers: int, least: int, most: int) -> tuple[int, ...]:
    """Lines of each layer, falling from the first to the last with the given mean (PyramidKV, arXiv 2406.02069).

    The published arithmetic progression, from ``2 mean - mean / 20`` down to ``mean / 20``, cut to whole lines
    between ``least`` and ``most``. Rounding and cutting are made good so that the sum stays ``mean * layers``.

    Raises:
        GeometryError: ``mean`` is not between ``least`` and ``most``.
    """
    if not least <= mean <= most:
        raise GeometryError(f"a pyramid of mean {mean} lines does not fit between {least} and {most} lines")
    if layers == 1:
        return (mean,)
    low = mean / 20
    high = 2 * mean - low
    ideal = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    # A common shift makes up for what the cut takes away; the sum grows with it.
    shifts = [-high, float(most)]
    for _ in range(60):
        middle = sum(shifts) / 2
        total = sum(min(max(value + middle, least), most) for value in ideal)
        shifts[total > mean * layers] = middle
    cut = [min(max(value + shifts[0], least), most) for value in ideal]
    lines = [math.floor(value + 1e-9) for value in cut]
    missing = mean * layers - sum(lines)
    by_remainder = sorted(range(layers), key=lambda layer: (lines[layer] - cut[layer], layer))
    for layer in by_remainder[:missing]:
        lines[layer] += 1
    return tuple(lines)
