#!/usr/bin/env python3
"""Measure step time and state memory against the size of the image: a few lines in the cache, and all of them.

    python scripts/bench_image_sizes.py --size B --budget-lines 4 --plot docs/image_sizes.svg

Random weights of a published size. For each grid the decode graph is timed with a buffer of so many lines and with one
of the whole image, in rounds that take turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import click
from matplotlib.figure import Figure
from random_checkpoint import SIZES, random_bundle

from exporter.timing import decode_backend, step_times
from runtime.cache_request import CacheRequest


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="B", show_default=True)
@click.option("--grid", "grids", default=[16, 24, 32, 64], multiple=True, show_default=True)
@click.option("--budget-lines", default=4, show_default=True)
@click.option("--images", default=1, show_default=True, help="Batch; guidance doubles the rows.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw step time and state to this file.")
def main(
    size: str,
    grids: tuple[int, ...],
    budget_lines: int,
    images: int,
    threads: int,
    rounds: int,
    plot: Path | None,
) -> None:
    results = []
    with tempfile.TemporaryDirectory() as name:
        for grid in grids:
            click.echo(f"exporting a {grid} x {grid} grid", err=True)
            request = CacheRequest(budget_lines=budget_lines)
            bundle = random_bundle(Path(name), size, grid=grid, request=request, images=images)
            manifest = bundle.manifest
            buffers = {"line buffer": budget_lines, "full cache": grid}
            times: dict[str, list[float]] = {kind: [] for kind in buffers}
            for _ in range(rounds):
                for kind, lines in buffers.items():
                    layers = (lines,) * manifest.model.layers
                    with decode_backend(bundle, "decode.unfiltered", layers, threads) as backend:
                        times[kind] += step_times(backend, "decode.unfiltered", manifest)
            for kind, lines in buffers.items():
                result = {
                    "size": size,
                    "grid": grid,
                    "cache": kind,
                    "lines": lines,
                    "slots": manifest.raster.slots(lines),
                    "state_mib": round(manifest.state_bytes_at((lines,) * manifest.model.layers) / 2**20, 1),
                    "decode_ms": round(statistics.median(times[kind]), 2),
                }
                click.echo(json.dumps(result))
                results.append(result)
    if plot is not None:
        draw(results, plot)


def draw(results: list[dict[str, object]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    columns = (("decode_ms", "decode step, ms"), ("state_mib", "state, MiB"))
    for axes, (key, title) in zip(figure.subplots(1, 2), columns, strict=True):
        for kind in ("full cache", "line buffer"):
            rows = [result for result in results if result["cache"] == kind]
            label = kind if kind == "full cache" else f"line buffer, {rows[0]['lines']} lines"
            axes.plot([row["grid"] for row in rows], [row[key] for row in rows], marker="o", label=label)
        axes.set(xlabel="tokens along the image's side", ylabel=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
