#!/usr/bin/env python3
"""Write random checkpoints of published sizes, for measurements that need a model's shape and not its pictures.

python scripts/random_checkpoint.py --size XL --out random_XL_384.pt
python scripts/random_checkpoint.py --vq 16 --out random_vq16.pt
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from exporter.bundle_export import ExportPlan, export_bundle, raster_of
from exporter.commands.export import cache_plan
from exporter.models import ModelRequest, load_models
from graphs.families import llamagen, vq
from runtime.bundle import Bundle, open_bundle
from runtime.cache_request import CacheRequest
from runtime.manifest import SamplingSettings

SIZES = {
    # layers, width, heads, feed-forward width
    "B": (12, 768, 12, 2048),
    "L": (24, 1024, 16, 2816),
    "XL": (36, 1280, 20, 3584),
    "XXL": (48, 1536, 24, 4096),
    "3B": (24, 3200, 32, 8704),
}
VQ_CHANNELS = {16: (512, 256, 256, 128, 128), 8: (512, 256, 256, 128)}


def transformer_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a published size."""
    layers, dim, heads, ffn_dim = SIZES[size]
    return llamagen.LlamaGenConfig(
        layers, dim, heads, ffn_dim, vocab_size=16384, num_classes=1000, grid=24
    ).tensor_shapes()


def vq_shapes(patch: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a published VQ tokenizer."""
    return vq.VQConfig(16384, 8, 256, VQ_CHANNELS[patch]).tensor_shapes(encoder=True)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal numbers, scaled so that activations keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = 0.1 * tensor + (1.0 if name.endswith("weight") else 0.0)
        elif "embed" not in name:
            tensor *= (tensor[0].numel()) ** -0.5
        tensors[name] = tensor
    return tensors


def random_bundle(
    folder: Path,
    size: str,
    *,
    grid: int = 24,
    policies: tuple[str, ...] = ("linear",),
    request: CacheRequest | None = None,
    capacity_lines: int | None = None,
    images: int = 1,
    top_k: int = 0,
) -> Bundle:
    """Export a guided bundle of random weights with a VQ-16 tokenizer; ``folder`` keeps its checkpoints."""
    model, tokenizer = folder / f"{size}.pt", folder / "vq16.pt"
    if not model.exists():
        torch.save({"model": random_tensors(transformer_shapes(size))}, model)
    if not tokenizer.exists():
        torch.save({"model": random_tensors(vq_shapes(16))}, tokenizer)
    transformer, image_decoder = load_models(model, tokenizer, ModelRequest(grid=grid))
    config = transformer.config
    raster = raster_of(config)
    cache, capacities = cache_plan(raster, config.layers, policies, request or CacheRequest(), capacity_lines)
    plan = ExportPlan(
        transformer,
        image_decoder,
        policies,
        capacities,
        cache,
        images,
        SamplingSettings(guidance=4.0, top_k=top_k),
    )
    out = folder / f"bundle_{size}_{grid}_{capacities[0]}_{images}"
    export_bundle(plan, out, force=True, report=lambda line: None)
    return open_bundle(out, digests=False)


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), help="A transformer of this size.")
@click.option("--vq", "patch", type=click.Choice(["8", "16"]), help="Or a VQ tokenizer of this patch.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(size: str | None, patch: str | None, out: Path) -> None:
    if (size is None) == (patch is None):
        raise click.UsageError("give --size or --vq")
    shapes = transformer_shapes(size) if size else vq_shapes(int(patch or 0))
    torch.save({"model": random_tensors(shapes)}, out)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
