#!/usr/bin/env python3
"""Measure one decode step against the memory limit and against eager PyTorch, interleaved in one process.

    python scripts/bench_decode.py --size B --lines 6

A random checkpoint of a published size is exported in a temporary folder. The limit is what the step must touch
(every weight but the embedding tables' unused rows, and the state) over the read bandwidth measured in the same
rounds. The PyTorch peer runs the same module eagerly with a static cache of the same size, updated in place.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from random_checkpoint import SIZES, random_bundle
from torch.nn import functional as F

from exporter.models import load_transformer
from graphs.families.llamagen import LlamaGen
from runtime.bundle import Bundle
from runtime.cache_request import CacheRequest
from runtime.loop import Batch, begin, uniform_row
from runtime.ort import OrtBackend

BANDWIDTH_BYTES = 1 << 29


class EagerPeer:
    """The same transformer with a static KV cache of ``slots``, one token a call, guidance and a plain draw."""

    def __init__(self, model: LlamaGen, sequences: int, slots: int) -> None:
        config = model.config
        shape = (config.layers, sequences, config.heads, slots, config.head_dim)
        self.model = model
        self.k_cache, self.v_cache = torch.zeros(shape), torch.zeros(shape)
        self.tokens = torch.zeros(sequences, 1, dtype=torch.int64)

    @torch.inference_mode()
    def step(self, slot: int) -> None:
        position = torch.full((len(self.tokens), 1), slot)
        x, rope = self.model.embed(self.tokens), self.model.rope(position)
        for layer, block in enumerate(self.model.layers):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
            self.k_cache[layer, :, :, slot : slot + 1] = k
            self.v_cache[layer, :, :, slot : slot + 1] = v
            attended = F.scaled_dot_product_attention(q, self.k_cache[layer], self.v_cache[layer], scale=1.0)
            x = block.finish(x, attended.transpose(1, 2))
        conditional, unconditional = self.model.logits(x)[:, 0].chunk(2)
        logits = unconditional + 4.0 * (conditional - unconditional)
        drawn = torch.multinomial(logits.softmax(-1), 1)
        self.tokens = torch.cat([drawn, drawn])


def timed(action: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="B", show_default=True)
@click.option(
    "--lines", default=[6], multiple=True, show_default=True, help="Budget in lines of the 24; repeatable."
)
@click.option("--top-k", default=0, show_default=True)
@click.option("--images", default=1, show_default=True, help="Batch; guidance doubles the rows.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=12, show_default=True)
def main(size: str, lines: tuple[int, ...], top_k: int, images: int, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for budget in lines:
            click.echo(f"exporting {size} with {budget} lines", err=True)
            bundle = random_bundle(
                folder, size, request=CacheRequest(budget_lines=budget), images=images, top_k=top_k
            )
            peer = EagerPeer(
                load_transformer(folder / f"{size}.pt", patch=16, grid=24, heads=None).eager(),
                images * 2,
                bundle.manifest.raster.slots(budget),
            )
            result = measure(bundle, peer, threads, rounds)
            for key, value in result.items():
                click.echo(f"{key:>28}: {value}", err=True)
            click.echo(json.dumps({"size": size, **result}))


def measure(bundle: Bundle, peer: EagerPeer, threads: int, rounds: int) -> dict[str, object]:
    """Time a bundle beside the peer and the memory."""
    manifest = bundle.manifest
    images = manifest.images
    backend = OrtBackend(bundle, list(manifest.stages), threads=threads)
    tokens = manifest.raster.image_tokens
    uniforms = np.stack([uniform_row(image, tokens) for image in range(images)])
    batch = Batch({"class_ids": np.arange(images)}, uniforms, manifest.sampling, manifest.cache)
    config = peer.model.config
    embedding_rows = 4 * config.dim * (config.vocab_size + config.num_classes + 1)
    weights = 4 * manifest.model.parameters - embedding_rows
    state = sum(spec.nbytes for spec in manifest.state)
    buffer = torch.ones(BANDWIDTH_BYTES // 4)

    stages = batch.stages
    begin(backend, batch)
    for stage in stages.values():
        backend.load(stage)
    for _ in range(5):
        peer.step(0)
        buffer.sum()
    columns = manifest.raster.line_width
    bandwidths, steps, line_ends, eager = [], [], [], []
    for round_ in range(rounds):
        bandwidths += [BANDWIDTH_BYTES / timed(buffer.sum) / 1e6 for _ in range(3)]
        steps += [timed(lambda: backend.run(stages["decode"])) for _ in range(columns)]
        line_ends.append(timed(lambda: backend.run(stages["line_end"])))
        eager += [timed(lambda s=s: peer.step(s)) for s in range(round_ % 3, round_ % 3 + 5)]
    bandwidth = statistics.median(bandwidths)
    step, line_end = statistics.median(steps), statistics.median(line_ends)
    limit = (weights + state) / bandwidth / 1e6
    return {
        "rows": len(peer.tokens),
        "slots": peer.k_cache.shape[3],
        "top_k": manifest.sampling.top_k,
        "threads": threads,
        "weights_mb": round(weights / 1e6, 1),
        "state_mb": round(state / 1e6, 1),
        "read_gb_per_s": round(bandwidth, 1),
        "limit_ms": round(limit, 2),
        "decode_ms": round(step, 2),
        "decode_over_limit": round(step / limit, 3),
        "eager_pytorch_ms": round(statistics.median(eager), 2),
        "eager_over_decode": round(statistics.median(eager) / step, 2),
        "line_end_ms": round(line_end, 2),
        "line_end_share_of_line": round(line_end / (columns * step), 4),
    }


if __name__ == "__main__":
    main()
