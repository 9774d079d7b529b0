"""The raster loop: drive a backend through the stages. It knows nothing about models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Backend
from runtime.errors import RequestError
from runtime.geometry import CacheSettings, Mode
from runtime.manifest import SamplingSettings

UNIFORM_BITS = 23
"""Uniforms are multiples of 2^-23 below 1: times any float32 total they stay below that total."""


@dataclass(frozen=True)
class Batch:
    """What one pass of the loop needs: conditions and one row of ``uniforms [I, N]`` float32 an image."""

    conditions: Mapping[str, NDArray[np.int64]]
    uniforms: NDArray[np.float32]
    sampling: SamplingSettings
    cache: CacheSettings


def uniform_row(seed: int, tokens: int) -> NDArray[np.float32]:
    """The uniform numbers ``[tokens]`` float32 in [0, 1 - 2^-23] of the image with this ``seed``.

    They depend on the seed alone, not on the batch, so that an image is the same in whatever company it is drawn.
    """
    bits = np.random.Generator(np.random.Philox(key=seed)).integers(
        0, 1 << UNIFORM_BITS, size=tokens, dtype=np.uint32
    )
    return bits.astype(np.float32) * np.float32(2.0**-UNIFORM_BITS)


def stage_names(batch: Batch) -> dict[str, str]:
    """The bundle's stage for every stage of the schedule that ``batch`` runs through."""
    return {
        "prefill": "prefill",
        "decode": "decode" if batch.sampling.filtered else "decode.unfiltered",
        "line_end": f"line_end.{batch.cache.policy}",
    }


def begin(backend: Backend, batch: Batch) -> None:
    """Write the batch's inputs and run the prefill: the whole state is laid out and the first token drawn.

    Raises:
        RequestError: a condition or setting does not fit the bundle.
    """
    manifest = backend.bundle.manifest
    if faults := batch.sampling.faults(guided=manifest.guided):
        raise RequestError("; ".join(faults))
    batch.cache.check(manifest.raster)
    for name, values in batch.conditions.items():
        backend.write(name, values)
    backend.write("uniforms", batch.uniforms)
    sampling = batch.sampling
    backend.write("guidance", np.float32(sampling.guidance))
    backend.write("guidance_interval", np.int64(sampling.guidance_interval))
    backend.write("temperature", np.float32(sampling.temperature))
    backend.write("top_k", np.int64(sampling.top_k))
    backend.write("top_p", np.float32(sampling.top_p))
    backend.write("greedy", np.int64(sampling.greedy))
    capacity = batch.cache.capacity(manifest.raster)
    backend.write("capacity", np.full(manifest.model.layers, capacity, np.int64))
    backend.write("recent_lines", np.int64(batch.cache.recent_lines))
    backend.write("anchor_tokens", np.int64(batch.cache.anchor_tokens))
    backend.write("strict", np.int64(batch.cache.mode is Mode.STRICT))
    backend.run("prefill")


def generate(
    backend: Backend, batch: Batch, on_line: Callable[[int], None] | None = None
) -> NDArray[np.int64]:
    """Draw a batch's tokens.

    Args:
        backend: holds the stages of :func:`stage_names`.
        batch: conditions, uniforms and settings.
        on_line: called with the number of lines whose tokens are all drawn, after each line.

    Returns:
        ``[I, N]`` int64 tokens in raster order.
    """
    begin(backend, batch)
    raster = backend.bundle.manifest.raster
    stages = stage_names(batch)
    for step in raster.schedule():
        backend.run(stages[step.stage])
        # The token drawn by a line's last but one step is the line's last.
        if on_line and step.stage == "decode" and step.column == raster.line_width - 2:
            on_line(step.line + 1)
    return cast("NDArray[np.int64]", backend.read("tokens"))
