"""What ``linert export`` says before it begins."""

from __future__ import annotations

from rich.console import Console

from linert.exporter.bundle_request import BundleRequest
from linert.runtime.bundles.cache_settings import NOTHING_EVICTED, cache_text
from linert.runtime.bundles.schedule import Groups
from linert.runtime.text import lines_text, size_text


def announce(console: Console, request: BundleRequest) -> None:
    """Say what will be built and exactly how much state memory it takes, before any work."""
    config, raster = request.transformer.config, request.raster
    patch = request.image_decoder.config.patch
    rows = "conditional and unconditional rows" if request.guided else "conditional rows only"
    console.print(
        f"{request.transformer.family.title} in {request.transformer.layout.who} layout: {config.layers} layers, width {config.dim}, "
        f"{config.heads} heads of {config.head_dim}, {config.vocab_size} tokens; draws {request.condition.text}"
    )
    checkpoints = dict.fromkeys(
        (loaded.checkpoint.text, loaded.checkpoint.remarks)
        for loaded in (request.transformer, request.image_decoder, request.text_encoder)
        if loaded is not None
    )
    for text, passed_over in checkpoints:
        console.print(f"read: {text}{''.join(f'; {remark}' for remark in passed_over)}")
    for remark in request.transformer.remarks:
        console.print(f"note: {remark}")
    console.print(f"weights: {request.precision.spec.text}; {size_text(request.weight_bytes)}")
    console.print(
        f"image: {raster.lines} x {raster.line_width} tokens, "
        f"{raster.columns * patch} x {raster.lines * patch} pixels; batch {request.images}, {rows}"
    )
    announce_cache(console, request)


def announce_cache(console: Console, request: BundleRequest) -> None:
    """The part of it that variants with other buffers have of their own."""
    cache, raster = request.cache, request.raster
    if isinstance(request.schedule, Groups):
        counts = " or ".join(map(str, request.schedule.counts))
        widths = ", ".join(f"{width.fed} + {width.drawn}" for width in request.schedule.widths)
        console.print(f"steps an image: {counts}, by stages that feed and draw up to {widths} tokens")
        console.print(f"cache: {NOTHING_EVICTED}")
    elif cache is None:
        console.print(f"cache: {cache_text(None)}")
    else:
        console.print(
            f"line buffer: {lines_text(request.capacity_lines)} of {raster.lines} lines = "
            f"{lines_text(request.memory.geometry.capacities)} slots a layer; policies: {', '.join(request.policies)}"
        )
        console.print(f"by default: {cache.text}")
    full = f"; the full cache takes {size_text(request.full_state_bytes)}" if cache else ""
    console.print(f"state memory: {request.state_bytes} bytes ({size_text(request.state_bytes)}){full}")
