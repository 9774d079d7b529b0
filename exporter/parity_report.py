"""What a comparison with PyTorch measured, what it demands, and what each precision may cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from linert.runtime.bundles.manifest import PrecisionSpec


class Choices(StrEnum):
    """Whose eviction choices both sides live with: ``pytorch``'s, the ``bundle``'s, or each its ``own``."""

    PYTORCH = "pytorch"
    BUNDLE = "bundle"
    OWN = "own"


@dataclass(frozen=True)
class Bounds:
    """What parity demands of a float32 bundle.

    ``logits``: largest absolute error of a logit, relative to the standard deviation of the reference's logits
    where that is above 1. ``scores``: largest absolute error of a slot's attention mass over a line (it sums
    to W). ``write_slots``: least share of equal choices. ``pixels``: largest absolute error of a pixel, relative to
    the largest pixel where that is above 1, from PyTorch in float64 (its float32 convolutions differ from that by up
    to 4e-5 themselves).
    ``margin``: a token may differ where the reference itself was this
    undecided (probability, or logit gap when greedy).
    """

    logits: float = 2e-4
    scores: float = 2e-4
    write_slots: float = 0.999
    pixels: float = 2e-5
    margin: float = 1e-3


@dataclass(frozen=True)
class Cost:
    """What a precision below float32 may cost against the float32 checkpoint, fed the same tokens.

    ``kl``: mean divergence of the next-token distributions, nats a token. ``logits``: mean absolute error of a logit over
    the logits' standard deviation. ``psnr``: of the pixels of the same tokens, dB. Several times what the demo models
    show; what eviction costs the same model is far above (a KL of 0.18 with a quarter of the lines).
    """

    kl: float
    logits: float
    psnr: float


COSTS = {
    "fp32": Cost(kl=1e-7, logits=1e-4, psnr=100.0),
    "fp16": Cost(kl=3e-5, logits=4e-3, psnr=60.0),
    "bf16": Cost(kl=5e-4, logits=2e-2, psnr=45.0),
    "int8": Cost(kl=2e-3, logits=4e-2, psnr=40.0),
    "int4": Cost(kl=5e-2, logits=1.5e-1, psnr=40.0),
}
"""Rounding pixels to 8 bits alone leaves 59 dB."""


def cost_of(precision: PrecisionSpec) -> Cost | None:
    """What the bundle's precision may cost: as its coarsest format; None if all is float32."""
    names = {precision.weights, precision.activations, *precision.parts.values()}
    if names | {precision.image_decoder} == {"fp32"}:
        return None
    costs = [COSTS[name] for name in names]
    return Cost(
        max(cost.kl for cost in costs),
        max(cost.logits for cost in costs),
        COSTS[precision.image_decoder].psnr,
    )


@dataclass
class Check:
    """One bound: ``value`` must be at most (or, if ``at_least``, at least) ``bound``."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Distance:
    """Accumulated distance of two streams of logits ``[..., V]``; KL in nats, of the first from the second."""

    max_abs: float = 0.0
    mean_abs: float = 0.0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1_agreement: float = 0.0
    reference_std: float = 0.0
    rows: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        reference, other = reference.flatten(0, -2), other.flatten(0, -2)
        error = (reference - other).abs()
        kl = F.kl_div(
            other.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        same = (reference.argmax(-1) == other.argmax(-1)).float()
        before, count = self.rows, len(reference)
        self.rows = before + count
        self.max_abs = max(self.max_abs, error.max().item())
        self.kl_max = max(self.kl_max, kl.max().item())
        for name, values in (
            ("mean_abs", error.mean(-1)),
            ("kl_mean", kl),
            ("top1_agreement", same),
            ("reference_std", reference.std(-1)),
        ):
            total = getattr(self, name) * before + values.sum().item()
            setattr(self, name, total / self.rows)
        if not math.isfinite(error.sum().item()):
            self.max_abs = math.inf


@dataclass
class LineReport:
    """One line end: the largest score error and the share of equal write slots, over layers, sequences and heads.

    Under a replay scores decide nothing and are not kept alike on both sides: their error is None.
    """

    line: int
    scores_max_abs: float | None
    write_slots_agreement: float


@dataclass
class FreeRunReport:
    """Images that the bundle draws on its own, beside those that PyTorch does.

    ``tokens_agreement``: share of equal tokens, None where nothing was compared. ``evictions_agreement``: of equal slots. ``first_divergence``:
    of each image, the first token that differs. ``divergence_margin``: how decided PyTorch was there, at most.
    """

    tokens_agreement: float | None = None
    evictions_agreement: float = 1.0
    first_divergence: list[int | None] = field(default_factory=list)
    divergence_margin: float = 0.0


@dataclass
class Report:
    """Everything that :func:`validate` measured. ``runs``: by the width of their windows; or where images are drawn ``in_groups``, by
    their steps."""

    choices: Choices
    asked: list[str]
    seed: int
    in_groups: bool = False
    logits: Distance = field(default_factory=Distance)
    compression: Distance = field(default_factory=Distance)
    steps_max_abs: list[float] = field(default_factory=list)
    lines: list[LineReport] = field(default_factory=list)
    recorded_agreement: float | None = None
    runs: dict[int, FreeRunReport] = field(default_factory=dict)
    pixels_max_abs: float = 0.0
    pixels_range: float = 0.0
    pixels_psnr: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def of_run(self, number: int) -> str:
        """For people, which of :attr:`runs` is meant; nothing of single steps."""
        if self.in_groups:
            return f", in {number} steps"
        return "" if number == 1 else f", windows of {number}"

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for check, made in zip(values["checks"], self.checks, strict=True):
            check["passed"] = made.passed
        if math.isinf(self.pixels_psnr):
            values["pixels_psnr"] = None
        return {"passed": self.passed, **values}


def cost_checks(report: Report, cost: Cost) -> list[Check]:
    """What a bundle below float32 must hold."""
    logits = report.logits
    relative = logits.mean_abs / logits.reference_std if logits.reference_std else 0.0
    # Pixels beyond [-1, 1] raise the peak with them.
    psnr = report.pixels_psnr + 20 * math.log10(max(1.0, report.pixels_range))
    return [
        Check("logits, KL from float32", logits.kl_mean, cost.kl),
        Check("logits, mean abs error over their standard deviation", relative, cost.logits),
        Check("pixels, PSNR against float64", psnr, cost.psnr, at_least=True),
    ]


def parity_checks(report: Report, bounds: Bounds, *, replayed: bool) -> list[Check]:
    """What a float32 bundle must hold. Where lines are ``replayed``, scores decide nothing and nothing is chosen."""
    scale = max(1.0, report.logits.reference_std)
    checks = [
        Check("logits, max abs error", report.logits.max_abs, bounds.logits * scale),
        Check("pixels, max abs error", report.pixels_max_abs, bounds.pixels * max(1.0, report.pixels_range)),
    ]
    for number, run in report.runs.items():
        name = "free-running tokens, undecidedness at divergence"
        checks.append(Check(name + report.of_run(number), run.divergence_margin, bounds.margin))
    if report.lines and not replayed:
        worst = max(line.scores_max_abs or 0.0 for line in report.lines)
        forced = float(np.mean([line.write_slots_agreement for line in report.lines]))
        least = bounds.write_slots
        checks += [
            Check("scores, max abs error", worst, bounds.scores),
            Check("write slots, share equal", forced, least, at_least=True),
            *(
                Check(
                    f"write slots while drawing freely, share equal{report.of_run(number)}",
                    run.evictions_agreement,
                    least,
                    at_least=True,
                )
                for number, run in report.runs.items()
            ),
        ]
    return checks
