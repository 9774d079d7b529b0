#!/usr/bin/env python3
"""Measure what a token and an image cost against the size of the image: full cache, line buffer, and LASADGen's states.

    python scripts/bench_image_sizes.py --size B --budget-lines 4 --plot docs/image_sizes.png

Random weights of a published size. For each grid the last line of an image is timed, where caches are full, all kinds in
turns. A token's time holds its share of the line's end.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator
from random_checkpoint import random_bundle

from linert.graphs.families.lasadgen import SIZES, Variant
from linert.runtime.backends.options import BackendOptions
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.measuring.measured import Measured

LASAD = {f"LASADGen, {variant}": variant for variant in (Variant.MANHATTAN, Variant.SIGNED)}


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="B", show_default=True)
@click.option("--grid", "grids", default=[16, 24, 32, 64, 128], multiple=True, show_default=True)
@click.option("--budget-lines", default=4, show_default=True)
@click.option("--images", default=1, show_default=True, help="Batch; guidance doubles the rows.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw a token's time and the state to this file."
)
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
    for grid in grids:
        measured = measure_grid(size, grid, budget_lines, images, threads, rounds)
        for result in measured:
            click.echo(json.dumps(result))
        results += measured
    if plot is not None:
        draw(results, plot)


def measure_grid(
    size: str, grid: int, budget_lines: int, images: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a kind."""
    kinds: dict[str, dict[str, Any]] = {
        "full cache": {"policies": ("full",)},
        f"line buffer, {budget_lines} lines": {
            "policies": ("linear",),
            "request": CacheRequest(budget_lines=budget_lines),
        },
        **{kind: {"variant": variant} for kind, variant in LASAD.items()},
    }
    steps: defaultdict[str, list[float]] = defaultdict(list)
    line_ends: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        measured = {}
        for kind, options in kinds.items():
            click.echo(f"{grid} x {grid}: exporting {kind}", err=True)
            bundle = random_bundle(Path(name), size, grid=grid, images=images, **options)
            measured[kind] = Measured(bundle.path, None, BackendOptions(threads=threads))
        for round_ in range(rounds + 1):
            for kind, one in measured.items():
                times, line_end = one.line(), one.line_end()
                # The first round warms up.
                if round_:
                    steps[kind] += times
                    line_ends[kind].append(line_end)
        return [
            {
                "size": size,
                "grid": grid,
                "kind": kind,
                "state_mib": round(one.manifest.state_bytes / 2**20, 1),
                "decode_ms": round(statistics.median(steps[kind]), 2),
                "line_end_ms": round(statistics.median(line_ends[kind]), 2),
                "token_ms": round(
                    statistics.median(steps[kind]) + statistics.median(line_ends[kind]) / grid, 2
                ),
            }
            for kind, one in measured.items()
        ]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.7), layout="constrained")
    columns = (("token_ms", "ms a token, line ends included"), ("state_mib", "state, MiB"))
    for axes, (key, title) in zip(figure.subplots(1, 2), columns, strict=True):
        for kind in dict.fromkeys(result["kind"] for result in results):
            rows = [result for result in results if result["kind"] == kind]
            axes.plot([row["grid"] for row in rows], [row[key] for row in rows], marker="o", label=kind)
        grids = sorted({result["grid"] for result in results})
        axes.set(xlabel="tokens along the image's side", ylabel=title, xscale="log", yscale="log")
        axes.set_xticks(grids, [str(grid) for grid in grids])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    # Both axes have the same curves; beside them the legend covers none.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))


if __name__ == "__main__":
    main()
