"""``linert export``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from exporter.bundle_export import ExportPlan, export_bundle
from exporter.models import load_image_decoder, load_transformer
from graphs.policies import POLICIES
from runtime.errors import OutputError
from runtime.geometry import CacheSettings, Mode, Raster
from runtime.manifest import SamplingSettings
from runtime.text import size_text

DEFAULT_ANCHOR_TOKENS = 16


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--vq", required=True, type=click.Path(path_type=Path), help="VQ tokenizer checkpoint.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle.")
@click.option(
    "--grid", type=int, help="Tokens in an image row. Default: from a _256, _384 or _512 file name."
)
@click.option("--heads", type=int, help="Attention heads, for sizes that are not published ones.")
@click.option("--ema", is_flag=True, help="Export the moving average that a training file holds.")
@click.option(
    "--policy",
    type=click.Choice(sorted(POLICIES)),
    default="linear",
    show_default=True,
    help="Cache policy.",
)
@click.option(
    "--mode",
    type=click.Choice([str(m) for m in Mode]),
    default="strict",
    show_default=True,
    help="Whether an evicted slot empties at once or stays visible until it is overwritten.",
)
@click.option(
    "--budget-lines",
    type=int,
    help="Lines in the cache, the one in progress included. Default: a quarter of the image.",
)
@click.option("--recent-lines", type=int, help="Newest lines that stay. Default: 1 if the budget holds it.")
@click.option(
    "--anchor-tokens",
    type=int,
    help=f"First image tokens that stay. Default: {DEFAULT_ANCHOR_TOKENS}, or what the budget holds.",
)
@click.option("--batch", default=1, show_default=True, help="Images drawn at once.")
@click.option(
    "--guidance",
    default=4.0,
    show_default=True,
    help="Default scale of classifier-free guidance; above 1 doubles the rows.",
)
@click.option(
    "--guidance-interval",
    default=-1,
    show_default=True,
    help="Default last guided decode step; -1 guides all.",
)
@click.option("--temperature", default=1.0, show_default=True, help="Default temperature.")
@click.option("--top-k", default=0, show_default=True, help="Default top-k; 0 keeps all tokens.")
@click.option("--top-p", default=1.0, show_default=True, help="Default top-p; 1 keeps all tokens.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(
    checkpoint: Path,
    vq: Path,
    out: Path,
    grid: int | None,
    heads: int | None,
    ema: bool,
    policy: str,
    mode: str,
    budget_lines: int | None,
    recent_lines: int | None,
    anchor_tokens: int | None,
    batch: int,
    guidance: float,
    guidance_interval: int,
    temperature: float,
    top_k: int,
    top_p: float,
    force: bool,
) -> None:
    """Turn a LlamaGen CHECKPOINT and its VQ tokenizer into a bundle.

    Published .pt/.pth containers, training files and safetensors load as they are; no code in them is run.
    """
    console = Console(stderr=True, highlight=False)
    if out.exists() and not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    image_decoder = load_image_decoder(vq)
    transformer = load_transformer(
        checkpoint, patch=image_decoder.config.patch, grid=grid, heads=heads, ema=ema
    )
    config = transformer.config
    raster = Raster(config.prefix_len, config.line_width, config.lines)
    plan = ExportPlan(
        transformer,
        image_decoder,
        cache_settings(raster, policy, Mode(mode), budget_lines, recent_lines, anchor_tokens),
        images=batch,
        sampling=SamplingSettings(guidance, guidance_interval, temperature, top_k, top_p),
    )
    _announce(console, plan)
    with console.status("exporting") as status:
        export_bundle(plan, out, force=force, report=lambda line: status.update(f"{line} ..."))
    click.echo(f"bundle: {out}")


def cache_settings(
    raster: Raster,
    policy: str,
    mode: Mode,
    budget_lines: int | None,
    recent_lines: int | None,
    anchor_tokens: int | None,
) -> CacheSettings:
    """Fill in what was not given: a quarter of the lines, one recent line and anchors, as far as they fit."""
    lines, width = raster.lines, raster.line_width
    if policy == "full":
        budget = lines if budget_lines is None else budget_lines
    else:
        budget = max(1, lines // 4) if budget_lines is None else budget_lines
    anchors_given = anchor_tokens or 0
    if recent_lines is None:
        recent_lines = 1 if (budget - 2) * width >= anchors_given else 0
    if anchor_tokens is None:
        room = (budget - 1 - recent_lines) * width
        anchor_tokens = max(0, min(DEFAULT_ANCHOR_TOKENS, room))
    return CacheSettings(policy, mode, budget, recent_lines, anchor_tokens)


def _announce(console: Console, plan: ExportPlan) -> None:
    """Say what will be built and exactly how much state memory it takes, before any work."""
    config, cache, raster = plan.transformer.config, plan.cache, plan.raster
    rows = "conditional and unconditional rows" if plan.guided else "conditional rows only"
    console.print(
        f"LlamaGen: {config.layers} layers, width {config.dim}, {config.heads} heads of {config.head_dim}, "
        f"{config.vocab_size} tokens, {config.num_classes} classes, weights {size_text(plan.weight_bytes)}"
    )
    console.print(
        f"image: {raster.lines} x {raster.line_width} tokens, "
        f"{raster.lines * plan.image_decoder.config.patch} pixels; batch {plan.images}, {rows}"
    )
    console.print(
        f"cache: {cache.policy} ({cache.mode}), {cache.budget_lines} of {raster.lines} lines = "
        f"{cache.capacity(raster)} slots; {cache.recent_lines} recent lines and {cache.anchor_tokens} anchor "
        "tokens stay"
    )
    console.print(
        f"state memory: {plan.state_bytes} bytes ({size_text(plan.state_bytes)}); "
        f"the full cache takes {size_text(plan.full_state_bytes)}"
    )
