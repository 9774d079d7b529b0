"""Layers of the Llama decoders of the transformers library, under its parameter names, cut at the attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.base import prompt_inputs
from linert.graphs.families.layers import RMSNorm, Rope, products, rope_tables, swiglu
from linert.graphs.families.model_facts import ModelFacts
from linert.graphs.families.settings import Settings
from linert.graphs.rotary import rotate_halves, sequence_table
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Block, FamilyConfig, RasterTransformer

MOST_ROPE_BASE = 1e12


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


USUAL_ROPE = (None, "default")
USUAL_ACTIVATIONS = (None, "silu", "swish")


class DecoderSizes(NamedTuple):
    """What tensors and a ``config.json`` tell of a decoder."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int


def decoder_sizes(
    facts: ModelFacts, dim: int, settings: Settings, published: Mapping[tuple[int, int], int], title: str
) -> DecoderSizes:
    """Sizes of a checkpoint's decoder.

    Args:
        dim: its width.
        settings: the object of ``config.json`` that tells of the decoder.
        published: attention heads by layers and width, where neither a user nor ``settings`` tell them.
        title: of the family, for messages.

    Raises:
        KeyError: a tensor that tells a size is missing; the argument is its name.
        ValueError: sizes are not known or contradict each other, or the decoder is of another kind than those built here.
    """
    layers = facts.layers()
    told = settings.integer("num_attention_heads")
    if told is not None and facts.heads not in (None, told):
        raise ValueError(
            f"{settings.where} tells {told} attention heads, and --heads {facts.heads}: leave --heads out"
        )
    heads = told if facts.heads is None else facts.heads
    if heads is None:
        heads = published.get((layers, dim))
    if heads is None:
        raise ValueError(
            f"{layers} layers of width {dim} are not a published size of {title}, and there is no config.json that tells the "
            "number of attention heads: give it with --heads"
        )
    if heads < 1 or dim % heads:
        raise ValueError(f"{heads} attention heads do not divide a width of {dim}")
    keys, _ = facts.shape("layers.0.self_attn.k_proj.weight")
    kv_heads, uneven = divmod(keys * heads, dim)
    if uneven or heads % max(1, kv_heads):
        raise ValueError(
            f"keys of {keys} numbers are no heads of {dim // heads}: is {heads} the number of attention heads?"
        )
    for key, size in (("num_key_value_heads", kv_heads), ("head_dim", dim // heads), ("hidden_size", dim)):
        if settings.integer(key) not in (None, size):
            raise ValueError(
                settings.fault(key, f"{size}, as the tensors are: the file belongs to another model")
            )
    if settings.text("hidden_act") not in USUAL_ACTIVATIONS:
        raise ValueError(settings.fault("hidden_act", "silu: no other activation is built"))
    ffn_dim, _ = facts.shape("layers.0.mlp.gate_proj.weight")
    return DecoderSizes(layers, dim, heads, kv_heads, ffn_dim)


def rope_base(settings: Settings) -> float:
    """The base of the rotary embedding in a ``config.json``, old or new; 10,000 where it has none.

    Raises:
        ValueError: positions are scaled, or only a part of a head is turned: neither is built.
    """
    parameters = settings.section("rope_parameters")
    for section in (parameters, settings.section("rope_scaling")):
        for key in ("rope_type", "type"):
            if section.text(key) not in USUAL_ROPE and section.number("factor", 0, math.inf) != 1:
                raise ValueError(section.fault(key, "default: no scaled rotary embedding is built"))
        if section.number("partial_rotary_factor", 0, 1) not in (None, 1.0):
            raise ValueError(section.fault("partial_rotary_factor", "1: heads are turned as a whole"))
    told = [section.number("rope_theta", 1, MOST_ROPE_BASE) for section in (parameters, settings)]
    bases = {base for base in told if base is not None}
    if len(bases) > 1:
        raise ValueError(settings.fault("rope_theta", f"{told[0]:g}, as in rope_parameters"))
    return bases.pop() if bases else 10000.0


def norm_eps(settings: Settings, usual: float) -> float:
    """What norms add to the mean square: in a ``config.json``, else the ``usual``."""
    eps = settings.number("rms_norm_eps", 0, 1)
    return usual if eps is None else eps


def check_positions(config: FamilyConfig, settings: Settings, remedy: str) -> None:
    """Raise :class:`ValueError` where a prompt and an image take more positions than a ``config.json`` says there are."""
    most = settings.integer("max_position_embeddings", 1, 1 << 30)
    if most is not None and config.prefix_len + config.image_tokens > most:
        raise ValueError(
            f"a prompt of {config.prefix_len} tokens and an image of {config.image_tokens} are more than the {most} positions "
            f"that the model was made for: {remedy}"
        )


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

    def condition_inputs(self, images: int, *, guided: bool) -> list[StageTensor]:
        return prompt_inputs(images, self.config.prefix_len, guided=guided)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of what images are made of ``[B, S]``."""
        return self.image_embedding(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""
        return self.head(self.norm(x)).float()
