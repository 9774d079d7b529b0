#!/usr/bin/env python3
"""Write random checkpoints of published sizes, for measurements that need a model's shape and not its pictures.

python scripts/random_checkpoint.py --size XL --out random_XL_384.pt
python scripts/random_checkpoint.py --size B --variant manhattan --out random_lasadgen_B
python scripts/random_checkpoint.py --size L --variant lpd --grid 16 --out random_lpd_L.pth
python scripts/random_checkpoint.py --vq 16 --out random_vq16.pt
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from linert.exporter.bundle_export import export_bundle
from linert.exporter.bundle_request import BundleRequest
from linert.exporter.cache_wishes import CacheWishes
from linert.exporter.lasadgen_folder import write_lasadgen
from linert.exporter.lpd_file import published_tensors
from linert.exporter.models import ModelRequest, load_models
from linert.exporter.schedule_wishes import ScheduleWishes
from linert.graphs.families import lasadgen, llamagen, lpd, vq
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.files.atomic_files import atomic_file

SIZES = {
    # layers, width, heads, feed-forward width
    "B": (12, 768, 12, 2048),
    "L": (24, 1024, 16, 2816),
    "XL": (36, 1280, 20, 3584),
    "XXL": (48, 1536, 24, 4096),
    "3B": (24, 3200, 32, 8704),
}
LPD = "lpd"
LPD_SIZES = ("L", "XL", "XXL")
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
    variant: str = "",
    grid: int = 24,
    policies: tuple[str, ...] = (),
    request: CacheRequest | None = None,
    capacity_lines: int | None = None,
    images: int = 1,
    top_k: int = 0,
) -> Bundle:
    """Export a guided bundle of random weights with a VQ-16 tokenizer; ``folder`` keeps its checkpoints.

    ``variant``: of a LASADGen, or ``lpd``; a LlamaGen if empty. An LPD is drawn in its usual number of steps.
    """
    model, tokenizer = folder / f"{size}.pt", folder / "vq16.pt"
    if variant:
        model = folder / f"{size}_{variant}_{grid}{'.pth' if variant == LPD else ''}"
    if not model.exists():
        write_transformer(model, size, variant, grid)
    if not tokenizer.exists():
        torch.save({"model": random_tensors(vq_shapes(16))}, tokenizer)
    # A LASADGen's folder tells its size, as an LPD's file does.
    transformer, image_decoder = load_models(
        model, tokenizer, ModelRequest() if variant else ModelRequest(grid=grid)
    )
    capacities = () if capacity_lines is None else (capacity_lines,)
    [shape] = CacheWishes(policies, request or CacheRequest(), capacities).settle(transformer, guided=True)
    bundle_request = BundleRequest(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=shape.policies,
        capacity_lines=shape.capacity_lines,
        cache=shape.cache,
        usual=shape.usual,
        images=images,
        schedule=ScheduleWishes().settle(transformer),
        sampling=SamplingSettings(guidance=4.0, top_k=top_k),
    )
    out = folder / f"bundle_{model.stem}_{grid}_{max(shape.capacity_lines, default=0)}_{images}"
    export_bundle(bundle_request, out, force=True, report=lambda line: None)
    return open_bundle(out, digests=False)


def write_transformer(path: Path, size: str, variant: str = "", grid: int = 24) -> None:
    """Write a LlamaGen, or with the ``variant`` ``lpd`` an LPD, of a published size to a file; or with another variant a LASADGen to a folder.

    Its heads reach as far as those of one that begins its training.
    """
    if not variant:
        with atomic_file(path) as file:
            torch.save({"model": random_tensors(transformer_shapes(size))}, file)
        return
    if variant == LPD:
        layers, dim, heads, _ = SIZES[size]
        shapes = lpd.LPDConfig(layers, dim, heads, 4 * dim, 16384, 1000, grid).tensor_shapes()
        with atomic_file(path) as file:
            torch.save({"model": published_tensors(random_tensors(shapes))}, file)
        return
    config = lasadgen.LASADGenConfig.of_size(size, grid=grid, variant=lasadgen.Variant(variant))
    tensors = random_tensors(config.tensor_shapes())
    usual = lasadgen.usual_decays(config)
    decays = {name: usual[name.rpartition(".")[2]].clone() for name in tensors if name.endswith("_decay")}
    write_lasadgen(tensors | decays, config, path)


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), help="A transformer of this size.")
@click.option(
    "--variant",
    type=click.Choice([LPD, *(str(v) for v in lasadgen.Variant)]),
    help="An LPD, L, XL or XXL; or a LASADGen with this decay, B, L or XL. Without, a LlamaGen.",
)
@click.option(
    "--grid", default=24, show_default=True, help="Of a LASADGen or an LPD: tokens in an image row."
)
@click.option("--vq", "patch", type=click.Choice(["8", "16"]), help="Or a VQ tokenizer of this patch.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(size: str | None, variant: str | None, grid: int, patch: str | None, out: Path) -> None:
    if (size is None) == (patch is None):
        raise click.UsageError("give --size or --vq")
    if variant == LPD and size not in LPD_SIZES:
        raise click.UsageError(f"an LPD is {', '.join(LPD_SIZES)}")
    if variant not in (None, LPD) and size not in lasadgen.SIZES:
        raise click.UsageError(f"a LASADGen is {', '.join(lasadgen.SIZES)}")
    if size:
        write_transformer(out, size, variant or "", grid)
    else:
        with atomic_file(out) as file:
            torch.save({"model": random_tensors(vq_shapes(int(patch or 0)))}, file)
    written = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
    click.echo(f"{out}: {written / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
