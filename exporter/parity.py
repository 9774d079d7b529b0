"""Parity: does a bundle compute what PyTorch computes, and choose what it chooses?

Both sides are fed the same tokens line by line. One side's eviction choices are imposed on the other, so that
"computed differently" (logits, scores) and "scored differently" (write slots) are told apart. What the line
buffer changes against the full cache is compression, not error, and is reported apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.models import LoadedImageDecoder, LoadedTransformer
from graphs.families.base import RasterTransformer
from graphs.history import HistoryModel
from graphs.policies import POLICIES, LineEndParams
from graphs.sampling import SamplingParams, draw, filtered_mass, guide
from graphs.stages import Geometry
from runtime.backend import Backend
from runtime.generator import PixelDecoder
from runtime.geometry import Mode, Step
from runtime.loop import Batch, begin, generate, run_step, settings_inputs
from runtime.manifest import PrecisionSpec, SamplingSettings


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
    """One line end: the largest score error and the share of equal write slots, over layers, sequences and heads."""

    line: int
    scores_max_abs: float
    write_slots_agreement: float


@dataclass
class Report:
    """Everything that :func:`validate` measured."""

    choices: Choices
    classes: list[int]
    seed: int
    logits: Distance = field(default_factory=Distance)
    compression: Distance = field(default_factory=Distance)
    steps_max_abs: list[float] = field(default_factory=list)
    lines: list[LineReport] = field(default_factory=list)
    tokens_agreement: float | None = None
    recorded_agreement: float | None = None
    evictions_agreement: float = 1.0
    first_divergence: list[int | None] = field(default_factory=list)
    divergence_margin: float = 0.0
    pixels_max_abs: float = 0.0
    pixels_range: float = 0.0
    pixels_psnr: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for check, made in zip(values["checks"], self.checks, strict=True):
            check["passed"] = made.passed
        if math.isinf(self.pixels_psnr):
            values["pixels_psnr"] = None
        return {"passed": self.passed, **values}


@dataclass
class Comparison:
    """A loaded bundle beside the PyTorch model it came from, with one batch to draw.

    Args:
        backend: the bundle with the stages of the batch.
        model: the checkpoint's module with its weights.
        batch: what to draw. Its ``replay`` is imposed on both sides.
        report: receives what is measured; its ``choices`` say whose evictions both sides live with while they are
            fed the same tokens.
        report_line: called with a phase's name and the lines done.
    """

    backend: Backend
    model: RasterTransformer
    batch: Batch
    report: Report
    report_line: Callable[[str, int], None]

    def __post_init__(self) -> None:
        manifest = self.backend.bundle.manifest
        cache = self.batch.cache
        config: Any = self.model.config
        capacities = tuple(manifest.raster.slots(lines) for lines in manifest.capacity_lines)
        geometry = Geometry(config, manifest.images, manifest.guided, capacities)
        inputs = settings_inputs(manifest, self.batch)
        params = LineEndParams(*(torch.from_numpy(inputs[name]) for name in LineEndParams._fields))
        self.reference = HistoryModel(self.model, geometry, POLICIES[cache.policy](), params)
        self.class_ids = torch.from_numpy(self.batch.conditions["class_ids"])

    def imposed(self, line: int) -> Tensor | None:
        """The write slots that the batch replays at the end of ``line``."""
        return None if self.batch.replay is None else torch.from_numpy(self.batch.replay[line])


def validate(
    backend: Backend,
    decoder: PixelDecoder,
    transformer: LoadedTransformer,
    image_decoder: LoadedImageDecoder,
    batch: Batch,
    *,
    seed: int,
    tokens: np.ndarray | None = None,
    choices: Choices = Choices.PYTORCH,
    bounds: Bounds | None = None,
    report_line: Callable[[str, int], None] = lambda phase, line: None,
) -> Report:
    """Compare a loaded bundle with the checkpoints it came from.

    Args:
        backend: the bundle with the stages of the batch.
        decoder: the bundle's image decoder.
        transformer: the checkpoint; its weights are read.
        image_decoder: the VQ checkpoint.
        batch: what to draw. Its ``replay`` is imposed on both sides.
        seed: noted in the report.
        tokens: ``[I, N]`` recorded elsewhere, to be fed to both sides and compared with what they draw; the bundle's
            own if None.
        choices: whose evictions both sides use while they are fed the same tokens; a replay leaves no choice.
        bounds: what must hold of a float32 bundle. One of another precision is compared by logits and pixels alone and
            held to what that precision may cost (:func:`cost_of`): it draws other tokens, rightly.
        report_line: called with a phase's name and the lines done.
    """
    bounds = bounds or Bounds()
    class_ids = batch.conditions["class_ids"].tolist()
    report = Report(choices, class_ids, seed)
    both = Comparison(backend, transformer.eager(), batch, report, report_line)
    evicted: list[np.ndarray] = []
    drawn = torch.from_numpy(
        generate(
            backend,
            batch,
            lambda line: report_line("bundle draws", line),
            lambda line: evicted.append(backend.read("write_slots")),
        )
    )
    fed = drawn
    if tokens is not None:
        fed = torch.from_numpy(tokens)
        report.recorded_agreement = (drawn == fed).float().mean().item()
    cost = cost_of(backend.bundle.manifest.precision)
    _teacher_forced(both, fed)
    with torch.no_grad():
        _compression(both, fed)
        if cost is None:
            _free_running(both, drawn, evicted)
        _pixels(decoder, image_decoder, drawn, report)
    report.checks = _parity_checks(report, bounds, batch) if cost is None else _cost_checks(report, cost)
    return report


def _cost_checks(report: Report, cost: Cost) -> list[Check]:
    logits = report.logits
    relative = logits.mean_abs / logits.reference_std if logits.reference_std else 0.0
    # Pixels beyond [-1, 1] raise the peak with them.
    psnr = report.pixels_psnr + 20 * math.log10(max(1.0, report.pixels_range))
    return [
        Check("logits, KL from float32", logits.kl_mean, cost.kl),
        Check("logits, mean abs error over their standard deviation", relative, cost.logits),
        Check("pixels, PSNR against float64", psnr, cost.psnr, at_least=True),
    ]


def _parity_checks(report: Report, bounds: Bounds, batch: Batch) -> list[Check]:
    scale = max(1.0, report.logits.reference_std)
    checks = [
        Check("logits, max abs error", report.logits.max_abs, bounds.logits * scale),
        Check("free-running tokens, undecidedness at divergence", report.divergence_margin, bounds.margin),
        Check("pixels, max abs error", report.pixels_max_abs, bounds.pixels * max(1.0, report.pixels_range)),
    ]
    # A replay ends lines without the policy, so that scores have no meaning and nothing is chosen.
    if report.lines and batch.replay is None:
        worst = max(line.scores_max_abs for line in report.lines)
        forced = float(np.mean([line.write_slots_agreement for line in report.lines]))
        free, least = report.evictions_agreement, bounds.write_slots
        checks += [
            Check("scores, max abs error", worst, bounds.scores),
            Check("write slots, share equal", forced, least, at_least=True),
            Check("write slots while drawing freely, share equal", free, least, at_least=True),
        ]
    return checks


def _teacher_forced(both: Comparison, tokens: Tensor) -> None:
    """Feed ``tokens`` to both sides and compare logits at every step, scores and write slots at every line end."""
    backend, reference = both.backend, both.reference
    raster = backend.bundle.manifest.raster
    begin(backend, both.batch)
    _compare(both.report, reference.begin(both.class_ids)[:, None], [backend.read("logits")])
    measured: list[np.ndarray] = []
    for step in raster.schedule():
        index = step.line * raster.line_width + step.column
        if step.stage == "decode":
            backend.write("token", tokens[:, index].numpy())
            run_step(backend, both.batch, step)
            measured.append(backend.read("logits"))
        if step.stage == "line_end" or index == raster.image_tokens - 2:
            line = tokens[:, step.line * raster.line_width :][:, : len(measured)]
            _compare(both.report, reference.feed(line), measured)
            measured = []
            both.report_line("same tokens on both sides", step.line + 1)
        if step.stage == "line_end":
            both.report.lines.append(_line_end(both, step))


def _compare(report: Report, reference: Tensor, measured: list[np.ndarray]) -> None:
    other = torch.from_numpy(np.stack(measured, axis=1))
    report.logits.add(reference, other)
    report.steps_max_abs += (reference - other).abs().amax(dim=(0, 2)).tolist()


def _line_end(both: Comparison, step: Step) -> LineReport:
    backend, reference = both.backend, both.reference
    layers = range(len(reference.scores))
    error = max(
        float(np.abs(backend.read(f"scores.{layer}") - reference.scores[layer].numpy()).max())
        for layer in layers
    )
    run_step(backend, both.batch, step)
    chosen = torch.from_numpy(backend.read("write_slots"))
    follow = both.batch.replay is not None or both.report.choices is Choices.BUNDLE
    own = reference.end_line(replay=chosen if follow else None)
    same = (own.sort(-1).values == chosen.sort(-1).values).float().mean().item()
    if not follow and both.report.choices is Choices.PYTORCH:
        backend.write("write_slots", own.numpy())
        for layer in layers:
            backend.write(f"slot_pos.{layer}", reference.slot_pos[layer].numpy())
    return LineReport(step.line, error, same)


def _compression(both: Comparison, tokens: Tensor) -> None:
    """Distance of the line-buffer model from the full cache, both in PyTorch, fed the same tokens."""
    model, reference = both.model, both.reference
    geometry, config = reference.geometry, reference.geometry.config
    ids = model.guided_classes(both.class_ids) if geometry.guided else both.class_ids
    fed = tokens.repeat(geometry.branches, 1)
    first = reference.begin(both.class_ids)[:, None]
    lined = [first]
    width = config.line_width
    for line in range(config.lines):
        last = line == config.lines - 1
        lined.append(reference.feed(tokens[:, line * width : (line + 1) * width - last]))
        if not last:
            reference.end_line(both.imposed(line))
        both.report_line("line buffer against full cache", line + 1)
    for row in range(geometry.sequences):
        # Row by row: the parallel pass holds the logits of every position.
        full = model(ids[row : row + 1], fed[row : row + 1, :-1])
        both.report.compression.add(full, torch.cat([part[row : row + 1] for part in lined], dim=1))


def _free_running(both: Comparison, tokens: Tensor, evicted: list[np.ndarray]) -> None:
    """Let PyTorch draw and evict on its own; compare with the bundle's ``tokens`` and with what it ``evicted``.

    Rounding may decide between slots that matter equally. An image whose evictions differ has another context from
    then on, so that its tokens are no longer measured against the margin; the evictions have their own bound.
    """
    reference, report = both.reference, both.report
    geometry, config = reference.geometry, reference.geometry.config
    params = sampling_params(both.batch.sampling)
    uniforms = torch.from_numpy(both.batch.uniforms)
    images = geometry.images
    diverged: list[int | None] = [None] * images
    evicts_alike = np.ones(images, bool)
    shares: list[float] = []
    logits = reference.begin(both.class_ids)
    drawn = torch.zeros_like(tokens)
    for index in range(config.image_tokens):
        drawn[:, index] = token = _draw(reference, logits, params, uniforms, index)
        for image in range(images):
            if diverged[image] is None and token[image] != tokens[image, index]:
                diverged[image] = index
                if evicts_alike[image]:
                    margin = _undecided(
                        reference, logits, params, uniforms, index, image, int(tokens[image, index])
                    )
                    report.divergence_margin = max(report.divergence_margin, margin)
        if index == config.image_tokens - 1:
            break
        logits = reference.feed(token[:, None])[:, 0]
        line, column = divmod(index, config.line_width)
        if column == config.line_width - 1:
            own = reference.end_line(both.imposed(line))
            if both.batch.replay is None:
                theirs = torch.from_numpy(evicted[line])
                same = own.sort(-1).values == theirs.sort(-1).values
                comparable = evicts_alike & np.array([index is None for index in diverged])
                shares += _by_image(same, geometry)[comparable].tolist()
                # A lazily evicted token stays until its turn comes, so that the order counts as well.
                alike = same if both.batch.cache.mode is Mode.STRICT else own == theirs
                evicts_alike &= _by_image(alike, geometry) == 1
            both.report_line("PyTorch draws", line + 1)
    report.evictions_agreement = float(np.mean(shares)) if shares else 1.0
    report.tokens_agreement = (drawn == tokens).float().mean().item()
    report.first_divergence = diverged


def _by_image(same: Tensor, geometry: Geometry) -> np.ndarray:
    """Share of true entries of ``same [L, R, W]`` an image: ``[I]`` float64."""
    split = same.reshape(len(same), geometry.branches, geometry.images, -1)
    return split.double().mean((0, 1, 3)).numpy()


def sampling_params(settings: SamplingSettings) -> SamplingParams:
    """The sampler's scalars of ``settings``."""
    return SamplingParams(
        torch.tensor(settings.guidance),
        torch.tensor(settings.guidance_interval),
        torch.tensor(settings.temperature),
        torch.tensor(settings.top_k),
        torch.tensor(settings.top_p),
        torch.tensor(int(settings.greedy)),
    )


def _guided(reference: HistoryModel, logits: Tensor, params: SamplingParams, index: int) -> Tensor:
    if not reference.geometry.guided:
        return logits
    return guide(logits, params, torch.full((reference.geometry.images,), index))


def _draw(
    reference: HistoryModel, logits: Tensor, params: SamplingParams, uniforms: Tensor, index: int
) -> Tensor:
    guided = _guided(reference, logits, params, index)
    if params.greedy:
        return guided.argmax(-1)
    return draw(filtered_mass(guided, params), uniforms[:, index])


def _undecided(
    reference: HistoryModel,
    logits: Tensor,
    params: SamplingParams,
    uniforms: Tensor,
    index: int,
    image: int,
    other: int,
) -> float:
    """How far the reference was from drawing ``other``: a logit gap when greedy, else a probability."""
    guided = _guided(reference, logits, params, index)[image]
    if params.greedy:
        return (guided.max() - guided[other]).item()
    mass = filtered_mass(guided[None], params)[0]
    cumulative = (mass / mass.sum()).cumsum(-1)
    above = cumulative[other].item()
    below = cumulative[other - 1].item() if other else 0.0
    uniform = uniforms[image, index].item()
    return max(below - uniform, uniform - above, 0.0)


def _pixels(decoder: PixelDecoder, image_decoder: LoadedImageDecoder, tokens: Tensor, report: Report) -> None:
    """Compare with PyTorch in float64, so that only the bundle's own rounding counts."""
    raster = decoder.manifest.raster
    model = image_decoder.eager().double()
    errors = []
    for row in tokens:
        grid = row.reshape(1, raster.lines, raster.line_width)
        ours = torch.from_numpy(decoder(row[None].numpy()))
        wanted = model.decode(grid)
        report.pixels_range = max(report.pixels_range, wanted.abs().max().item())
        errors.append((wanted - ours).abs().flatten())
    error = torch.cat(errors)
    report.pixels_max_abs = error.max().item()
    mse = error.double().square().mean().item()
    # Peak to peak 2: pixels span [-1, 1].
    report.pixels_psnr = math.inf if mse == 0 else 10 * math.log10(4 / mse)
