"""``linert sweep``: measure variants of a bundle beside each other, and beside PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from linert.exporter.peers import Peer, PeerTimes, measure_beside, peers_of
from linert.exporter.sources import Checkpoints
from linert.exporter.sweep import cells, export_cells, parse_axes
from linert.runtime.backends.options import BackendOptions
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.progress import measuring
from linert.runtime.commands.rounds_options import rounds_options
from linert.runtime.errors import LinertError, OutputError
from linert.runtime.files.atomic_files import check_target
from linert.runtime.files.replacement import scratch_folder
from linert.runtime.machine import default_threads, processor_name
from linert.runtime.measuring.bench import Timings
from linert.runtime.measuring.measured import Measured
from linert.runtime.text import size_text

MATPLOTLIB = b"atplotlib"
"""What matplotlib writes of itself into its files."""


@click.command()
@bundle_argument()
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="AXIS=A,B",
    help="Values of batch, policy, budget, precision or grid. Repeatable; all combinations are exported from the checkpoints. "
    "Without, the bundle itself is measured.",
)
@click.option(
    "--compare-pytorch",
    is_flag=True,
    help="Time the same model in PyTorch in the same rounds, eager and compiled, with the full cache or with its states.",
)
@rounds_options()
@click.option("--threads", default=0, help="CPU threads. Default: one a core.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the sweep into this file (needs matplotlib)."
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint, if it is no longer where it was."
)
@click.option("--vq", type=click.Path(path_type=Path), help="The VQ checkpoint, likewise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    place: BundlePlace,
    axes: tuple[str, ...],
    compare_pytorch: bool,
    rounds: int,
    image_rounds: int,
    threads: int,
    plot: Path | None,
    checkpoint: Path | None,
    vq: Path | None,
    as_json: bool,
) -> None:
    """Measure bundles that differ from BUNDLE beside each other on the CPU, and beside PyTorch.

    Times are medians of rounds in which all take turns. What is not swept is as in BUNDLE.
    """
    if plot is not None and plot.is_file() and plot.stat().st_size and MATPLOTLIB not in plot.read_bytes():
        raise OutputError(f"{plot} exists and is no plot of a sweep: give another --plot, or remove it")
    check_target(plot)
    draw = None
    if plot is not None:
        try:
            from linert.exporter import sweep_plot
        except ModuleNotFoundError as error:
            raise LinertError(f"--plot needs {error.name}: pip install 'linert[compare]'") from error
        sweep_plot.check_format(plot)
        draw = sweep_plot.draw
    threads = threads or default_threads()
    console = Console(highlight=False, quiet=as_json)
    bundle = place.open(digests=False)
    machine = {"processor": processor_name(), "threads": threads}
    console.print(f"machine: {machine['processor']}, {threads} threads")
    wanted = cells(bundle, parse_axes(axes))
    if axes or compare_pytorch:
        checkpoints = Checkpoints.find(bundle, checkpoint, vq)
        loaded = {grid: checkpoints.load(grid) for grid in sorted({cell.grid for cell in wanted})}
    peers: dict[str, Peer] = {}
    with scratch_folder() as folder:
        options = BackendOptions(threads=threads)
        if axes:
            paths: list[Path] = []
            with console.status("exporting") as status:
                for path in export_cells(bundle, wanted, folder, loaded):
                    paths.append(path)
                    status.update(f"exporting: {len(paths)} of {len(wanted)} ...")
            under_test = [Measured(path, None, options) for path in paths]
        else:
            under_test = [Measured(place.path, bundle.manifest.cache, options, place.size)]
        sizes = sorted({(cell.grid, cell.batch) for cell in wanted}) if compare_pytorch else []
        for grid, batch in sizes:
            made = peers_of(bundle, loaded[grid], threads=threads, batch=batch, console=console)
            peers |= {f"{name}, batch {batch}, grid {grid}": peer for name, peer in made.items()}
        with measuring(quiet=console.quiet) as report:
            timings, times = measure_beside(
                under_test, peers, threads=threads, rounds=rounds, image_rounds=image_rounds, progress=report
            )
    labels = [cell.labels or {"bundle": place.path.name} for cell in wanted]
    _print(console, labels, timings, times)
    if draw is not None:
        draw(labels, timings, plot)
    if as_json:
        click.echo(json.dumps({"machine": machine, **_to_json(labels, timings, times)}))


def _to_json(
    labels: Sequence[Mapping[str, str]], timings: Sequence[Timings], peers: Mapping[str, PeerTimes]
) -> dict[str, Any]:
    return {
        "cells": [
            {"labels": dict(names), **timing.to_json()} for names, timing in zip(labels, timings, strict=True)
        ],
        "pytorch": {name: peer.to_json() for name, peer in peers.items()},
    }


def _print(
    console: Console,
    labels: Sequence[Mapping[str, str]],
    timings: Sequence[Timings],
    peers: Mapping[str, PeerTimes],
) -> None:
    first = timings[0]
    limit = first.limit
    console.print(
        f"read bandwidth {limit.read_bandwidth / 1e9:.1f} GB/s, {(limit.mac_rate or 0) / 1e9:.0f} GMAC/s in float32"
    )
    measures = ("limit", "decode", "/ limit", "/ first", "line end", "s/image", "state")
    table = Table(
        caption="milliseconds; medians of interleaved rounds",
        box=SIMPLE_HEAD,
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(", ".join(labels[0]), min_width=max(len(", ".join(cell.values())) for cell in labels))
    for name in measures:
        table.add_column(name, justify="right", no_wrap=True)
    for cell, timing in zip(labels, timings, strict=True):
        seconds = timing.seconds_per_image
        table.add_row(
            ", ".join(cell.values()),
            f"{timing.limit.floor_ms:.2f}",
            f"{timing.decode_ms:.2f}",
            f"{timing.over_limit:.2f}",
            f"{timing.decode_ms / first.decode_ms:.2f}",
            "" if timing.line_end_ms is None else f"{timing.line_end_ms:.2f}",
            f"{seconds:.2f}" if seconds else "",
            size_text(timing.state_bytes),
        )
    console.print(table)
    for name, peer in peers.items():
        seconds = peer.seconds_per_image
        console.print(
            f"PyTorch {name}, {peer.note}: {peer.decode_ms:.2f} ms a step"
            + (f", {seconds:.2f} s an image" if seconds else "")
        )
