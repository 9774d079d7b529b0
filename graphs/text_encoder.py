"""The encoder of T5 1.1 and Flan-T5 (arXiv 1910.10683, 2002.05202, 2210.11416), which LlamaGen's captions pass.

Pre-RMSNorm, attention without scale or biases under a bias by relative position that all layers share, gated GELU.
Parameter names follow the transformers library's without ``encoder.``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.layers import RMSNorm
from linert.graphs.families.model_facts import Layout, count_of, shape_of
from linert.graphs.families.settings import Settings
from linert.graphs.line_attention import OPSET
from linert.graphs.stage import Stage
from linert.graphs.stage_tensor import StageTensor

LAYOUT = Layout(
    "the transformers library's T5",
    {
        r"shared\.weight": "embed_tokens.weight",
        r"encoder\.(block\..+|final_layer_norm\.weight)": r"\1",
    },
    landmark="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ignored=(r"encoder\.embed_tokens\.weight", r"decoder\..+", r"lm_head\.weight"),
)

OWN_TABLE = "encoder.embed_tokens.weight"
"""The same table as ``shared.weight``, which a file of the encoder alone may hold in its place."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of an encoder. ``buckets``, ``max_distance``: of relative positions."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    buckets: int
    max_distance: int = 128
    norm_eps: float = 1e-6

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in TextEncoder(self).named_parameters()}


def infer_config(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> TextEncoderConfig:
    """Read the configuration from tensor shapes and ``config.json``.

    Raises:
        KeyError: a tensor that tells the size is missing; the argument is its name.
        ValueError: its feed-forward is not gated: the original T5, which is another architecture; or a setting is out of bounds.
    """
    config = Settings(settings)
    if "block.0.layer.1.DenseReluDense.wi.weight" in shapes:
        raise ValueError("the feed-forward is not gated: this is the first T5, not T5 1.1 or Flan-T5")
    if config.text("feed_forward_proj") not in (None, "gated-gelu"):
        raise ValueError(config.fault("feed_forward_proj", "gated-gelu: no other feed-forward is built"))
    vocab_size, dim = shape_of(shapes, "embed_tokens.weight", 2)
    buckets, heads = shape_of(shapes, "block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
    inner, _ = shape_of(shapes, "block.0.layer.0.SelfAttention.q.weight", 2)
    if buckets < 4 or inner % heads:
        raise ValueError(f"{heads} heads with {buckets} buckets and {inner} numbers in all are no T5's")
    # Buckets grow from a quarter of their number on.
    max_distance = config.integer("relative_attention_max_distance", buckets // 4 + 1)
    norm_eps = config.number("layer_norm_epsilon", 0, 1)
    return TextEncoderConfig(
        layers=count_of(shapes, "block"),
        dim=dim,
        heads=heads,
        head_dim=inner // heads,
        ffn_dim=shape_of(shapes, "block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        vocab_size=vocab_size,
        buckets=buckets,
        max_distance=max_distance or 128,
        norm_eps=1e-6 if norm_eps is None else norm_eps,
    )


def relative_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket ``[length, length]`` int64 of every key's position relative to every query's.

    Half of the buckets are for keys behind the query. Of each half, the first half are single distances, the others grow
    logarithmically up to ``max_distance``.
    """
    at = torch.arange(length)
    relative = at[None, :] - at[:, None]
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + grown.to(torch.int64)).clamp(max=half - 1)
    return (relative > 0) * half + torch.where(distance < exact, distance, far)


class SelfAttention(nn.Module):
    def __init__(self, config: TextEncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.k = nn.Linear(config.dim, inner, bias=False)
        self.v = nn.Linear(config.dim, inner, bias=False)
        self.o = nn.Linear(inner, config.dim, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        weights = (q @ k.mT + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.wi_1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.wo = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Half(nn.Module):
    """A half of a layer and its norm, in the names of the files."""

    def __init__(self, config: TextEncoderConfig, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)
        self.inner = name
        self.layer_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.get_submodule(self.inner)(self.layer_norm(x), *rest)


class EncoderBlock(nn.Module):
    def __init__(self, config: TextEncoderConfig, *, first: bool) -> None:
        super().__init__()
        attention = Half(config, "SelfAttention", SelfAttention(config, first=first))
        feed_forward = Half(config, "DenseReluDense", GatedFeedForward(config))
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class TextEncoder(nn.Module):
    """Token ids to features."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.block = nn.ModuleList(EncoderBlock(config, first=i == 0) for i in range(config.layers))
        self.final_layer_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Features ``[I, L, dim]`` of ``tokens [I, L]``; of each the first ``lengths [I]`` count, and zeros follow."""
        config = self.config
        length = tokens.shape[1]
        in_text = torch.arange(length) < lengths[:, None]
        buckets = relative_buckets(length, config.buckets, config.max_distance)
        table = self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        bias = F.embedding(buckets, table).permute(2, 0, 1)[None]
        bias = bias.masked_fill(~in_text[:, None, None], torch.finfo(bias.dtype).min)
        x = F.embedding(tokens, self.embed_tokens.weight)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x) * in_text[:, :, None]


class EncodeText(Stage):
    """Make features of a caption."""

    opset: ClassVar[int] = OPSET
    name = "text_encoder"

    def __init__(self, model: TextEncoder, length: int) -> None:
        super().__init__()
        self.text_encoder = model
        self.inputs = [
            StageTensor("text_tokens", torch.int64, (1, length)),
            StageTensor("text_lengths", torch.int64, (1,)),
        ]
        self.outputs = [StageTensor("text_features", torch.float32, (1, length, model.config.dim))]

    def forward(self, text_tokens: Tensor, text_lengths: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(text_tokens, text_lengths),)
