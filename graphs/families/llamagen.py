"""LlamaGen, by class or by caption (arXiv 2406.06525; FoundationVision/LlamaGen, MIT).

A Llama decoder over VQ tokens in raster order: pre-RMSNorm, multi-head attention without biases, SwiGLU,
two-dimensional rotary embedding. Parameter names equal the published checkpoint keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.axial import AxialSizes, AxialTransformer, FeedForward
from linert.graphs.families.base import Family, negative_or_usual
from linert.graphs.families.layers import RMSNorm, Rope
from linert.graphs.families.model_facts import Layout, ModelFacts, ModelOption, count_of, heads_of, shape_of
from linert.graphs.line_buffer import KeyValueCache
from linert.graphs.rotary import rotate_interleaved
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Condition
from linert.runtime.bundles.sampling_settings import SamplingSettings

PUBLISHED_HEADS = {
    # (layers, dim): heads
    (12, 768): 12,  # B
    (24, 1024): 16,  # L
    (36, 1280): 20,  # XL
    (48, 1536): 24,  # XXL
    (24, 3200): 32,  # 3B
    (48, 2560): 40,  # 3.9B, no weights published
    (22, 2048): 32,  # 1B, likewise
    (32, 4096): 32,  # 7B, likewise
}
"""Head counts of the published sizes: the tensors do not tell them."""


@dataclass(frozen=True)
class LlamaGenConfig(AxialSizes, KeyValueCache):
    """Shape of a LlamaGen model and of the image that it draws.

    Conditioned on one of ``num_classes``, or on ``prefix_len`` vectors of ``caption_dim``.
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    vocab_size: int
    num_classes: int
    grid: int
    prefix_len: int = 1
    caption_dim: int = 0
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        faults = self.faults(optional=("num_classes", "caption_dim"))
        if not faults and bool(self.num_classes) == bool(self.caption_dim):
            faults.append("either num_classes or caption_dim must be above 0")
        if faults:
            raise ValueError("; ".join(faults))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a checkpoint of this configuration holds."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in LlamaGen(self).named_parameters()}


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, grid: int, heads: int | None) -> LlamaGenConfig:
    """Read the configuration from tensor shapes.

    Args:
        shapes: name to shape of the checkpoint's tensors.
        grid: tokens in a line; no tensor holds it.
        heads: attention heads, or None to look the published sizes up.

    Raises:
        KeyError: a tensor that tells the size is missing; the argument is its name.
        ValueError: the head count is needed and not given, or contradicts the width.
    """
    vocab_size, dim = shape_of(shapes, "tok_embeddings.weight", 2)
    ffn_dim, _ = shape_of(shapes, "layers.0.feed_forward.w1.weight", 2)
    prefix_len, caption_dim, classes = 1, 0, 0
    if "cls_embedding.cap_proj.fc1.weight" in shapes:
        prefix_len, caption_dim = shape_of(shapes, "cls_embedding.uncond_embedding", 2)
    else:
        classes = shape_of(shapes, "cls_embedding.embedding_table.weight", 2)[0] - 1
    layers = count_of(shapes, "layers")
    return LlamaGenConfig(
        layers=layers,
        dim=dim,
        heads=heads_of(heads, PUBLISHED_HEADS, "LlamaGen", layers, dim),
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        num_classes=classes,
        grid=grid,
        prefix_len=prefix_len,
        caption_dim=caption_dim,
    )


class Attention(nn.Module):
    """Projections around attention; the attention itself belongs to the stage that calls."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated q (scaled by ``head_dim ** -0.5``), rotated k, and v: ``[B, S, H, D]`` of ``x [B, S, dim]``."""
        q, k, v = self.wqkv(x).chunk(3, dim=-1)
        q = rotate_interleaved(q, rope.query_cos, rope.query_sin, self.heads)
        k = rotate_interleaved(k, rope.key_cos, rope.key_sin, self.heads)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        return q, k, v


class Block(nn.Module):
    """One transformer layer, cut at the attention so that every stage can supply its own."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled), keys and values, ``[B, S, H, D]`` each, of the residual stream ``x [B, S, dim]``."""
        return self.attention.project(self.attention_norm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output ``attended [B, S, H, D]`` and the feed-forward to ``x [B, S, dim]``."""
        x = x + self.attention.wo(attended.flatten(-2))
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionProjection(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the tanh form of GELU, without biases."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Features of a text encoder, and those learned for guidance in their place."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.uncond_embedding = nn.Parameter(torch.zeros(config.prefix_len, config.caption_dim))


class ClassEmbedding(nn.Module):
    """Class vectors; the last row is the null class of classifier-free guidance."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)


class LlamaGen(AxialTransformer):
    """The transformer, with the pieces that the stages assemble and a parallel form for training and reference."""

    config: LlamaGenConfig
    cls_embedding: CaptionEmbedding | ClassEmbedding

    def __init__(self, config: LlamaGenConfig) -> None:
        condition = CaptionEmbedding(config) if config.caption_dim else ClassEmbedding(config)
        super().__init__(
            config, condition, (Block(config) for _ in range(config.layers)), prefix_turned=False
        )

    def condition_inputs(self, images: int, *, guided: bool) -> list[StageTensor]:
        """Class ids; or caption features, left-padded, and the padding of each; where guided, of negative captions as well, whose
        padding is -1 where there is none."""
        config = self.config
        if not config.caption_dim:
            return [StageTensor("class_ids", torch.int64, (images,))]
        features = (images, config.prefix_len, config.caption_dim)
        return [
            spec
            for kind in (("caption", "negative") if guided else ("caption",))
            for spec in (
                StageTensor(f"{kind}_features", torch.float32, features),
                StageTensor(f"{kind}_starts", torch.int64, (images,)),
            )
        ]

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """Class vectors, without padding; or projected captions. The unconditional one is the null class, or what was learned."""
        if isinstance(self.cls_embedding, ClassEmbedding):
            [ids] = inputs
            if guided:
                ids = torch.cat([ids, torch.full_like(ids, self.config.num_classes)])
            return Condition(self.cls_embedding.embedding_table(ids)[:, None], torch.zeros_like(ids))
        captions, starts, *negative = inputs
        captions = captions.type_as(self.norm.weight)
        if guided:
            learned = self.cls_embedding.uncond_embedding.expand_as(captions)
            other, other_starts = negative_or_usual(
                learned, starts, [negative[0].type_as(captions), negative[1]]
            )
            captions, starts = torch.cat([captions, other]), torch.cat([starts, other_starts])
        # The projection of nothing is nothing, as it has no biases.
        return Condition(self.cls_embedding.cap_proj(captions), starts)


def told_grids(facts: ModelFacts) -> dict[str, int]:
    """Tokens in a line by what of a file tells them: the arguments of its training, or a table of rotary angles."""
    told = {}
    side, patch = (facts.training.get(key) for key in ("image_size", "downsample_size"))
    if isinstance(side, int) and isinstance(patch, int | None) and side > 0:
        told["training arguments"] = side // (patch or facts.patch)
    if shape := facts.buffers.get("freqs_cis"):
        prefix_len = facts.shapes.get("cls_embedding.uncond_embedding", (1,))[0]
        tokens = shape[0] - prefix_len
        if tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
            told["freqs_cis"] = math.isqrt(tokens)
    return told


def buffered_heads(facts: ModelFacts) -> int | None:
    """Attention heads by a table of rotary angles ``[positions, head_dim / 2, 2]``, if a file has one."""
    shape = facts.buffers.get("freqs_cis", ())
    dim = facts.shapes.get("tok_embeddings.weight", ())[-1:]
    if len(shape) < 2 or not dim or not shape[1] or dim[0] % (2 * shape[1]):
        return None
    return dim[0] // (2 * shape[1])


class LlamaGenFamily(Family):
    name = "llamagen"
    title = "LlamaGen"
    takes = frozenset({ModelOption.GRID, ModelOption.HEADS, ModelOption.TEXT_ENCODER})
    config_type = LlamaGenConfig
    layouts = (
        Layout(
            "FoundationVision's",
            {
                r"((?:tok_embeddings|norm|output)\.weight)": r"\1",
                r"((?:cls_embedding|layers)\..+)": r"\1",
            },
            landmark="layers.0.attention.wqkv.weight",
        ),
    )

    def configure(self, facts: ModelFacts) -> LlamaGenConfig:
        grid, told = facts.grid, told_grids(facts)
        if grid is None and len(set(told.values())) > 1:
            shown = ", ".join(f"{tokens} by its {where}" for where, tokens in told.items())
            raise ValueError(f"an image row has {shown}: say how many tokens it has with --grid")
        if grid is None:
            grid = next(iter(told.values()), None)
        if grid is None and facts.side is not None:
            grid = facts.side // facts.patch
        if grid is None:
            raise ValueError(
                "the checkpoint does not hold the size of its image, and the file name has no _256, _384 or _512: give the "
                "tokens in an image row with --grid (16, 24, 32, ...)"
            )
        heads = facts.heads
        if heads is None and (turned := buffered_heads(facts)):
            heads = turned
        return infer_config(facts.shapes, grid=grid, heads=heads)

    def remarks(self, config: LlamaGenConfig, facts: ModelFacts) -> list[str]:
        told = told_grids(facts)
        if facts.side is not None:
            told["name"] = facts.side // facts.patch
        return [
            f"an image row is taken to have {config.grid} tokens, and has {grid} by the checkpoint's {where}"
            for where, grid in told.items()
            if grid != config.grid
        ]

    def build(self, config: LlamaGenConfig) -> LlamaGen:
        return LlamaGen(config)

    def caption_dim(self, config: LlamaGenConfig) -> int:
        return config.caption_dim

    def usual_sampling(self, config: LlamaGenConfig) -> SamplingSettings:
        return (
            SamplingSettings(guidance=7.5, top_k=1000)
            if config.caption_dim
            else SamplingSettings(guidance=4.0)
        )


FAMILY = LlamaGenFamily()
