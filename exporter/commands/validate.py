"""``linert validate``: prove that a bundle computes what PyTorch computes."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from linert.exporter.group_parity import validate_groups
from linert.exporter.parity import validate
from linert.exporter.parity_report import Bounds, Check, Choices, Report
from linert.exporter.sources import load_sources
from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.engines import built_flavours, missing_plugins, read_engines
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.condition_options import ConditionRequest, condition_options
from linert.runtime.commands.settings_options import cache_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import PixelDecoder, make_batch
from linert.runtime.drawing.loop import Batch
from linert.runtime.drawing.samples import Sample, list_samples
from linert.runtime.drawing.trace import Trace, read_trace
from linert.runtime.errors import LinertError, RequestError
from linert.runtime.measuring.metric_source import load_metrics

if TYPE_CHECKING:
    from linert.exporter.quality import QualityCost


@click.command()
@bundle_argument()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The transformer's checkpoint. Default: where it was when the bundle was exported.",
)
@click.option("--vq", type=click.Path(path_type=Path), help="The VQ checkpoint. Default: likewise.")
@condition_options()
@click.option("--seed", default=0, show_default=True)
@click.option("--greedy", is_flag=True, help="Draw the most likely tokens.")
@cache_options()
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Impose on both sides the evictions of this trace of linert run, and feed both its tokens.",
)
@click.option(
    "--choices",
    type=click.Choice([str(c) for c in Choices]),
    default="pytorch",
    show_default=True,
    help="Whose evictions both sides use while they are fed the same tokens.",
)
@click.option(
    "--max-logit-error",
    type=float,
    default=Bounds.logits,
    show_default=True,
    help="Bound of the logits' absolute error (times their standard deviation where above 1).",
)
@click.option(
    "--metrics",
    metavar="SOURCE",
    help="Also draw images from the bundle and in float32 and compare these metrics: package.module or FILE.py.",
)
@click.option("--samples", default=500, show_default=True, help="Images drawn for --metrics.")
@click.option(
    "--stages",
    "by_stages",
    is_flag=True,
    help="Also compare every stage on --backend with the CPU, by Polygraphy, fed the same state.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@backend_options()
def command(
    place: BundlePlace,
    checkpoint: Path | None,
    vq: Path | None,
    conditions: ConditionRequest,
    seed: int,
    greedy: bool,
    cache: CacheRequest,
    trace: Path | None,
    choices: str,
    max_logit_error: float,
    metrics: str | None,
    samples: int,
    by_stages: bool,
    as_json: bool,
    options: BackendOptions,
) -> None:
    """Prove that BUNDLE computes what PyTorch computes from its checkpoints, or say what its precision costs.

    One batch is compared: teacher-forced logits of every step, scores and write slots of every line, tokens
    drawn freely, pixels. Exit code 1 when a bound fails. A bundle below float32 is held to what its precision may
    cost, by logits and pixels, as it rightly draws other tokens.
    """
    opened = place.open()
    recording = None
    if trace is not None:
        recording = read_trace(trace, opened.widest)
        opened = opened.fitting(recording.header.cache, replayed=True)
    else:
        opened, settings = cache.settle_for(opened)
    manifest = opened.manifest
    conditioner = open_conditioner(opened, options)
    asked = conditions.settle(conditioner)
    transformer, image_decoder = load_sources(opened, checkpoint, vq)
    if recording is not None:
        if not replace(conditions, captions=None).empty or seed or greedy or not cache.empty:
            raise RequestError("--trace brings its own images and settings: leave the others out")
        batch, recorded, compared = _recorded(recording, opened, conditioner)
    else:
        compared = list_samples(asked or conditioner.usual()[: manifest.images], manifest.images, seed)
        sampling = msgspec.structs.replace(manifest.sampling, greedy=greedy)
        batch, recorded = make_batch(manifest, conditioner, compared, sampling, settings), None
    manifest.check_sampling(batch.sampling)
    manifest.check_cache(batch.cache, replayed=trace is not None)
    if by_stages and options.name is BackendName.CPU:
        raise RequestError("--stages compares a backend with the CPU: say which with --backend")
    measures = load_metrics(metrics) if metrics is not None else []
    # What an option needs is missed before the work, not after.
    comparing = None
    if metrics is not None:
        comparing = _with_extra("linert.exporter.quality", "--metrics", "compare")
        _with_extra("linert.exporter.intervals", "--metrics", "compare").require_images(measures, samples)
    staging = _with_extra("linert.exporter.stage_parity", "--stages", "stages") if by_stages else None
    console = Console(stderr=True)
    parts = manifest.parts(batch.sampling)
    batches = _batches(manifest, conditioner, compared, batch)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
    ) as bar:
        task = bar.add_task("loading", total=parts)
        backend = options.open(opened, _stages(batches))
        both = (backend, PixelDecoder(opened, options), transformer, image_decoder)
        common: dict[str, Any] = {
            "seed": seed,
            "asked": [sample.condition.label for sample in compared],
            "bounds": Bounds(logits=max_logit_error),
            "report_part": lambda phase, part: bar.update(task, description=phase, completed=part),
        }
        if manifest.groups is not None:
            report = validate_groups(*both, batches, **common)
        else:
            report = validate(*both, batch, tokens=recorded, choices=Choices(choices), **common)
        bar.update(task, completed=parts)
        quality = []
        if comparing:
            drawn = list_samples(asked or conditioner.usual(), samples, seed)
            quality = comparing.quality_cost(
                opened,
                conditioner,
                transformer,
                image_decoder,
                drawn,
                batch.sampling,
                batch.cache,
                measures,
                options=options,
                progress=lambda phase, done, total: bar.update(
                    task, description=phase, completed=done, total=total
                ),
            )
        differences = []
        if staging:
            on_cpu = BackendOptions(threads=options.threads)
            differences = staging.compare_stages(
                *(chosen.open(opened, manifest.stages) for chosen in (on_cpu, options)),
                batch,
                lambda stage: bar.update(task, description=stage),
            )
    report.checks += plan_checks(opened)
    for stage, outputs in itertools.groupby(differences, key=lambda far: far.stage):
        worst = max(outputs, key=lambda far: far.share)
        report.checks.append(
            Check(f"{stage} on {options.name}: {worst.output}, error / bound", worst.share, 1)
        )
    if as_json:
        values = {"bundle_sha256": manifest.sha256, **report.to_json()}
        values["quality"] = [cost.to_json() for cost in quality]
        values["stages"] = [far.to_json() for far in differences]
        click.echo(json.dumps(values))
    else:
        _print(report, quality, Console(highlight=False))
    if not report.passed:
        raise click.exceptions.Exit(1)


def plan_checks(bundle: Bundle) -> list[Check]:
    """Plans that say that they hold plugins must hold them.

    Raises:
        BundleError: plans that do not belong to the bundle; the message says what to build again.
    """
    return [
        Check(f"{flavour} plans, stages without their plugins", len(missing_plugins(bundle, engines)), 0)
        for flavour in built_flavours(bundle)
        if (engines := read_engines(bundle, flavour)).plugin_version
    ]


def _with_extra(module: str, option: str, extra: str) -> Any:
    """A module of ours that needs packages of ``extra``, which not everybody has."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LinertError(f"{option} needs {error.name}: pip install 'linert[{extra}]'") from error


def _recorded(
    trace: Trace, bundle: Bundle, conditioner: Conditioner
) -> tuple[Batch, np.ndarray, list[Sample]]:
    """A batch of the trace's first images, their tokens ``[I, N]``, and themselves."""
    manifest, header = bundle.manifest, trace.header
    images = [min(image, len(trace.tokens) - 1) for image in range(manifest.images)]
    samples = [header.samples[image] for image in images]
    batch = make_batch(bundle.manifest, conditioner, samples, header.sampling, header.cache)
    return replace(batch, replay=trace.batch(images)), trace.tokens[images], samples


def _batches(
    manifest: Manifest, conditioner: Conditioner, samples: Sequence[Sample], batch: Batch
) -> list[Batch]:
    """``batch``, and the same by windows of every other width, or in every other number of steps."""
    if manifest.groups is None:
        return [replace(batch, window=window) for window in manifest.windows]
    sampled = [msgspec.structs.replace(batch.sampling, steps=steps) for steps in manifest.groups.counts]
    others = [make_batch(manifest, conditioner, samples, each, None) for each in sampled]
    return [batch, *(other for other in others if len(other.groups) != len(batch.groups))]


def _stages(batches: Sequence[Batch]) -> list[str]:
    """The stages that draw them."""
    return list(dict.fromkeys(stage for batch in batches for stage in batch.stages.values()))


def _print(report: Report, quality: Sequence[QualityCost], console: Console) -> None:
    logits = report.logits
    console.print(
        f"teacher-forced logits, {len(report.steps_max_abs)} steps: max abs error {logits.max_abs:.2e}, "
        f"mean {logits.mean_abs:.2e}, KL {logits.kl_mean:.2e} (max {logits.kl_max:.2e}), "
        f"top-1 agreement {logits.top1_agreement:.2%}; reference std {logits.reference_std:.2f}"
    )
    if any(line.scores_max_abs is None for line in report.lines):
        console.print(
            f"line ends: the trace's evictions were imposed on both sides at all {len(report.lines)}"
        )
    elif report.lines:
        table = Table(
            "line", "scores, max abs error", "write slots equal", title="line ends", title_justify="left"
        )
        for line in report.lines:
            table.add_row(str(line.line), f"{line.scores_max_abs:.2e}", f"{line.write_slots_agreement:.2%}")
        console.print(table)
    for number, run in report.runs.items():
        diverged = [index for index in run.first_divergence if index is not None]
        where = f", first divergence at token {min(diverged)}" if diverged else ""
        if run.tokens_agreement is not None:
            console.print(
                f"free-running tokens{report.of_run(number)}: {run.tokens_agreement:.2%} equal{where}"
            )
    if report.recorded_agreement is not None:
        console.print(f"tokens equal to the trace's: {report.recorded_agreement:.2%}")
    console.print(f"pixels: max abs error {report.pixels_max_abs:.2e}, PSNR {report.pixels_psnr:.1f} dB")
    far = report.compression
    if far.rows:
        console.print(
            f"compression (line buffer against full cache, not an error): logits mean abs {far.mean_abs:.2e}, "
            f"KL {far.kl_mean:.2e}, top-1 agreement {far.top1_agreement:.2%}"
        )
    if quality:
        table = Table("metric", "bundle", "float32", "difference", "", title="quality", title_justify="left")
        for cost in quality:
            estimates = ((cost.bundle, ""), (cost.float32, ""), (cost.difference, "+"))
            name = cost.metric
            if cost.distance:
                name = f"{cost.metric}, without its bias"
                measured = [f"{estimate.measured:{sign}.{cost.digits}f}" for estimate, sign in estimates]
                table.add_row(cost.metric, *measured, "")
            cells = [estimate.text(cost.digits, sign) for estimate, sign in estimates]
            table.add_row(name, *cells, "worse" if cost.worse else "")
        console.print(table)
    table = Table("check", "measured", "bound", "", title="verdict", title_justify="left")
    for check in report.checks:
        sign = ">=" if check.at_least else "<="
        table.add_row(
            check.name, f"{check.value:.3g}", f"{sign} {check.bound:.3g}", "pass" if check.passed else "FAIL"
        )
    console.print(table)
