"""Layers of the Llama decoders of the transformers library, under its parameter names, cut at the attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.families.base import Block, FamilyConfig, RasterTransformer, prompt_inputs
from graphs.families.layers import RMSNorm, Rope, products, rope_tables, swiglu
from graphs.rotary import rotate_halves, sequence_table
from graphs.tensor_spec import TensorSpec


class LlamaConfig(FamilyConfig, Protocol):
    """Sizes of a decoder."""

    @property
    def ffn_dim(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def text_vocab_size(self) -> int: ...


def rope_base(settings: Mapping[str, Any]) -> float:
    """The base of the rotary embedding in a ``config.json``, old or new; 10,000 where it has none."""
    parameters = settings.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or settings.get("rope_theta") or 10000.0)


class LlamaAttention(nn.Module):
    """Projections around attention; the attention itself belongs to the stage that calls."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        keys = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, S, heads * D]`` before they are rotated."""
        return q, k

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (scaled), rotated k, and v: ``[B, S, heads or kv_heads, D]`` of ``x [B, S, dim]``."""
        q, k, v = products(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.normed(q, k)
        q = rotate_halves(q, rope.query_cos, rope.query_sin, self.heads)
        k = rotate_halves(k, rope.key_cos, rope.key_sin, self.kv_heads)
        return (
            q.unflatten(-1, (self.heads, -1)),
            k.unflatten(-1, (self.kv_heads, -1)),
            v.unflatten(-1, (self.kv_heads, -1)),
        )


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class LlamaBlock(nn.Module):
    """One layer, normalised before each half; with another ``attention`` than Llama's if given."""

    def __init__(self, config: LlamaConfig, attention: LlamaAttention | None = None) -> None:
        super().__init__()
        self.self_attn = attention or LlamaAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class PromptedLlama(RasterTransformer):
    """A decoder that is conditioned on prompts, with embeddings of its own for text and for what images are made of.

    Args:
        config: its sizes.
        blocks: its layers.
        image_rows: of the embedding of image tokens.
    """

    head: nn.Module
    """Logits ``[..., vocab_size]`` of the normed stream ``[..., dim]``."""
    rope_table: Tensor

    def __init__(self, config: LlamaConfig, blocks: Iterable[LlamaBlock], image_rows: int) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.image_embedding = nn.Embedding(image_rows, config.dim)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps)
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

    def condition_inputs(self, images: int, *, guided: bool) -> list[TensorSpec]:
        return prompt_inputs(images, self.config.prefix_len, guided=guided)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of what images are made of ``[B, S]``."""
        return self.image_embedding(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""
        return self.head(self.norm(x)).float()
