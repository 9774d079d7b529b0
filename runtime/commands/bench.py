"""``linert bench``: measure a bundle against the limit of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.bundle_argument import BundlePlace, bundle_argument
from linert.runtime.commands.progress import measuring
from linert.runtime.commands.rounds_options import rounds_options
from linert.runtime.commands.settings_options import cache_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.errors import RequestError
from linert.runtime.machine import (
    default_threads,
    forget_peak,
    peak_resident_bytes,
    processor_name,
)
from linert.runtime.measuring.bench import Timings, measure, step_work
from linert.runtime.measuring.measured import Measured
from linert.runtime.measuring.step_profile import NodeTime, profile
from linert.runtime.text import size_text

TOP = 10


@click.command()
@bundle_argument()
@cache_options()
@backend_options()
@rounds_options()
@click.option("--profile", "profiled", is_flag=True, help="Time by node type, and the ten longest nodes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    place: BundlePlace,
    cache: CacheRequest,
    options: BackendOptions,
    rounds: int,
    image_rounds: int,
    profiled: bool,
    as_json: bool,
) -> None:
    """Measure BUNDLE against the limit of this machine.

    A decode step cannot be faster than reading its weights and state at the bandwidth that is measured here, in the same
    rounds. What it reads is printed first; times are medians.
    """
    if options.name is not BackendName.CPU and profiled:
        raise RequestError(f"--profile measures the CPU: leave --backend {options.name} out")
    threads = options.threads or default_threads()
    options = replace(options, threads=threads)
    console = Console(highlight=False, quiet=as_json)
    opened = place.open(digests=False)
    machine: dict[str, Any] = {"processor": processor_name(), "threads": threads}
    console.print(f"machine: {machine['processor']}, {threads} threads")
    opened, settled = cache.settle_for(opened)
    _print_work(console, opened.manifest)
    forget_peak()
    measured = Measured(place.path, settled, options, place.size)
    if device := measured.backend.device_memory():
        machine["gpu"] = device.name
        console.print(f"device: {device.name}, {options.name}")
    if image_rounds:
        measured.image()
    peak = peak_resident_bytes()
    with measuring(quiet=as_json) as report:
        [timings] = measure(
            [measured], threads=threads, rounds=rounds, image_rounds=image_rounds, progress=report
        )
    _print(console, timings, peak)
    result = {"machine": machine, **timings.to_json(), "peak_resident_bytes": peak}
    if profiled:
        kinds, nodes = profile(measured.generator.bundle, measured.batch, threads=threads)
        _print_profile(console, kinds, nodes)
        result["profile"] = {node.name: node.ms for node in kinds}
    if as_json:
        click.echo(json.dumps(result))


def _print_work(console: Console, manifest: Manifest) -> None:
    """What a step has to do; how long that takes at the least is known when the machine was measured beside it."""
    work = step_work(manifest)
    console.print(
        f"{'one decode step' if manifest.groups is None else 'the mean decode step'} reads {size_text(work.weight_bytes)} of weights and {size_text(work.state_bytes)} of state, and "
        f"multiplies {work.macs / 1e6:.0f} M times"
    )


def _print(console: Console, timings: Timings, peak: int | None) -> None:
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
    if timings.line_end_ms is not None:
        share = timings.to_json()["line_end_share"]
        table.add_row("line end", f"{timings.line_end_ms:.2f} ms", f"{share:.1%} of a line")
    table.add_row("image decoder", f"{timings.vq_decoder_ms:.0f} ms", "an image")
    console.print(table)
    if timings.windows:
        console.print(_window_table(timings))
    if timings.groups:
        console.print(_group_table(timings))
    rows = {
        "to the first token": f"{timings.start.verify + timings.start.first_token:.2f} s "
        f"({timings.start.verify:.2f} s of it to verify the files)",
        "tokens a second": f"{timings.tokens_per_second:.0f}",
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
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        facts.add_row(name, text)
    console.print(facts)


def _window_table(timings: Timings) -> Table:
    """A row a width: the images are the same whichever is taken."""
    table = Table(
        *("positions a step", "a step", "", "tokens a step", "steps", "seconds an image", "measured"),
        title="windows",
        title_justify="left",
    )
    for width, window in timings.windows.items():
        cells = [str(width), f"{window.step_ms:.2f} ms", f"{window.step_ms / timings.decode_ms:.2f} x"]
        if window.seconds is not None:
            cells += [
                f"{window.accepted:.2f}",
                str(window.passes),
                f"{window.expected_seconds:.3f}",
                f"{window.seconds:.3f}",
            ]
        table.add_row(*cells)
    return table


def _group_table(timings: Timings) -> Table:
    """A row a decode stage of an image that is drawn in groups."""
    table = Table("stage", "steps an image", "a step", title="groups", title_justify="left")
    for stage, group in timings.groups.items():
        table.add_row(stage, str(group.steps), f"{group.step_ms:.2f} ms")
    return table


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
