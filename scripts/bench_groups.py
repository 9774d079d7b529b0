#!/usr/bin/env python3
"""Time whole images of bundles that differ in how they draw, in turns: line by line, or in groups.

    python scripts/random_checkpoint.py --size L --out out/L.pt
    python scripts/random_checkpoint.py --size L --variant lpd --grid 16 --out out/lpd_L.pth
    python scripts/random_checkpoint.py --vq 16 --out out/vq16.pt
    linert export out/L.pt --vq out/vq16.pt --grid 16 --policy full --out out/llamagen_L
    linert export out/lpd_L.pth --vq out/vq16.pt --out out/lpd_L
    python scripts/bench_groups.py out/llamagen_L out/lpd_L

Decoding alone is timed, from the condition to the last token, without pixels; the first bundle is what others are compared with.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from linert.runtime.backends.options import BackendOptions
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import Sample
from linert.runtime.machine import processor_name, resident_bytes
from linert.runtime.text import size_text


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(bundles: tuple[Path, ...], rounds: int, threads: int) -> None:
    console = Console(highlight=False)
    console.print(f"machine: {processor_name()}, {threads} threads")
    generators = [Generator(path, BackendOptions(threads=threads)) for path in bundles]
    samples = [
        [Sample(condition, 0) for condition in generator.conditioner.usual()[: generator.manifest.images]]
        for generator in generators
    ]
    resident = []
    for generator, asked in zip(generators, samples, strict=True):
        before = resident_bytes() or 0
        generator.draw(asked)
        resident.append((resident_bytes() or 0) - before)
    seconds: list[list[float]] = [[] for _ in bundles]
    for _ in range(rounds):
        for number, (generator, asked) in enumerate(zip(generators, samples, strict=True)):
            begun = time.perf_counter()
            generator.draw(asked)
            seconds[number].append((time.perf_counter() - begun) / len(asked))
    first = statistics.median(seconds[0])
    table = Table("bundle", "parts", "seconds an image", "faster than the first", "memory taken")
    values = {}
    for path, generator, times, taken in zip(bundles, generators, seconds, resident, strict=True):
        median, manifest = statistics.median(times), generator.manifest
        parts = manifest.parts(manifest.sampling)
        table.add_row(path.name, str(parts), f"{median:.3f}", f"{first / median:.2f} x", size_text(taken))
        values[path.name] = {
            "seconds_an_image": times,
            "times_faster": first / median,
            "resident_bytes": taken,
        }
    console.print(table)
    click.echo(json.dumps(values))


if __name__ == "__main__":
    main()
