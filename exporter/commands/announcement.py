"""What ``linert export`` says before it begins."""

from __future__ import annotations

from rich.console import Console

from linert.exporter.bundle_export import ExportPlan
from linert.runtime.bundles.cache_settings import cache_text
from linert.runtime.text import lines_text, size_text


def announce(console: Console, plan: ExportPlan) -> None:
    """Say what will be built and exactly how much state memory it takes, before any work."""
    config, cache, raster = plan.transformer.config, plan.cache, plan.raster
    patch = plan.image_decoder.config.patch
    rows = "conditional and unconditional rows" if plan.guided else "conditional rows only"
    console.print(
        f"{plan.transformer.family.title} in {plan.transformer.layout.who} layout: {config.layers} layers, width {config.dim}, "
        f"{config.heads} heads of {config.head_dim}, {config.vocab_size} tokens; draws {plan.condition.text}"
    )
    checkpoints = dict.fromkeys(
        (loaded.checkpoint.text, loaded.checkpoint.remarks)
        for loaded in (plan.transformer, plan.image_decoder, plan.text_encoder)
        if loaded is not None
    )
    for text, passed_over in checkpoints:
        console.print(f"read: {text}{''.join(f'; {remark}' for remark in passed_over)}")
    for remark in plan.transformer.remarks:
        console.print(f"note: {remark}")
    console.print(f"weights: {plan.precision.spec.text}; {size_text(plan.weight_bytes)}")
    console.print(
        f"image: {raster.lines} x {raster.line_width} tokens, "
        f"{raster.columns * patch} x {raster.lines * patch} pixels; batch {plan.images}, {rows}"
    )
    if cache is None:
        console.print(f"cache: {cache_text(None)}")
    else:
        console.print(
            f"line buffer: {lines_text(plan.capacity_lines)} of {raster.lines} lines = "
            f"{lines_text(plan.memory.geometry.capacities)} slots a layer; policies: {', '.join(plan.policies)}"
        )
        console.print(f"by default: {cache.text}")
    full = f"; the full cache takes {size_text(plan.full_state_bytes)}" if cache else ""
    console.print(f"state memory: {plan.state_bytes} bytes ({size_text(plan.state_bytes)}){full}")
