"""What inspect says a line buffer saves, against the state itself and against published measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linert.graphs.families import janus, llamagen
from linert.graphs.memory import memory_of
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.commands.inspect import CacheSaving


def test_the_saving_is_what_the_states_differ_by(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    saving = CacheSaving.of(manifest)
    assert (saving.kept, saving.whole, saving.sequences) == (3 * 6, 6 * 6, 4)
    full = manifest.state_at([manifest.raster.lines] * manifest.model.layers)
    bytes_of = [
        sum(spec.nbytes for spec in state if spec.name.startswith(("k_cache.", "v_cache.")))
        for state in (full, manifest.state)
    ]
    assert saving.saved == bytes_of[0] - bytes_of[1]
    assert f"= {18 / 1024 * saving.token_bytes * 4:.1f} KiB" in saving.text


JANUS_1B = janus.JanusConfig(24, 2048, 16, 16, 5632, 16384, 102400, 64, 100000, 100016, 100015)
JANUS_7B = janus.JanusConfig(30, 4096, 32, 32, 11008, 16384, 102400, 64, 100000, 100016, 100015)
XL = llamagen.LlamaGenConfig(36, 1280, 20, 3584, 16384, 1000, grid=24)
XXL = llamagen.LlamaGenConfig(48, 1536, 24, 4096, 16384, 1000, grid=24)


@pytest.mark.parametrize(
    ("config", "token_bytes", "images", "kept", "full", "compressed"),
    [
        (JANUS_1B, 196_608, 128, 144, 58.68, 37.04),
        (JANUS_1B, 196_608, 128, 96, 58.68, 34.64),
        (JANUS_7B, 491_520, 64, 144, 74.01, 47.59),
        (JANUS_7B, 491_520, 64, 96, 74.01, 44.66),
        (XL, 184_320, 256, 144, 64.75, 25.51),
        (XL, 184_320, 256, 96, 64.75, 20.97),
        (XXL, 294_912, 128, 144, 51.37, 19.54),
        (XXL, 294_912, 128, 96, 51.37, 15.87),
    ],
)
def test_the_saving_is_what_linear_published(
    config: janus.JanusConfig | llamagen.LlamaGenConfig,
    token_bytes: int,
    images: int,
    kept: int,
    full: float,
    compressed: float,
) -> None:
    """Peak memory in GB with the full and the compressed cache (arXiv 2512.04857), in bfloat16 with guidance."""
    slots = config.prefix_len + kept
    capacities = [slots] * config.layers
    memory = memory_of(config, images=images, guided=True, capacities=capacities, cache_dtype=torch.bfloat16)
    cache_bytes = sum(s.nbytes for s in memory.layer_state() if s.name.startswith(("k_cache", "v_cache")))
    assert cache_bytes == token_bytes * slots * 2 * images
    saving = CacheSaving(token_bytes, 2 * images, kept, config.image_tokens)
    assert saving.saved / 1e9 == pytest.approx(full - compressed, rel=0.05)
