"""``linert bench``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.cache_options import cache_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.samples import plan_samples
from linert.runtime.errors import LinertError, OutputError, RequestError
from linert.runtime.files.replacement import check_target, scratch_folder
from linert.runtime.machine import (
    default_threads,
    forget_peak,
    peak_resident_bytes,
    processor_name,
)
from linert.runtime.measuring.bench import Measured, NodeTime, Timings, measure, profile, step_work
from linert.runtime.text import size_text

TOP = 10
MATPLOTLIB = b"atplotlib"
"""What matplotlib writes of itself into its files."""

MOST_ROUNDS = 100_000
"""Largest number of rounds that an option takes: days, of the smallest model."""

PEER_STEPS = 4


class Peer(Protocol):
    """Another implementation of the model: see :class:`linert.exporter.peers.PyTorchPeer`."""

    images: int
    note: str

    def steps(self, count: int) -> list[float]: ...
    def image(self) -> float: ...


@dataclass(frozen=True)
class PeerTimes:
    """Of a PyTorch peer: milliseconds a decode step, and seconds a batch of ``images``. ``note``: what it keeps."""

    decode_ms: float
    batch_s: float | None
    images: int
    note: str

    @property
    def seconds_per_image(self) -> float | None:
        return self.batch_s / self.images if self.batch_s else None

    def to_json(self) -> dict[str, Any]:
        return {"decode_ms": self.decode_ms, "seconds_per_image": self.seconds_per_image}


@click.command()
@bundle_argument()
@cache_options()
@backend_options()
@click.option(
    "--rounds",
    type=click.IntRange(1, MOST_ROUNDS),
    default=8,
    show_default=True,
    help="Lines of decode steps to time.",
)
@click.option(
    "--images",
    "image_rounds",
    type=click.IntRange(0, MOST_ROUNDS),
    default=1,
    show_default=True,
    help="Whole batches to draw and time.",
)
@click.option(
    "--compare-pytorch",
    is_flag=True,
    help="Time the same model in PyTorch in the same rounds, eager and compiled, with the full cache or with its states (needs torch).",
)
@click.option(
    "--sweep",
    multiple=True,
    metavar="AXIS=A,B",
    help="Measure bundles like this one beside each other: batch, policy, budget, precision, grid. Repeatable; "
    "all combinations are exported from the checkpoints (needs torch).",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the sweep into this file (needs matplotlib)."
)
@click.option("--profile", "profiled", is_flag=True, help="Time by node type, and the ten longest nodes.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="The checkpoint, if it is no longer where it was."
)
@click.option("--vq", type=click.Path(path_type=Path), help="The VQ checkpoint, likewise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    place: BundlePlace,
    cache: CacheRequest,
    options: BackendOptions,
    rounds: int,
    image_rounds: int,
    compare_pytorch: bool,
    sweep: tuple[str, ...],
    plot: Path | None,
    profiled: bool,
    checkpoint: Path | None,
    vq: Path | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE against the limit of this machine.

    A decode step cannot be faster than reading its weights and state at the bandwidth that is measured here, in the same
    rounds. What it reads is printed first; times are medians.
    """
    if sweep and (profiled or not cache.empty):
        raise RequestError("--sweep makes its own bundles: leave --profile and cache options out")
    if plot and not sweep:
        raise RequestError("--plot draws a sweep: give --sweep")
    if plot is not None and plot.is_file() and plot.stat().st_size and MATPLOTLIB not in plot.read_bytes():
        raise OutputError(f"{plot} exists and is no plot of a sweep: give another --plot, or remove it")
    check_target(plot)
    if plot:
        _needing("linert.exporter.sweep_plot", "compare").check_format(plot)
    if options.name is not BackendName.CPU and (sweep or profiled):
        raise RequestError(f"--sweep and --profile measure the CPU: leave --backend {options.name} out")
    threads = options.threads or default_threads()
    options = replace(options, threads=threads)
    console = Console(highlight=False, quiet=as_json)
    opened = place.open(digests=False)
    machine: dict[str, Any] = {"processor": processor_name(), "threads": threads}
    console.print(f"machine: {machine['processor']}, {threads} threads")
    if sweep:
        result = _sweep(
            console,
            opened,
            sweep,
            checkpoint,
            vq,
            threads,
            rounds,
            image_rounds,
            compare_pytorch=compare_pytorch,
            plot=plot,
        )
        if as_json:
            click.echo(json.dumps({"machine": machine, **result}))
        return
    settled = cache.settle_for(opened.manifest)
    _print_work(console, opened.manifest)
    forget_peak()
    measured = Measured(place.path, settled, options, place.size)
    if device := measured.backend.device_memory():
        machine["gpu"] = device.name
        console.print(f"device: {device.name}, {options.name}")
    if image_rounds:
        measured.image()
    peak = peak_resident_bytes()
    peers: dict[str, Peer] = {}
    if compare_pytorch:
        loaded = _needing("linert.exporter.sources", "export").load_sources(opened, checkpoint, vq)
        peers = _peers(console, opened, loaded, threads, opened.manifest.images)
    with _progress(as_json) as report:
        [timings], times = measure_beside(
            [measured], peers, threads=threads, rounds=rounds, image_rounds=image_rounds, progress=report
        )
    _print(console, timings, times, peak)
    result = {"machine": machine, **timings.to_json(), "peak_resident_bytes": peak}
    result["pytorch"] = {name: peer.to_json() for name, peer in times.items()}
    if profiled:
        kinds, nodes = profile(measured.generator.bundle, measured.batch, threads=threads)
        _print_profile(console, kinds, nodes)
        result["profile"] = {node.name: node.ms for node in kinds}
    if as_json:
        click.echo(json.dumps(result))


def _sweep(
    console: Console,
    bundle: Bundle,
    texts: Sequence[str],
    checkpoint: Path | None,
    vq: Path | None,
    threads: int,
    rounds: int,
    image_rounds: int,
    *,
    compare_pytorch: bool,
    plot: Path | None,
) -> dict[str, Any]:
    """Export and measure every combination in turns."""
    sweep = _needing("linert.exporter.sweep", "export")
    axes = sweep.parse_axes(texts)
    wanted = sweep.cells(bundle, axes)
    checkpoints = _needing("linert.exporter.sources", "export").Checkpoints.find(bundle, checkpoint, vq)
    loaded = {grid: checkpoints.load(grid) for grid in sorted({cell.grid for cell in wanted})}
    peers: dict[str, Peer] = {}
    with scratch_folder() as folder:
        paths: list[Path] = []
        with console.status("exporting") as status:
            for path in sweep.export_cells(bundle, wanted, folder, loaded):
                paths.append(path)
                status.update(f"exporting: {len(paths)} of {len(wanted)} ...")
        sizes = sorted({(cell.grid, cell.batch) for cell in wanted}) if compare_pytorch else []
        for grid, batch in sizes:
            made = _peers(console, bundle, loaded[grid], threads, batch)
            peers |= {f"{name}, batch {batch}, grid {grid}": peer for name, peer in made.items()}
        under_test = [Measured(path, None, BackendOptions(threads=threads)) for path in paths]
        with _progress(console.quiet) as report:
            timings, times = measure_beside(
                under_test, peers, threads=threads, rounds=rounds, image_rounds=image_rounds, progress=report
            )
    _print_sweep(console, [cell.labels for cell in wanted], timings, times)
    if plot is not None:
        _needing("linert.exporter.sweep_plot", "compare").draw(
            [cell.labels for cell in wanted], timings, plot
        )
    return {
        "cells": [
            {"labels": dict(cell.labels), **timing.to_json()}
            for cell, timing in zip(wanted, timings, strict=True)
        ],
        "pytorch": {name: peer.to_json() for name, peer in times.items()},
    }


def _print_sweep(
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
            f"{timing.line_end_ms:.2f}",
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


def measure_beside(
    under_test: Sequence[Measured],
    peers: Mapping[str, Peer],
    *,
    threads: int,
    rounds: int,
    image_rounds: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Timings], dict[str, PeerTimes]]:
    """:func:`linert.runtime.measuring.bench.measure`, with PyTorch peers in the same rounds."""
    steps: dict[str, list[float]] = {name: [] for name in peers}
    images: dict[str, list[float]] = {name: [] for name in peers}

    def time_steps() -> None:
        for name, peer in peers.items():
            steps[name] += peer.steps(PEER_STEPS + 1)[1:]

    def time_images() -> None:
        for name, peer in peers.items():
            images[name].append(peer.image())

    timings = measure(
        under_test,
        threads=threads,
        rounds=rounds,
        image_rounds=image_rounds,
        each_round=time_steps,
        each_image=time_images,
        progress=progress,
    )
    return timings, {
        name: PeerTimes(
            median(steps[name]), median(images[name]) if image_rounds else None, peer.images, peer.note
        )
        for name, peer in peers.items()
    }


def _peers(console: Console, bundle: Bundle, loaded: Any, threads: int, batch: int) -> dict[str, Peer]:
    """PyTorch with ``loaded`` checkpoints of ``bundle``: eager, and compiled where that works."""
    peers = _needing("linert.exporter.peers", "export")
    conditioner = open_conditioner(bundle)
    samples = plan_samples(conditioner.usual(), batch, seed=0)
    inputs = conditioner.inputs([sample.condition for sample in samples])
    conditioner.close()
    guidance = bundle.manifest.sampling.guidance
    peers.set_threads(threads)
    made: dict[str, Peer] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        peer = peers.peer_of(*loaded, inputs, guidance, compiled=compiled)
        try:
            with console.status(f"PyTorch, {name}: first steps ..."):
                peer.steps(3)
        except Exception as error:
            # torch.compile needs a C++ compiler and raises whatever its parts raise.
            if not compiled:
                raise
            reason = (str(error).splitlines() or [""])[0]
            console.print(f"torch.compile does not work here: {type(error).__name__}: {reason}")
            continue
        made[name] = peer
    return made


def _needing(module: str, extra: str) -> Any:
    """Import a module that needs more than the runtime does."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LinertError(
            f"this needs {error.name}, which is not installed: pip install 'linert[{extra}]'"
        ) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_work(console: Console, manifest: Manifest) -> None:
    """What a step has to do; how long that takes at the least is known when the machine was measured beside it."""
    work = step_work(manifest)
    console.print(
        f"one decode step reads {size_text(work.weight_bytes)} of weights and {size_text(work.state_bytes)} of state, and "
        f"multiplies {work.macs / 1e6:.0f} M times"
    )


def _print(console: Console, timings: Timings, peers: Mapping[str, PeerTimes], peak: int | None) -> None:
    limit = timings.limit
    console.print(
        f"limit: {limit.floor_ms:.2f} ms a step, at {limit.read_bandwidth / 1e9:.1f} GB/s"
        + (f" and {limit.mac_rate / 1e9:.0f} GMAC/s in float32" if limit.mac_rate else "")
    )
    table = Table("stage", "median", "", title="stages", title_justify="left")
    table.add_row(
        "decode",
        f"{timings.decode_ms:.2f} ms",
        f"{timings.over_limit:.2f} x the limit; {timings.bandwidth_share:.0%} of the bandwidth"
        + (f", {timings.compute_share:.0%} of the float32 rate" if limit.mac_rate else ""),
    )
    table.add_row(
        "line end", f"{timings.line_end_ms:.2f} ms", f"{timings.to_json()['line_end_share']:.1%} of a line"
    )
    table.add_row("image decoder", f"{timings.vq_decoder_ms:.0f} ms", "an image")
    console.print(table)
    rows = {
        "to the first token": f"{timings.start.verify + timings.start.first_token:.2f} s "
        f"({timings.start.verify:.2f} s of it to verify the files)",
        "tokens a second": f"{timings.images * 1e3 / timings.decode_ms:.0f}",
        "resident after the first token": size_text(timings.resident_bytes)
        if timings.resident_bytes
        else "unknown",
        "most resident, a batch drawn": "unknown" if peak is None else size_text(peak),
        "state": size_text(timings.state_bytes),
        "files": size_text(timings.file_bytes),
    }
    if image := timings.image:
        seconds = image.total / timings.images
        rows["seconds an image"] = (
            f"{seconds:.2f} ({1 / seconds:.2f} images a second): condition {image.prefill:.2f}, decode {image.decode:.2f}, "
            f"line ends {image.line_ends:.2f}, pixels {image.vq_decoder:.2f}, PNG {image.png:.2f} "
            f"for a batch of {timings.images}"
        )
    for name, peer in peers.items():
        text = f"{peer.decode_ms:.2f} ms a step ({peer.decode_ms / timings.decode_ms:.2f} x)"
        if peer.batch_s and timings.image:
            text += f", {peer.seconds_per_image:.2f} s an image ({peer.batch_s / timings.image.total:.2f} x)"
        rows[f"PyTorch {name}, {peer.note}"] = text
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        facts.add_row(name, text)
    console.print(facts)


def _print_profile(console: Console, kinds: Sequence[NodeTime], nodes: Sequence[NodeTime]) -> None:
    whole = sum(kind.ms for kind in kinds)
    table = Table(
        "node type", "nodes", "ms a step", "share", title="decode, by node type", title_justify="left"
    )
    for kind in kinds:
        table.add_row(kind.name, str(kind.count), f"{kind.ms:.3f}", f"{kind.ms / whole:.1%}")
    console.print(table)
    table = Table("node", "type", "ms a step", title=f"the {TOP} longest", title_justify="left")
    for node in nodes[:TOP]:
        table.add_row(node.name, node.kind, f"{node.ms:.3f}")
    console.print(table)
