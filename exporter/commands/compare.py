"""``linert compare``: compare cache policies and budgets on a bundle."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import onnxruntime
import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from linert.exporter.compare import CellResult, CompareRequest, Comparison
from linert.exporter.compare_grid import Grid
from linert.exporter.intervals import require_images
from linert.exporter.report import render_page, tables
from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.setting import settings_of
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.condition_options import ConditionRequest, condition_options
from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.commands.output_options import Output, output_options
from linert.runtime.drawing.cache_request import PYRAMID, UNIFORM
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import list_samples
from linert.runtime.errors import OutputError, RequestError
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.files.replacement import is_empty, working_folder
from linert.runtime.files.source_digest import source_digest
from linert.runtime.measuring.metric_source import load_metrics
from linert.runtime.measuring.metrics import Metric

REQUEST_NAME = "request.json"
JSON_NAME = "compare.json"
PAGE_NAME = "compare.html"
STRIP_IMAGES = 12
PRINTED_WIDTH = 100
FLAGS = {"yes": True, "no": False}


def several(kind: Callable[[str], Any], allowed: tuple[str, ...] = ()) -> Callable[..., tuple[Any, ...]]:
    """A click callback for a list like ``a,b``."""

    def parse(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[Any, ...]:
        if text is None:
            return ()
        parts = [part.strip() for part in text.split(",")]
        try:
            values = tuple(kind(part) for part in parts)
        except (ValueError, KeyError):
            raise click.BadParameter(f"{text!r} is no list of values") from None
        if not all(parts):
            raise click.BadParameter(f"{text!r} has an empty value: leave the option out for the default")
        if allowed and (wrong := [part for part in parts if part not in allowed]):
            raise click.BadParameter(f"{', '.join(wrong)}: give some of {', '.join(allowed)}")
        return values

    return parse


def grid_options() -> Decorator:
    """Give a command an option for every setting of the cache, which takes a list of values to try; it gets them as ``tried``."""
    options, names = [], []
    for setting in settings_of(CacheSettings):
        kind, allowed = setting.type, setting.choices
        if setting.type is bool:
            kind, allowed = FLAGS.__getitem__, tuple(FLAGS)
        elif setting.choices:
            kind = str
        listed = f" ({', '.join(allowed)})" if allowed else ""
        text = f"To be tried, a list{listed}. {setting.declared.help}"
        options.append(click.option(setting.flag, callback=several(kind, allowed), help=text))
        names.append(setting.name)
    shapes = (UNIFORM, PYRAMID)
    options.append(
        click.option(
            "--layer-budgets",
            callback=several(str, shapes),
            help=f"To be tried, a list ({', '.join(shapes)}). How layers share the budget.",
        )
    )
    return option_group("tried", options, [*names, "layer_budgets"], dict)


@click.command()
@bundle_argument()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the comparison.")
@click.option(
    "--policies", callback=several(str), help="Policies, like linear,h2o. Default: all that the bundle holds."
)
@click.option(
    "--budgets",
    callback=several(str),
    default="1/2,1/4,1/6,1/8",
    show_default=True,
    help="Budgets: lines, or fractions of the image (rounded to whole lines).",
)
@click.option("--samples", default=200, show_default=True, help="Images a cell.")
@condition_options()
@click.option("--seed", default=0, show_default=True, help="Seed of each class's or prompt's first image.")
@click.option(
    "--metrics",
    "metric_source",
    help="Where quality metrics come from: FILE.py or package.module, and :function unless it is metrics.",
)
@click.option(
    "--forced-images",
    type=int,
    help="Images whose logits are compared with the full cache's, both fed the same tokens. Default: a batch.",
)
@grid_options()
@click.option(
    "--timing/--no-timing",
    default=None,
    help="Time decode at every budget. Default: where the bundle runs on the CPU.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted comparison in OUT.")
@backend_options()
@output_options()
def command(
    place: BundlePlace,
    out: Path,
    policies: tuple[str, ...],
    budgets: tuple[str, ...],
    samples: int,
    conditions: ConditionRequest,
    seed: int,
    metric_source: str | None,
    forced_images: int | None,
    timing: bool | None,
    resume: bool,
    options: BackendOptions,
    output: Output,
    tried: dict[str, tuple[Any, ...]],
) -> None:
    """Compare cache policies and budgets on BUNDLE: quality, agreement with the full cache, memory, speed.

    Every combination of the lists draws the same images. OUT gets compare.json and a self-contained compare.html.
    """
    _check_out(out, resume=resume)
    on_cpu = options.name is BackendName.CPU
    if timing and not on_cpu:
        raise RequestError(
            f"--timing is of the CPU alone: leave it out, or time {options.name} with linert bench"
        )
    # This one holds all budgets.
    opened = place.open()
    *_, widest = opened.capacities
    generator = Generator(opened.other(widest), options)
    manifest = generator.manifest
    listed = Grid(policies or tuple(manifest.policies), budgets, tried)
    cells, refused = listed.cells(manifest)
    conditioner = generator.conditioner
    metrics = load_metrics(metric_source) if metric_source is not None else []
    sample_list = list_samples(conditions.settle(conditioner) or conditioner.usual(), samples, seed)
    request = CompareRequest(
        bundle_sha256=manifest.sha256,
        caches=tuple(cell.cache for cell in cells),
        samples=tuple(sample_list),
        sampling=manifest.sampling,
        metrics=metric_source or "",
        metrics_sha256=source_digest(metric_source.partition(":")[0]) if metric_source else "",
        forced_images=min(len(sample_list), manifest.images if forced_images is None else forced_images),
    )
    if request.forced_images < 1:
        raise RequestError("--forced-images must be at least 1")
    console = output.notes()
    for line in refused:
        console.print(f"left out: {line}")
    require_images(metrics, len(sample_list))
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    # Held until the report is written.
    click.get_current_context().with_resource(working_folder(out))
    _check_out(out, resume=resume)
    _same_request(out, request)
    with progress:
        task = progress.add_task("", total=1)
        comparison = Comparison(
            generator,
            cells,
            request,
            metrics,
            out,
            resume=resume,
            progress=lambda phase, done, total: progress.update(
                task, description=phase, completed=done, total=total
            ),
        )
        results = comparison.run(timing=on_cpu if timing is None else timing)
        strips = [comparison.pictures(cell, STRIP_IMAGES) for cell in cells]
        progress.update(task, completed=progress.tasks[0].total)
    facts = {
        "bundle": f"{place.path} (sha256 {manifest.sha256[:16]})",
        "model": f"{manifest.model.family}, {manifest.model.parameters:,} parameters, {manifest.raster.lines} x "
        f"{manifest.raster.line_width} tokens",
        "samples": f"{len(sample_list)} a cell, seeds from {seed}; logits compared on {request.forced_images}",
        "sampling": ", ".join(
            f"{name} {value}" for name, value in msgspec.to_builtins(manifest.sampling).items()
        ),
        "by default": manifest.cache.text,
        "machine": f"{processor()}, {options.threads or os.cpu_count()} threads, backend {options.name}, ONNX Runtime "
        f"{onnxruntime.__version__}",
    }
    if comparison.cautions:
        facts["caution"] = "; ".join(comparison.cautions)
    values = {"facts": facts, "cells": [result.to_json() for result in results]}
    _write(out / JSON_NAME, json.dumps(values, indent=1))
    _write(out / PAGE_NAME, render_page(results, metrics, strips, facts))
    if output.tables:
        _print(results, metrics)
    output.result(
        {**values, "report": str(out / PAGE_NAME)},
        [*(f"caution: {line}" for line in comparison.cautions), f"report: {out / PAGE_NAME}"],
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _check_out(out: Path, *, resume: bool) -> None:
    """Raise :class:`OutputError` if the comparison cannot be made in ``out``."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder; give another --out")
    if not out.exists() or is_empty(out):
        return
    if not (out / REQUEST_NAME).is_file():
        what = "holds no comparison to resume" if resume else "exists and is no comparison"
        raise OutputError(f"{out} {what}: there is no {REQUEST_NAME}; give another --out")
    if not resume:
        raise OutputError(f"{out} exists; give another --out, or --resume to continue the comparison in it")


def _same_request(out: Path, request: CompareRequest) -> None:
    """Record ``request``, or check that ``out`` holds the same one, whose metrics may have changed: they are measured again."""
    path = out / REQUEST_NAME
    if path.exists():
        try:
            known = read_record(path, CompareRequest)
        except RecordError as error:
            raise OutputError(f"{path} cannot be read ({error}); give another --out") from error
        known = msgspec.structs.replace(known, metrics_sha256=request.metrics_sha256)
        names = [name for name in known.__struct_fields__ if getattr(known, name) != getattr(request, name)]
        if names:
            raise OutputError(
                f"{out} holds a comparison with other {', '.join(names)}; resume it with the same request, or "
                "give another --out"
            )
    _write(path, msgspec.json.format(msgspec.json.encode(request), indent=1).decode())


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _print(results: Sequence[CellResult], metrics: Sequence[Metric]) -> None:
    """Print a table of costs and one a metric. Long names of policies are folded, numbers are not."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PRINTED_WIDTH
    for text in tables(results, metrics):
        table = Table(
            title=text.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, title in enumerate(text.columns):
            if number:
                table.add_column(title, justify="right", no_wrap=True)
            else:
                table.add_column(title, overflow="fold")
        for row in text.rows:
            table.add_row(*row)
        console.print(table)
