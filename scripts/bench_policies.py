#!/usr/bin/env python3
"""Measure what each cache policy costs: a decode step and a line's end, all policies in turn in one bundle.

    python scripts/bench_policies.py --size B --capacity-lines 24     # --capacity-lines 6 without full

A random checkpoint of a published size is exported in a temporary folder with every policy. Each round draws some
lines under each policy; medians over the rounds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click
from random_checkpoint import SIZES, random_bundle

from linert.graphs.policies import POLICIES
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import make_batch
from linert.runtime.drawing.loop import begin, run_step
from linert.runtime.drawing.samples import ClassLabel, Sample


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="B", show_default=True)
@click.option("--capacity-lines", default=24, show_default=True, help="Lines of the buffer, of 24.")
@click.option("--budget-lines", default=6, show_default=True, help="Lines that the evicting policies use.")
@click.option("--images", default=1, show_default=True, help="Batch; guidance doubles the rows.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=4, show_default=True)
def main(size: str, capacity_lines: int, budget_lines: int, images: int, threads: int, rounds: int) -> None:
    policies = tuple(name for name in POLICIES if name != "full" or capacity_lines == 24)
    with tempfile.TemporaryDirectory() as name:
        request = CacheRequest(budget_lines=budget_lines)
        bundle = random_bundle(
            Path(name),
            size,
            policies=policies,
            request=request,
            capacity_lines=capacity_lines,
            images=images,
        )
        manifest = bundle.manifest
        conditioner = open_conditioner(bundle)
        backend = OrtBackend(bundle, list(manifest.stages), threads=threads)
        steps: defaultdict[str, list[float]] = defaultdict(list)
        ends: defaultdict[str, list[float]] = defaultdict(list)
        for round_ in range(rounds + 1):
            for policy in policies:
                cache = CacheRequest(policy=policy, budget_lines=None if policy == "full" else budget_lines)
                settled = cache.settle(
                    manifest.raster, manifest.capacity_lines, manifest.require_cache("the policies", policy)
                )
                samples = [Sample(ClassLabel(image), image) for image in range(images)]
                batch = make_batch(manifest, conditioner, samples, manifest.sampling, settled)
                begin(backend, batch)
                for step in manifest.raster.schedule():
                    if step.line > budget_lines + 1:
                        break
                    start = time.perf_counter()
                    run_step(backend, batch, step)
                    spent = (time.perf_counter() - start) * 1e3
                    # The first round loads the sessions; before the buffer is full nothing is evicted.
                    if round_ and step.line >= budget_lines:
                        (steps if step.stage == "decode" else ends)[policy].append(spent)
        width = manifest.raster.line_width
        base = statistics.median(steps["full" if "full" in steps else "linear"])
        for policy in policies:
            step_ms, end_ms = statistics.median(steps[policy]), statistics.median(ends[policy])
            result = {
                "size": size,
                "slots": manifest.raster.slots(capacity_lines),
                "policy": policy,
                "decode_ms": round(step_ms, 3),
                "decode_over_first": round(step_ms / base, 3),
                "line_end_ms": round(end_ms, 3),
                "line_end_share_of_line": round(end_ms / (width * step_ms), 4),
            }
            click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
