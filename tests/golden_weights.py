"""Regenerate the weights that the golden outputs in ``data/`` were made with.

The outputs come from the published code (FoundationVision/LlamaGen, Alpha-VLLM/Lumina-mGPT, mit-han-lab/lpd) run on these weights. Every tensor is
drawn from its own numpy stream, seeded by (seed, crc32 of its name), so nothing but the outputs is stored.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def tensor_for(
    name: str, shape: list[int], seed: int, *, gain: float = 1.0, embedding: float = 1.0
) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(tuple(shape), dtype=np.float32)
    if name.endswith("codebook_used"):
        return np.zeros(shape, np.float32)
    if name.endswith(".bias"):
        return 0.1 * normal
    if len(shape) == 1 or ".q_norm." in name or ".k_norm." in name:
        return 1 + 0.2 * normal
    if any(
        part in name
        for part in (
            *("quantize.embedding", "tok_embeddings", "embedding_table", "uncond_embedding"),
            *("embed_tokens", "pos_embed"),
        )
    ):
        return np.float32(embedding) * normal
    if name.endswith(("output.weight", "lm_head.weight")):
        gain = 3.0
    if name.endswith("conv_out.weight"):
        gain = 0.5
    fan_in = int(np.prod(shape[1:]))
    return (gain / np.sqrt(fan_in)).astype(np.float32) * normal


def golden_state(name: str) -> dict[str, torch.Tensor]:
    """State dict ``c2i``, ``t2i``, ``vq16``, ``lumina`` or ``lpd``; its digest is checked."""
    info = json.loads((DATA / "golden.json").read_text())[name]
    aliases, kinds = info.get("fill_alias", {}), {"gain": "gain", "emb": "embedding"}
    scales = {kinds[key]: value for key, value in info.get("fill_kw", {}).items()}
    state = {
        key: torch.from_numpy(
            np.ascontiguousarray(
                tensor_for(aliases.get(key, key), shape, info["fill_seed"], **scales), np.float32
            )
        )
        for key, shape in info["keys"].items()
    }
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().tobytes())
    if digest.hexdigest() != info["sha256"]:
        raise RuntimeError(f"the weights of {name} did not regenerate")
    return state


def golden_outputs(name: str, family: str = "llamagen") -> dict[str, np.ndarray]:
    """Stored outputs: ``tokens [B, N]``, ``logits [steps, rows, V]`` and others."""
    with np.load(DATA / f"{family}_{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}
