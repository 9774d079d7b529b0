"""LPD: locality-aware parallel decoding of class-conditional images (arXiv 2507.01957; the layout of its published files).

A decoder without rotary embedding: every row carries the learned embedding of its cell, added and normalised before the first layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.axial import AxialSizes
from linert.graphs.families.base import Family
from linert.graphs.families.model_facts import Layout, ModelFacts, ModelOption, count_of, heads_of, shape_of
from linert.graphs.group_memory import GroupMemory
from linert.graphs.group_transformer import GroupTransformer
from linert.graphs.stage import Geometry
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Block, Condition
from linert.runtime.bundles.sampling_settings import GuidanceSchedule, SamplingSettings

PUBLISHED_HEADS = {(24, 1024): 16, (36, 1280): 20, (48, 1536): 24}
"""Attention heads by layers and width: LPD-L, XL, XXL. No tensor tells them."""

NORM_EPS = 1e-6


@dataclass(frozen=True)
class LPDConfig(AxialSizes):
    """Shape of a model and of the image that it draws. Nothing is turned, so heads are of any size."""

    head_multiple: ClassVar[int] = 1

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    vocab_size: int
    num_classes: int
    grid: int
    prefix_len: int = 1

    def __post_init__(self) -> None:
        faults = self.faults()
        if not faults and self.prefix_len != 1:
            faults.append(f"a condition of {self.prefix_len} rows; an LPD has one")
        if faults:
            raise ValueError("; ".join(faults))

    def memory(self, geometry: Geometry) -> GroupMemory:
        return GroupMemory(geometry)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a checkpoint of this configuration holds."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in LPD(self).named_parameters()}


class Attention(nn.Module):
    """Projections around attention; the attention itself belongs to the stage that calls."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, config.head_dim**-0.5
        self.wqkv = nn.Linear(config.dim, 3 * config.dim)
        self.wo = nn.Linear(config.dim, config.dim)


class FeedForward(nn.Module):
    """``w2(gelu(w1 x))``."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim)
        self.w2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class LPDBlock(nn.Module):
    """One layer, cut at the attention so that every stage can supply its own form."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

    def qkv(self, x: Tensor, rope: None) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        q, k, v = attention.wqkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in (q * attention.scale, k, v))
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention.wo(attended.flatten(-2))
        return x + self.feed_forward(self.ffn_norm(x))


class LPD(GroupTransformer):
    """The transformer, with the pieces that the stages assemble and a parallel form for training and reference.

    ``cls_embedding``: of the classes, and last of the null class of classifier-free guidance. ``pos_embedding``: of the condition, and of
    every cell. ``mask_embedding``: what queries hold in the place of a token.
    """

    config: LPDConfig

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.mask_embedding = nn.Embedding(1, config.dim)
        self.pos_embedding = nn.Embedding(config.image_tokens + 1, config.dim)
        self.input_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.layers = nn.ModuleList(LPDBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.layers)

    def condition_inputs(self, images: int, *, guided: bool) -> list[StageTensor]:
        """Class ids."""
        return [StageTensor("class_ids", torch.int64, (images,))]

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """The classes' rows; the last class is the null class of classifier-free guidance."""
        [ids] = inputs
        if guided:
            ids = torch.cat([ids, torch.full_like(ids, self.config.num_classes)])
        rows = self._placed(
            F.embedding(ids, self.cls_embedding.weight)[:, None], torch.zeros_like(ids)[:, None]
        )
        return Condition(rows, torch.zeros_like(ids))

    def tokens_in(self, cells: Tensor, tokens: Tensor) -> Tensor:
        return self._placed(F.embedding(tokens, self.tok_embeddings.weight), cells + 1)

    def queries_in(self, cells: Tensor) -> Tensor:
        return self._placed(self.mask_embedding.weight, cells + 1)

    def _placed(self, values: Tensor, positions: Tensor) -> Tensor:
        """Rows of ``values [.., dim]`` at ``positions [B, S]``: 0 is the condition's, 1 the first cell's."""
        return self.input_norm(values + F.embedding(positions, self.pos_embedding.weight))

    def logits(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x)).float()


def infer_config(shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> LPDConfig:
    """Read the configuration from tensor shapes.

    Args:
        shapes: name to shape of the checkpoint's tensors.
        heads: attention heads, or None to look the published sizes up.

    Raises:
        KeyError: a tensor that tells the size is missing; the argument is its name.
        ValueError: the head count is needed and not given, or the image is no square.
    """
    vocab_size, dim = shape_of(shapes, "tok_embeddings.weight", 2)
    _, positions, _ = shape_of(shapes, "pos_embedding.weight", 3)
    grid = math.isqrt(positions - 1)
    if grid * grid != positions - 1:
        raise ValueError(f"pos_embed has {positions} rows, which is not one more than the cells of a square")
    layers = count_of(shapes, "layers")
    return LPDConfig(
        layers=layers,
        dim=dim,
        heads=heads_of(heads, PUBLISHED_HEADS, "LPD", layers, dim),
        ffn_dim=shape_of(shapes, "layers.0.feed_forward.w1.weight", 2)[0],
        vocab_size=vocab_size,
        num_classes=shape_of(shapes, "cls_embedding.weight", 2)[0],
        grid=grid,
    )


class LPDFamily(Family):
    name = "lpd"
    title = "LPD"
    cached = False
    grouped = True
    takes = frozenset({ModelOption.HEADS})
    config_type = LPDConfig
    layouts = (
        Layout(
            "the published",
            {
                r"token_emb\.weight": "tok_embeddings.weight",
                r"class_emb\.weight": "cls_embedding.weight",
                r"fake_latent": "null_embedding",
                r"mask_token": "mask_embedding.weight",
                r"pos_embed": "pos_embedding.weight",
                r"z_proj_ln\.(weight|bias)": r"input_norm.\1",
                r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.attention_norm.\2",
                r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.ffn_norm.\2",
                r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"layers.\1.attention.wqkv.\2",
                r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.wo.\2",
                r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"layers.\1.feed_forward.w\2.\3",
                r"norm\.(weight|bias)": r"norm.\1",
                r"head\.weight": "output.weight",
            },
            landmark="token_emb.weight",
        ),
    )

    def configure(self, facts: ModelFacts) -> LPDConfig:
        return infer_config(facts.shapes, facts.heads)

    def build(self, config: LPDConfig) -> LPD:
        return LPD(config)

    def usual_sampling(self, config: LPDConfig) -> SamplingSettings:
        """What the published images of LPD-L are drawn with."""
        return SamplingSettings(guidance=4.8, guidance_schedule=GuidanceSchedule.LINEAR)

    def module_tensors(self, config: LPDConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(parameters)
        classes, null = tensors["cls_embedding.weight"], tensors.pop("null_embedding")
        for name in ("pos_embedding.weight", "mask_embedding.weight"):
            # Their first axis is the batch's.
            tensors[name] = tensors[name].flatten(0, 1)
        if null.shape != (1, classes.shape[1]):
            raise ValueError(f"fake_latent has shape {list(null.shape)}, must be [1, {classes.shape[1]}]")
        tensors["cls_embedding.weight"] = torch.cat([classes, null.to(classes.dtype)])
        return tensors


FAMILY = LPDFamily()
