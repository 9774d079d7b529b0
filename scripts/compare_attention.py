#!/usr/bin/env python3
"""Compare demo models that differ in their attention alone: loss on held-out digits, what is drawn, state and time.

    python scripts/train_demo.py vq --decoder demo/vq_demo.pt --out out/training
    python scripts/train_demo.py ar --attention manhattan --out out/training      # and softmax, signed, raster, none, lpd
    python scripts/compare_attention.py --tokenizer out/training/vq_demo.pt \\
        --model softmax=out/training/c2i_demo.pt --model manhattan=out/training/lasadgen_demo \\
        --model none=out/training/lasadgen_none_demo

The loss is teacher-forced, in float32, on tokens of the digits that no training saw; differences are from the first model, with
paired 95 % intervals over digits or drawn images, which say nothing of another training. All models draw the same classes from the same seeds, LlamaGen with its full
cache. An LPD's loss is that of its usual groups, in orders of its own: its tokens are known by fewer others than a raster's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from digit_metrics import metrics
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from train_demo import TASKS, encode, load_vq

from linert.exporter.bundle_export import export_bundle
from linert.exporter.bundle_request import BundleRequest
from linert.exporter.cache_wishes import CacheWishes
from linert.exporter.calibration import InGroups
from linert.exporter.intervals import ScoredImages
from linert.exporter.models import LoadedTransformer, ModelRequest, load_models
from linert.exporter.quality import measure_rows
from linert.exporter.schedule_wishes import ScheduleWishes
from linert.graphs.transformer import RasterTransformer
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.schedule import Groups
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import ClassLabel, list_samples
from linert.runtime.measuring.bench import Timings, measure
from linert.runtime.measuring.measured import Measured
from linert.runtime.measuring.metrics import Metric, Rows
from linert.runtime.text import size_text

TASK = TASKS["demo"]
LPD_SUFFIX = ".pth"
TIMED_BATCHES = (1, 8)


class HeldOutLoss(Metric):
    """Nats a token; its rows come from no images, but from :func:`held_out_losses`."""

    name, higher_is_better, digits = "held-out loss", False, 4

    def measure(self, pixels: np.ndarray, asked: np.ndarray) -> Rows:
        raise TypeError("held-out losses are made of tokens, by held_out_losses, and not of images")

    def score(self, rows: Rows) -> float:
        return float(rows.mean())


def held_out_losses(transformer: LoadedTransformer, tokens: torch.Tensor, labels: torch.Tensor) -> Rows:
    """Nats a token of each image ``[n, 1]``."""
    model = transformer.eager()
    losses = []
    with torch.no_grad():
        for start, grids, ids in zip(
            range(0, len(tokens), 60), tokens.split(60), labels.split(60), strict=True
        ):
            condition = model.condition([ids], guided=False)
            if isinstance(model, RasterTransformer):
                logits, told = model(condition, grids[:, :-1]), grids
            else:
                groups = InGroups.of(schedule_of(transformer), range(start, start + len(grids)), TASK.ar.grid)
                logits = model(condition, grids, groups.orders, groups.sizes)
                told = grids.gather(1, groups.orders)
            losses.append(F.cross_entropy(logits.mT, told, reduction="none").mean(1))
    return torch.cat(losses)[:, None].double().numpy()


def schedule_of(transformer: LoadedTransformer) -> Groups:
    """The usual groups of a model that draws in groups."""
    schedule = ScheduleWishes().settle(transformer)
    if not isinstance(schedule, Groups):
        raise TypeError(f"{transformer.path} draws line by line")
    return schedule


def exported(model: Path, tokenizer: Path, folder: Path, batch: int, guidance: float) -> LoadedTransformer:
    """Export a model in float32, with the full cache if it has one."""
    # A LASADGen's folder tells its sizes, and an LPD's file its grid.
    request = ModelRequest(grid=TASK.ar.grid, heads=TASK.ar.heads)
    if model.is_dir() or model.suffix == LPD_SUFFIX:
        request = ModelRequest(heads=None if model.is_dir() else TASK.ar.heads)
    transformer, decoder = load_models(model, tokenizer, request)
    policies = ("full",) if transformer.family.cached else ()
    [shape] = CacheWishes(policies, CacheRequest()).settle(transformer, guided=True)
    bundle_request = BundleRequest(
        transformer=transformer,
        image_decoder=decoder,
        policies=shape.policies,
        capacity_lines=shape.capacity_lines,
        cache=shape.cache,
        images=batch,
        schedule=ScheduleWishes().settle(transformer),
        sampling=SamplingSettings(
            guidance=guidance,
            guidance_schedule=transformer.family.usual_sampling(transformer.config).guidance_schedule,
        ),
    )
    export_bundle(bundle_request, folder, report=lambda line: None)
    return transformer


@click.command(help=__doc__)
@click.option(
    "--model",
    "named",
    multiple=True,
    required=True,
    metavar="NAME=PATH",
    help="A checkpoint and what to call it; the first is what others are compared with. Repeatable.",
)
@click.option(
    "--tokenizer", required=True, type=click.Path(exists=True, path_type=Path), help="With its encoder."
)
@click.option("--images", default=1000, show_default=True, help="Drawn of each model.")
@click.option("--guidance", default=3.0, show_default=True)
@click.option("--lpd-guidance", default=4.8, show_default=True, help="Of an LPD, whose scale grows from 1.")
@click.option(
    "--batch", default=25, show_default=True, help="Of the images; times are of batches of 1 and 8."
)
@click.option("--rounds", default=20, show_default=True, help="Of timing.")
@click.option("--threads", default=2, show_default=True)
def main(
    named: Sequence[str],
    tokenizer: Path,
    images: int,
    guidance: float,
    lpd_guidance: float,
    batch: int,
    rounds: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    models = {name: Path(path) for name, _, path in (text.partition("=") for text in named)}
    pixels, labels = TASK.images("test", None)
    tokens = encode(load_vq(tokenizer), pixels)
    measures = metrics()
    scores: dict[str, list[ScoredImages]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, timed = Path(name), []
        options = BackendOptions(threads=threads)
        parameters = {}
        for name, path in models.items():
            click.echo(f"{name}: drawing {images} images", err=True)
            scale = lpd_guidance if path.suffix == LPD_SUFFIX else guidance
            transformer = exported(path, tokenizer, folder / f"{name}_{batch}", batch, scale)
            parameters[name] = sum(tensor.numel() for tensor in transformer.tensors.values())
            generator = Generator(folder / f"{name}_{batch}", options)
            samples = list_samples([ClassLabel(k) for k in range(10)], images, seed=0)
            drawn = np.concatenate([generator.draw(group) for group in generator.batches(samples)])
            rows = measure_rows(measures, generator.decoder, drawn, samples)
            losses = held_out_losses(transformer, tokens, labels)
            scores[name] = [
                ScoredImages(HeldOutLoss(), losses),
                *(ScoredImages(metric, rows[metric.name]) for metric in measures),
            ]
            for size in TIMED_BATCHES:
                exported(path, tokenizer, folder / f"{name}_of_{size}", size, scale)
                timed.append(Measured(folder / f"{name}_of_{size}", None, options))
        measured = measure(timed, threads=threads, rounds=rounds, image_rounds=rounds // 2)
    timings = dict(zip(models, zip(measured[::2], measured[1::2], strict=True), strict=True))
    report(parameters, scores, timings)


def report(
    parameters: dict[str, int],
    scores: dict[str, list[ScoredImages]],
    timings: dict[str, tuple[Timings, ...]],
) -> None:
    """A table, the differences from the first model below each score, and the same as one JSON object."""
    first = next(iter(scores.values()))
    of_batches = [f"an image, batch {size}" for size in TIMED_BATCHES]
    table = Table(
        *("model", "parameters", *(scored.metric.name for scored in first)),
        *("state", "step", "line end", *of_batches),
    )
    models = {}
    for name, of_model in timings.items():
        timing = of_model[0]
        seconds = [
            (each.image.decode + each.image.line_ends) / each.images for each in of_model if each.image
        ]
        cells, values = [], {}
        for scored, base in zip(scores[name], first, strict=True):
            metric, own, far = scored.metric, scored.interval(), scored.minus(base)
            values[metric.name] = {"own": asdict(own), "minus_first": asdict(far)}
            text = f"{own.measured:.{metric.digits}f}"
            if metric.distance:
                text += f"\nwithout bias {own.text(metric.digits)}"
            cells.append(text if scored is base else f"{text}\n{far.text(metric.digits, '+')}")
        table.add_row(
            name,
            f"{parameters[name]:,}",
            *cells,
            size_text(timing.state_bytes),
            f"{timing.decode_ms:.3f} ms",
            "" if timing.line_end_ms is None else f"{timing.line_end_ms:.3f} ms",
            *(f"{each * 1e3:.1f} ms" for each in seconds),
        )
        models[name] = {
            "parameters": parameters[name],
            **values,
            "state_bytes": timing.state_bytes,
            "decode_ms": timing.decode_ms,
            "line_end_ms": timing.line_end_ms,
            "steps": round(TASK.ar.grid**2 / timing.tokens_a_step),
            "decode_seconds_an_image": dict(zip(TIMED_BATCHES, seconds, strict=True)),
        }
    Console(highlight=False, width=140).print(table)
    click.echo(json.dumps(models))


if __name__ == "__main__":
    main()
