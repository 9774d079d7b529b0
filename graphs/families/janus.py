"""Janus and Janus-Pro (arXiv 2501.17811; deepseek-ai/Janus, code MIT): text to image.

A Llama decoder over text and VQ tokens in raster order: pre-RMSNorm, attention without biases, SwiGLU, one-dimensional rotary
embedding of halves. Image tokens have an embedding and a head of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.families.base import Condition, RasterTransformer
from graphs.families.layers import RMSNorm, Rope, products, rope_tables, swiglu
from graphs.rotary import rotate_halves, sequence_table
from graphs.tensor_spec import TensorSpec

GRID = 24
"""Tokens in an image row of every published size (384 px, patch 16)."""

ORIGINAL = {
    r"language_model\.model\.embed_tokens\.weight": "text_embedding.weight",
    r"language_model\.model\.(layers\.\d+\..+|norm\.weight)": r"\1",
    r"gen_embed\.weight": "gen_embed.weight",
    r"gen_aligner\.layers\.0\.(weight|bias)": r"gen_aligner.0.\1",
    r"gen_aligner\.layers\.2\.(weight|bias)": r"gen_aligner.1.\1",
    r"gen_head\.output_mlp_projector\.(weight|bias)": r"head.proj.\1",
    r"gen_head\.vision_head\.(weight|bias)": r"head.vision_head.\1",
}
"""Names of deepseek-ai's files, as patterns, and ours; ``gen_embed`` and ``gen_aligner`` are folded into a table."""

TRANSFORMERS = {
    r"model\.language_model\.embed_tokens\.weight": "text_embedding.weight",
    r"model\.language_model\.(layers\.\d+\..+|norm\.weight)": r"\1",
    r"model\.generation_embeddings\.weight": "gen_embed.weight",
    r"model\.generation_aligner\.fc1\.(weight|bias)": r"gen_aligner.0.\1",
    r"model\.generation_aligner\.hidden_layers\.0\.(weight|bias)": r"gen_aligner.1.\1",
    r"model\.generation_head\.proj_out\.(weight|bias)": r"head.proj.\1",
    r"model\.generation_head\.vision_head\.(weight|bias)": r"head.vision_head.\1",
}
"""The same of the transformers library's ``JanusForConditionalGeneration``."""


@dataclass(frozen=True)
class JanusConfig:
    """Shape of a Janus model.

    ``vocab_size``: image tokens. ``text_vocab_size``: those of prompts. ``prefix_len``: longest prompt. ``begin_of_sentence``,
    ``begin_of_image``, ``padding``: ids of the tokenizer's special tokens.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    text_vocab_size: int
    prefix_len: int
    begin_of_sentence: int
    begin_of_image: int
    padding: int
    grid: int = GRID
    norm_eps: float = 1e-6
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        faults = []
        if self.dim % self.heads or self.heads % self.kv_heads:
            faults.append(f"{self.heads} heads, {self.kv_heads} of keys, do not divide a width of {self.dim}")
        if ids := [
            number
            for number in (self.begin_of_sentence, self.begin_of_image, self.padding)
            if not 0 <= number < self.text_vocab_size
        ]:
            faults.append(f"token {ids[0]} is outside a vocabulary of {self.text_vocab_size}")
        if min(self.layers, self.prefix_len, self.grid) < 1:
            faults.append("layers, prefix_len and grid must be at least 1")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def line_width(self) -> int:
        return self.grid

    @property
    def lines(self) -> int:
        return self.grid

    @property
    def image_tokens(self) -> int:
        return self.grid * self.grid

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the module."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in Janus(self).named_parameters()}


def module_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a checkpoint to our own, of those that draw images; empty where the layout is neither of the two."""
    listed = list(names)
    for layout in (ORIGINAL, TRANSFORMERS):
        found = {}
        for name in listed:
            for pattern, ours in layout.items():
                if match := re.fullmatch(pattern, name):
                    found[name] = match.expand(ours)
        if "gen_embed.weight" in found.values():
            return found
    return {}


def fold_image_embedding(tensors: Mapping[str, Tensor]) -> Tensor:
    """The table ``[V, dim]`` that ``gen_embed`` and ``gen_aligner`` are, as a function of the token alone."""
    x = tensors["gen_embed.weight"].float()
    x = F.linear(x, tensors["gen_aligner.0.weight"].float(), tensors["gen_aligner.0.bias"].float())
    return F.linear(F.gelu(x), tensors["gen_aligner.1.weight"].float(), tensors["gen_aligner.1.bias"].float())


def module_tensors(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's parameters from a checkpoint of either layout.

    Raises:
        KeyError: a tensor is missing; the argument is its name in the module.
    """
    names = module_names(checkpoint)
    found = {ours: checkpoint[name] for name, ours in names.items()}
    folded = {"image_embedding.weight": fold_image_embedding(found)}
    return folded | {
        name: tensor for name, tensor in found.items() if not name.startswith(("gen_embed.", "gen_aligner."))
    }


class Attention(nn.Module):
    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        keys = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (scaled), rotated k, and v: ``[B, S, heads or kv_heads, D]`` of ``x [B, S, dim]``."""
        q, k, v = products(x, (self.q_proj, self.k_proj, self.v_proj))
        q = rotate_halves(q, rope.query_cos, rope.query_sin, self.heads)
        k = rotate_halves(k, rope.key_cos, rope.key_sin, self.kv_heads)
        return (
            q.unflatten(-1, (self.heads, -1)),
            k.unflatten(-1, (self.kv_heads, -1)),
            v.unflatten(-1, (self.kv_heads, -1)),
        )


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class Block(nn.Module):
    """One layer, cut at the attention so that every stage can supply its own."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Module):
    """Image tokens' head: ``vision_head(gelu(proj x))``, with biases and the exact GELU."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.dim, config.dim)
        self.vision_head = nn.Linear(config.dim, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.proj(x)))


class Janus(RasterTransformer):
    """The transformer and what draws images with it; vision, and the head of text, stay in the checkpoint."""

    config: JanusConfig
    rope_table: Tensor

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.image_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Head(config)
        with torch.device("cpu"):
            positions = config.prefix_len + config.image_tokens
            cos, sin = sequence_table(positions, config.head_dim, config.rope_base)
        self.register_buffer("rope_table", rope_tables(cos, sin, config.head_dim), persistent=False)

    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.layers)

    def rope(self, positions: Tensor, starts: Tensor) -> Rope:
        """Positions count from the first that is no padding."""
        table = F.embedding((positions - starts[:, None]).clamp(min=0), self.rope_table)
        return Rope(*table.type_as(self.norm.weight).chunk(4, dim=-1))

    def condition_inputs(self, images: int) -> list[TensorSpec]:
        """Token ids of prompts, padded on the left with anything, and the padding of each."""
        return [
            TensorSpec("prompt_tokens", torch.int64, (images, self.config.prefix_len)),
            TensorSpec("prompt_starts", torch.int64, (images,)),
        ]

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """Embedded prompts. Unconditional ones are of the same length, with padding for all but the tokens that begin a sentence
        and an image; it is seen like any other token."""
        tokens, starts = inputs
        if guided:
            config = self.config
            kept = (tokens == config.begin_of_sentence) | (tokens == config.begin_of_image)
            tokens = torch.cat([tokens, torch.where(kept, tokens, config.padding)])
            starts = torch.cat([starts, starts])
        return Condition(self.text_embedding(tokens), starts)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of image tokens ``[B, S]``."""
        return self.image_embedding(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""
        return self.head(self.norm(x)).float()
