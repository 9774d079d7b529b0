"""Parity: does a bundle compute what PyTorch computes, and choose what it chooses?

Both sides are fed the same tokens line by line. One side's eviction choices are imposed on the other, so that
"computed differently" (logits, scores) and "scored differently" (write slots) are told apart. What the line
buffer changes against the full cache is compression, not error, and is reported apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from linert.exporter.finite import require_finite
from linert.exporter.models import LoadedImageDecoder, LoadedTransformer
from linert.exporter.parity_report import (
    Bounds,
    Choices,
    FreeRunReport,
    LineReport,
    Report,
    cost_checks,
    cost_of,
    parity_checks,
)
from linert.exporter.reference_loop import draw_tokens, sampler, undecidedness
from linert.exporter.sampling_params import sampling_params
from linert.graphs.history import History, HistoryModel, full_history
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES, LineEndParams
from linert.graphs.stage import Geometry
from linert.graphs.transformer import Condition, RasterTransformer
from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import Mode
from linert.runtime.bundles.manifest import SLOT_POSITIONS
from linert.runtime.bundles.raster import Step
from linert.runtime.drawing.generator import PixelDecoder
from linert.runtime.drawing.loop import Batch, begin, generate, run_step, settings_inputs
from linert.runtime.drawing.trace import SlotRecorder
from linert.runtime.errors import BundleError, CheckpointError


@dataclass
class BothSides:
    """A loaded bundle beside the PyTorch model it came from, with one batch to draw.

    Args:
        backend: the bundle with the stages of the batch.
        model: the checkpoint's module with its weights.
        batch: what to draw. Its ``replay`` is imposed on both sides.
        report: receives what is measured; its ``choices`` say whose evictions both sides live with while they are
            fed the same tokens.
        report_part: called with a phase's name and the lines done.

    Attributes:
        reference: the model in PyTorch. ``cached``: the same where it has a cache.
    """

    backend: Backend
    model: RasterTransformer
    batch: Batch
    report: Report
    report_part: Callable[[str, int], None]

    def __post_init__(self) -> None:
        manifest = self.backend.bundle.manifest
        cache = self.batch.cache
        config = self.model.config
        capacities = tuple(manifest.raster.slots(lines) for lines in manifest.capacity_lines)
        memory = memory_of(config, images=manifest.images, guided=manifest.guided, capacities=capacities)
        geometry = memory.geometry
        self.cached: HistoryModel | None = None
        if cache is None:
            self.reference: History = full_history(self.model, memory)
        else:
            inputs = settings_inputs(manifest, self.batch)
            params = LineEndParams(*(torch.from_numpy(inputs[name]) for name in LineEndParams._fields))
            self.reference = self.cached = HistoryModel(
                self.model, geometry, POLICIES[cache.policy](), params
            )
        wanted = self.model.condition_inputs(geometry.images, guided=geometry.guided)
        self.condition = [torch.from_numpy(self.batch.conditions[spec.name]) for spec in wanted]

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
    asked: Sequence[str] = (),
    tokens: np.ndarray | None = None,
    choices: Choices = Choices.PYTORCH,
    bounds: Bounds | None = None,
    report_part: Callable[[str, int], None] = lambda phase, line: None,
) -> Report:
    """Compare a loaded bundle with the checkpoints it came from.

    Args:
        backend: the bundle with the stages of the batch.
        decoder: the bundle's image decoder.
        transformer: the checkpoint; its weights are read.
        image_decoder: the VQ checkpoint.
        batch: what to draw. Its ``replay`` is imposed on both sides.
        seed: noted in the report, like
        asked: what is drawn.
        tokens: ``[I, N]`` recorded elsewhere, to be fed to both sides and compared with what they draw; the bundle's
            own if None.
        choices: whose evictions both sides use while they are fed the same tokens; a replay leaves no choice.
        bounds: what must hold of a float32 bundle. One of another precision is compared by logits and pixels alone and
            held to what that precision may cost (:func:`cost_of`): it draws other tokens, rightly.
        report_part: called with a phase's name and the lines done.
    """
    bounds = bounds or Bounds()
    report = Report(choices, list(asked), seed)
    both = BothSides(backend, transformer.eager(), batch, report, report_part)
    runs = {window: _drawn(both, window) for window in backend.bundle.manifest.windows}
    drawn = fed = runs[1].tokens
    if tokens is not None:
        fed = torch.from_numpy(tokens)
        report.recorded_agreement = (drawn == fed).float().mean().item()
    cost = cost_of(backend.bundle.manifest.precision)
    _teacher_forced(both, fed)
    with torch.no_grad():
        if both.cached:
            _compression(both, fed)
        if cost is None:
            _free_running(both, list(runs.values()))
        compare_pixels(decoder, image_decoder, drawn, report)
    report.runs = {window: run.report for window, run in runs.items()}
    if cost is None:
        report.checks = parity_checks(report, bounds, replayed=batch.replay is not None)
    else:
        report.checks = cost_checks(report, cost)
    return report


def _teacher_forced(both: BothSides, tokens: Tensor) -> None:
    """Feed ``tokens`` to both sides and compare logits at every step, scores and write slots at every line end."""
    backend, reference = both.backend, both.reference
    raster = backend.bundle.manifest.raster
    begin(backend, both.batch)
    _compare(both.report, reference.begin(both.condition)[:, None], [backend.read("logits")], 0)
    measured: list[np.ndarray] = []
    for step in raster.schedule():
        index = step.line * raster.line_width + step.column
        if step.stage == "decode":
            backend.write("token", tokens[:, index].numpy())
            run_step(backend, both.batch, step)
            measured.append(backend.read("logits"))
        if step.stage == "line_end" or index == raster.image_tokens - 2:
            line = tokens[:, step.line * raster.line_width :][:, : len(measured)]
            _compare(both.report, reference.feed(line), measured, index + 2 - len(measured))
            measured = []
            both.report_part("same tokens on both sides", step.line + 1)
        if step.stage == "line_end":
            if both.cached:
                both.report.lines.append(_line_end(both, both.cached, step))
            else:
                run_step(backend, both.batch, step)


def _compare(report: Report, reference: Tensor, measured: list[np.ndarray], first: int) -> None:
    """Add the logits ``[B, T, V]`` before tokens ``first`` .. of both sides to the report.

    Raises:
        CheckpointError, BundleError: some are not finite, so that there is nothing to compare.
    """
    for step, logits in enumerate(measured):
        require_finite(
            reference[:, step].numpy(), f"PyTorch's logits before token {first + step}", CheckpointError
        )
        require_finite(
            logits, f"the bundle's logits before token {first + step} (PyTorch's are)", BundleError
        )
    other = torch.from_numpy(np.stack(measured, axis=1))
    report.logits.add(reference, other)
    report.steps_max_abs += (reference - other).abs().amax(dim=(0, 2)).tolist()


def _line_end(both: BothSides, reference: HistoryModel, step: Step) -> LineReport:
    backend = both.backend
    manifest = backend.bundle.manifest
    error = None
    if both.batch.replay is None:
        error = max(
            float(np.abs(backend.read(spec.name) - reference.scores[layer].numpy()).max())
            for layer, spec in enumerate(manifest.states_of("scores"))
        )
    run_step(backend, both.batch, step)
    chosen = torch.from_numpy(backend.read("write_slots"))
    follow = both.batch.replay is not None or both.report.choices is Choices.BUNDLE
    own = reference.end_line(replay=chosen if follow else None)
    same = (own.sort(-1).values == chosen.sort(-1).values).float().mean().item()
    if not follow and both.report.choices is Choices.PYTORCH:
        backend.write("write_slots", own.numpy())
        for layer, spec in enumerate(manifest.states_of(SLOT_POSITIONS)):
            backend.write(spec.name, reference.slot_pos[layer].numpy())
    return LineReport(step.line, error, same)


def _compression(both: BothSides, tokens: Tensor) -> None:
    """Distance of the line-buffer model from the full cache, both in PyTorch, fed the same tokens."""
    model, reference = both.model, both.reference
    geometry, config = reference.geometry, reference.geometry.config
    condition = model.condition(both.condition, guided=geometry.guided)
    fed = tokens.repeat(geometry.branches, 1)
    first = reference.begin(both.condition)[:, None]
    lined = [first]
    width = config.line_width
    for line in range(config.lines):
        last = line == config.lines - 1
        lined.append(reference.feed(tokens[:, line * width : (line + 1) * width - last]))
        if not last:
            reference.end_line(both.imposed(line))
        both.report_part("line buffer against full cache", line + 1)
    for row in range(geometry.sequences):
        # Row by row: the parallel pass holds the logits of every position.
        alone = Condition(*(part[row : row + 1] for part in condition))
        full = model(alone, fed[row : row + 1, :-1])
        both.report.compression.add(full, torch.cat([part[row : row + 1] for part in lined], dim=1))


@dataclass
class FreeRun:
    """Images that the bundle drew, with windows of one width, beside those that PyTorch draws.

    ``tokens [I, N]``. ``evicted [lines - 1, L, R, W]``: the slots that were overwritten, None without a cache.
    """

    tokens: Tensor
    evicted: np.ndarray | None
    report: FreeRunReport

    def __post_init__(self) -> None:
        images = len(self.tokens)
        self.evicts_alike = np.ones(images, bool)
        self.report.first_divergence = [None] * images
        self.shares: list[float] = []

    def end_line(self, line: int, own: Tensor, geometry: Geometry, *, strict: bool) -> None:
        """Compare the slots that were overwritten behind ``line`` with PyTorch's ``own [L, R, W]``."""
        if self.evicted is None:
            return
        theirs = torch.from_numpy(self.evicted[line])
        same = own.sort(-1).values == theirs.sort(-1).values
        undiverged = np.array([index is None for index in self.report.first_divergence])
        self.shares += _by_image(same, geometry)[self.evicts_alike & undiverged].tolist()
        # A lazily evicted token stays until its turn comes, so that the order counts as well.
        alike = same if strict else own == theirs
        self.evicts_alike &= _by_image(alike, geometry) == 1

    def compare(self, index: int, token: Tensor, margin: Callable[[int, int], float]) -> None:
        """Compare token ``index`` with PyTorch's ``token [I]``; ``margin`` says how undecided it was about an image and a token."""
        first = self.report.first_divergence
        for image, own in enumerate(token):
            other = int(self.tokens[image, index])
            if first[image] is None and own != other:
                first[image] = index
                if self.evicts_alike[image]:
                    self.report.divergence_margin = max(self.report.divergence_margin, margin(image, other))


def _drawn(both: BothSides, window: int) -> FreeRun:
    """Let the bundle draw."""
    backend, batch = both.backend, replace(both.batch, window=window)
    evicted = SlotRecorder(backend.bundle.manifest) if batch.cache else None
    phase = "bundle draws" if window == 1 else f"bundle draws with windows of {window}"
    tokens = generate(
        backend,
        batch,
        lambda line: both.report_part(phase, line),
        None if evicted is None else partial(evicted, backend),
        # Both sides' logits are looked at elsewhere, where it can be said whose are not finite.
        finite=False,
    )
    return FreeRun(torch.from_numpy(tokens), None if evicted is None else evicted.slots, FreeRunReport())


def _free_running(both: BothSides, runs: Sequence[FreeRun]) -> None:
    """Let PyTorch draw and evict on its own; compare with what the bundle drew and evicted.

    Rounding may decide between slots that matter equally. An image whose evictions differ has another context from
    then on, so that its tokens are no longer measured against the margin; the evictions have their own bound.
    """
    reference, geometry = both.reference, both.reference.geometry
    params = sampling_params(both.batch.sampling)
    noise = torch.from_numpy(both.batch.noise.whole(geometry.config.image_tokens))

    def end_line(line: int) -> None:
        own = reference.end_line(both.imposed(line))
        if both.batch.replay is None:
            for run in runs:
                run.end_line(line, own, geometry, strict=_strict(both.batch))
        both.report_part("PyTorch draws", line + 1)

    drawn = []
    choose = sampler(params, noise, guided=geometry.guided)
    for index, logits, token in draw_tokens(reference, both.condition, choose, end_line):
        drawn.append(token)

        def margin(image: int, other: int, logits: Tensor = logits, index: int = index) -> float:
            return undecidedness(logits[image], params, noise[image, index], other)

        for run in runs:
            run.compare(index, token, margin)
    for run in runs:
        run.report.evictions_agreement = float(np.mean(run.shares)) if run.shares else 1.0
        run.report.tokens_agreement = (torch.stack(drawn, dim=1) == run.tokens).float().mean().item()


def _strict(batch: Batch) -> bool:
    return batch.cache is not None and batch.cache.mode is Mode.STRICT


def _by_image(same: Tensor, geometry: Geometry) -> np.ndarray:
    """Share of true entries of ``same [L, R, W]`` an image: ``[I]`` float64."""
    split = same.reshape(len(same), geometry.branches, geometry.images, -1)
    return split.double().mean((0, 1, 3)).numpy()


def compare_pixels(
    decoder: PixelDecoder, image_decoder: LoadedImageDecoder, tokens: Tensor, report: Report
) -> None:
    """Compare with PyTorch in float64, so that only the bundle's own rounding counts."""
    raster = decoder.manifest.raster
    model = image_decoder.eager().double()
    errors = []
    for row in tokens:
        grid = row.reshape(1, raster.lines, raster.line_width)[:, :, : raster.columns]
        decoded, wanted = decoder(row[None].numpy(), finite=False), model.decode(grid)
        require_finite(wanted.numpy(), "PyTorch's pixels", CheckpointError)
        require_finite(decoded, "the bundle's pixels (PyTorch's are)", BundleError)
        ours = torch.from_numpy(decoded)
        report.pixels_range = max(report.pixels_range, wanted.abs().max().item())
        errors.append((wanted - ours).abs().flatten())
    error = torch.cat(errors)
    report.pixels_max_abs = error.max().item()
    mse = error.double().square().mean().item()
    # Peak to peak 2: pixels span [-1, 1].
    report.pixels_psnr = math.inf if mse == 0 else 10 * math.log10(4 / mse)
