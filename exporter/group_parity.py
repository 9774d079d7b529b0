"""Parity of bundles that draw in groups: does it compute what PyTorch computes, and draw what it draws?

Both sides are fed the same tokens, in PyTorch in one pass with the mask of the training. Then both draw freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from linert.exporter.finite import require_finite
from linert.exporter.models import LoadedImageDecoder, LoadedTransformer
from linert.exporter.parity import compare_pixels
from linert.exporter.parity_report import (
    Bounds,
    Choices,
    FreeRunReport,
    Report,
    cost_checks,
    cost_of,
    parity_checks,
)
from linert.exporter.reference_loop import draw_groups, undecidedness
from linert.exporter.sampling_params import sampling_params
from linert.graphs.group_history import GroupHistory
from linert.graphs.group_transformer import GroupTransformer
from linert.graphs.transformer import Condition
from linert.runtime.backends.base import Backend
from linert.runtime.drawing.generator import PixelDecoder
from linert.runtime.drawing.loop import Batch, begin, generate, run_group
from linert.runtime.errors import BundleError, CheckpointError


def validate_groups(
    backend: Backend,
    decoder: PixelDecoder,
    transformer: LoadedTransformer,
    image_decoder: LoadedImageDecoder,
    batches: Sequence[Batch],
    *,
    seed: int,
    asked: Sequence[str] = (),
    bounds: Bounds | None = None,
    report_part: Callable[[str, int], None] = lambda phase, part: None,
) -> Report:
    """Compare a loaded bundle with the checkpoints it came from.

    Args:
        backend, decoder, transformer, image_decoder, seed, asked, bounds: as in :func:`linert.exporter.parity.validate`.
        batches: what to draw, in every number of steps that is to be proved. The pixels are those of the first.
        report_part: called with a phase's name and the groups done.

    Raises:
        TypeError: the transformer does not draw in groups.
    """
    model = transformer.eager()
    if not isinstance(model, GroupTransformer):
        raise TypeError(f"{type(model).__name__} does not draw in groups")
    report = Report(Choices.PYTORCH, list(asked), seed, in_groups=True)
    cost = cost_of(backend.bundle.manifest.precision)
    with torch.no_grad():
        drawn = [_compare(backend, model, batch, report, report_part, free=cost is None) for batch in batches]
        compare_pixels(decoder, image_decoder, drawn[0], report)
    if cost is None:
        report.checks = parity_checks(report, bounds or Bounds(), replayed=False)
    else:
        report.checks = cost_checks(report, cost)
    return report


def _compare(
    backend: Backend,
    model: GroupTransformer,
    batch: Batch,
    report: Report,
    report_part: Callable[[str, int], None],
    *,
    free: bool,
) -> Tensor:
    """Compare one batch; the tokens ``[I, N]`` that the bundle drew. ``free``: whether PyTorch draws on its own too."""
    tokens = torch.from_numpy(
        # Both sides' logits are looked at below, where it can be said whose are not finite.
        generate(backend, batch, lambda part: report_part("bundle draws", part), finite=False)
    )
    run = report.runs[len(batch.groups)] = FreeRunReport(first_divergence=[None] * len(tokens))
    guided = backend.bundle.manifest.guided
    wanted = model.condition_inputs(len(tokens), guided=guided)
    condition = [torch.from_numpy(batch.conditions[spec.name]) for spec in wanted]
    _teacher_forced(backend, model, condition, batch, tokens, report, report_part)
    if free:
        _free_running(model, condition, batch, tokens, run, report_part, guided=guided)
    return tokens


def _teacher_forced(
    backend: Backend,
    model: GroupTransformer,
    inputs: Sequence[Tensor],
    batch: Batch,
    tokens: Tensor,
    report: Report,
    report_part: Callable[[str, int], None],
) -> None:
    """Feed ``tokens [I, N]`` to both sides, and compare the logits of every group."""
    manifest = backend.bundle.manifest
    orders = torch.from_numpy(np.asarray(batch.orders))
    sizes = [step.drawn for step in batch.groups]
    condition = model.condition(inputs, guided=manifest.guided)
    # Row by row: the pass holds the logits of every token.
    reference = torch.cat(
        [
            model(
                Condition(*(part[row : row + 1] for part in condition)),
                tokens[image][None],
                orders[image][None],
                sizes,
            )
            for row, image in enumerate(list(range(len(tokens))) * manifest.branches)
        ]
    )
    begin(backend, batch)
    rank = 0
    for number, step in enumerate(batch.groups):
        run_group(backend, batch, step)
        # What was drawn is written over: both sides go on with the same.
        drawn = orders[:, : rank + step.drawn]
        fed = torch.full_like(tokens, -1).scatter(1, drawn, tokens.gather(1, drawn))
        backend.write("tokens", fed.numpy())
        ours = backend.read(step.width.logits)[:, : step.drawn]
        theirs = reference[:, rank : rank + step.drawn]
        where = f"logits of group {number}"
        require_finite(theirs.numpy(), f"PyTorch's {where}", CheckpointError)
        require_finite(ours, f"the bundle's {where} (PyTorch's are)", BundleError)
        report.logits.add(theirs, torch.from_numpy(ours))
        report.steps_max_abs.append(float(np.abs(theirs.numpy() - ours).max()))
        rank += step.drawn
        report_part("same tokens on both sides", number + 1)


def _free_running(
    model: GroupTransformer,
    inputs: Sequence[Tensor],
    batch: Batch,
    tokens: Tensor,
    run: FreeRunReport,
    report_part: Callable[[str, int], None],
    *,
    guided: bool,
) -> None:
    """Let PyTorch draw on its own, and compare with what the bundle drew."""
    params, noise = sampling_params(batch.sampling), torch.from_numpy(batch.noise.table)
    history = GroupHistory(model, guided=guided)
    same = 0
    sizes = [step.drawn for step in batch.groups]
    groups = draw_groups(
        history, inputs, torch.from_numpy(np.asarray(batch.orders)), sizes, batch.sampling, noise
    )
    for number, group in enumerate(groups):
        other = tokens.gather(1, group.cells)
        same += int((other == group.tokens).sum())
        for image, differs in enumerate((other != group.tokens).any(1).tolist()):
            if not differs or run.first_divergence[image] is not None:
                continue
            run.first_divergence[image] = group.rank + int((other != group.tokens)[image].int().argmax())
            # A group is drawn at once: none of its tokens follows from another.
            for place in (other != group.tokens)[image].nonzero().flatten().tolist():
                cell, drawn = int(group.cells[image, place]), int(other[image, place])
                logits = group.logits[image, place]
                margin = undecidedness(logits, params, noise[image, cell], drawn)
                run.divergence_margin = max(run.divergence_margin, margin)
        report_part("PyTorch draws", number + 1)
    run.tokens_agreement = same / tokens.numel()
