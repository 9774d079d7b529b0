"""LASADGen: linear attention with spatial-aware decay in the place of softmax attention (arXiv 2507.01652).

Neither sizes, nor formulas, nor weights of the published model are public. This one follows what its group has published of
such layers: SiLU on queries, keys and values; no denominator; a norm of every head's output; a sigmoid gate of low rank. The
rest mirrors LlamaGen: its sizes, pre-RMSNorm, SwiGLU, two-dimensional rotary embedding, a class vector before the image.

Checkpoints are a folder of ``model.safetensors`` with the names of this module's parameters, and a ``config.json``:
``{"model_type": "lasadgen", "variant": "manhattan", "num_attention_heads": 12, "grid_size": 24}``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.decay_memory import DecayMemory
from linert.graphs.families.axial import AxialSizes, AxialTransformer, FeedForward
from linert.graphs.families.base import Family
from linert.graphs.families.layers import RMSNorm, Rope
from linert.graphs.families.llama import MOST_ROPE_BASE
from linert.graphs.families.model_facts import Layout, ModelFacts, count_of, shape_of
from linert.graphs.families.settings import Settings
from linert.graphs.memory import Memory
from linert.graphs.rotary import rotate_interleaved
from linert.graphs.spatial_decay import Decay, attend, weights
from linert.graphs.stage import Geometry
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Condition, RasterTransformer
from linert.runtime.bundles.sampling_settings import SamplingSettings

MODEL_TYPE = "lasadgen"


class Variant(StrEnum):
    """How the decay counts: ``manhattan`` by true distance in the image; ``signed`` by rows and signed columns; ``raster`` by the
    distance in the sequence; ``none`` not at all. Only the first keeps a matrix for every column."""

    MANHATTAN = "manhattan"
    SIGNED = "signed"
    RASTER = "raster"
    NONE = "none"


SIZES = {
    # layers, dim, heads, ffn_dim, as LlamaGen's
    "B": (12, 768, 12, 2048),
    "L": (24, 1024, 16, 2816),
    "XL": (36, 1280, 20, 3584),
}


@dataclass(frozen=True)
class LASADGenConfig(AxialSizes):
    """Shape of a model and of the image that it draws.

    ``gate_rank``: of the gate's projection.
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    vocab_size: int
    num_classes: int
    grid: int
    variant: Variant
    gate_rank: int = 64
    prefix_len: int = 1
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", Variant(self.variant))
        faults = self.faults()
        if faults:
            raise ValueError("; ".join(faults))

    @staticmethod
    def of_size(size: str, *, grid: int, variant: Variant = Variant.MANHATTAN) -> LASADGenConfig:
        """One of :data:`SIZES`, for ImageNet's classes and LlamaGen's codebook.

        Raises:
            KeyError: no such size.
        """
        layers, dim, heads, ffn_dim = SIZES[size]
        return LASADGenConfig(layers, dim, heads, ffn_dim, 16384, 1000, grid, variant)

    @property
    def matrices(self) -> int:
        """Matrices of a head's state."""
        return self.grid if self.variant is Variant.MANHATTAN else 1

    def memory(self, geometry: Geometry) -> Memory:
        return DecayMemory(geometry, decays, self.matrices)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a checkpoint of this configuration holds."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in LASADGen(self).named_parameters()}

    def settings(self) -> dict[str, Any]:
        """The ``config.json`` of a checkpoint."""
        return {
            "model_type": MODEL_TYPE,
            "variant": str(self.variant),
            "num_attention_heads": self.heads,
            "grid_size": self.grid,
            "rope_theta": self.rope_base,
            "rms_norm_eps": self.norm_eps,
        }


class DecayAttention(nn.Module):
    """Projections around the attention, and its decays.

    ``row_decay``, ``column_decay``: ``[heads]``, logits of the factors from row to row and from column to column. Where halves hold
    them, a factor near 1 keeps more digits than it would have itself.
    """

    row_decay: Tensor
    column_decay: Tensor

    def __init__(self, config: LASADGenConfig) -> None:
        super().__init__()
        self.heads, self.variant = config.heads, config.variant
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.gate_down = nn.Linear(config.dim, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, config.dim, bias=False)
        self.norm = RMSNorm(config.head_dim, config.norm_eps)
        for name, usual in usual_decays(config).items():
            setattr(self, name, nn.Parameter(usual))

    def decay(self) -> Decay:
        """What it has learned, in float32."""
        if self.variant is Variant.NONE:
            nothing = torch.zeros(self.heads)
            return Decay(nothing, nothing, signed=True)
        columns = log_factor(self.column_decay)
        rows = columns if self.variant is Variant.RASTER else log_factor(self.row_decay)
        return Decay(rows, columns, self.variant is not Variant.MANHATTAN)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, both rotated, and values: ``[B, S, H, D]`` of ``x [B, S, dim]``."""
        q, k, v = F.silu(self.qkv(x)).chunk(3, dim=-1)
        q = rotate_interleaved(q, rope.query_cos, rope.query_sin, self.heads)
        k = rotate_interleaved(k, rope.key_cos, rope.key_sin, self.heads)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        return q, k, v

    def gated(self, x: Tensor, attended: Tensor) -> Tensor:
        """``[B, S, dim]`` of what the layer's input ``x [B, S, dim]`` lets through of ``attended [B, S, H, D]``."""
        gate = torch.sigmoid(self.gate_up(self.gate_down(x)))
        return self.wo(self.norm(attended).flatten(-2) * gate)


class Block(nn.Module):
    """One layer, cut at the attention so that every stage can supply its own form."""

    def __init__(self, config: LASADGenConfig) -> None:
        super().__init__()
        self.attention = DecayAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention.gated(self.attention_norm(x), attended)
        return x + self.feed_forward(self.ffn_norm(x))


def log_factor(logits: Tensor) -> Tensor:
    """Logarithms of the factors with these ``logits``, in float32.

    ``logsigmoid`` would be traced as the logarithm of a sigmoid, which is infinite where that underflows.
    """
    return -F.softplus(-logits.float())


def usual_decays(config: LASADGenConfig) -> dict[str, Tensor]:
    """What a layer begins its training with, by parameter: logits ``[heads]``.

    Heads reach from a token and a half to half of the image: half of its rows and columns, or where columns are counted along the
    raster, half of its tokens.
    """
    if config.variant is Variant.NONE:
        return {}
    if config.variant is Variant.MANHATTAN:
        return {"row_decay": _reaching(config.grid, config), "column_decay": _reaching(config.grid, config)}
    rows = {"row_decay": _reaching(config.grid, config)} if config.variant is Variant.SIGNED else {}
    return rows | {"column_decay": _reaching(config.image_tokens, config)}


def _reaching(whole: int, config: LASADGenConfig) -> Tensor:
    """Logits ``[heads]`` of factors that fall to 1/e over distances up to half of ``whole``."""
    factor = torch.exp(-1 / torch.logspace(math.log10(1.5), math.log10(max(2.0, whole / 2)), config.heads))
    return torch.log(factor / (1 - factor))


class LASADGen(AxialTransformer):
    """The transformer, with the pieces that the stages assemble and a parallel form for training and reference."""

    config: LASADGenConfig

    def __init__(self, config: LASADGenConfig) -> None:
        # Linear attention would not see a prefix that is zeroed.
        classes = nn.Embedding(config.num_classes + 1, config.dim)
        super().__init__(config, classes, (Block(config) for _ in range(config.layers)), prefix_turned=True)

    def block(self, block: Any, x: Tensor, rope: Any, visible: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
        at = torch.arange(x.shape[1])
        config = self.config
        weighed = weights(at, at, config.prefix_len, config.grid, block.attention.decay())
        return block.finish(x, attend(q, k, v, weighed.to(q.dtype)).transpose(1, 2))

    def condition_inputs(self, images: int, *, guided: bool) -> list[StageTensor]:
        """Class ids."""
        return [StageTensor("class_ids", torch.int64, (images,))]

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """Class vectors; the last class is the null class of classifier-free guidance."""
        [ids] = inputs
        if guided:
            ids = torch.cat([ids, torch.full_like(ids, self.config.num_classes)])
        return Condition(self.cls_embedding(ids)[:, None], torch.zeros_like(ids))


def decays(model: RasterTransformer) -> Iterable[Decay]:
    """What the layers of a LASADGen have learned."""
    return (cast("Block", block).attention.decay() for block in model.blocks())


def infer_config(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> LASADGenConfig:
    """Read the configuration from tensor shapes and ``config.json``.

    Raises:
        KeyError: a tensor that tells the size is missing; the argument is its name.
        ValueError: a setting is missing or not known.
    """
    config = Settings(settings)
    if config.text("model_type") != MODEL_TYPE:
        raise ValueError(f'there is no config.json with "model_type": "{MODEL_TYPE}" beside it')
    missing = [key for key in ("variant", "num_attention_heads", "grid_size") if key not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    variant = config.text("variant")
    if variant not in list(Variant):
        raise ValueError(f"config.json: variant {reprlib.repr(variant)} is none of {', '.join(Variant)}")
    vocab_size, dim = shape_of(shapes, "tok_embeddings.weight", 2)
    norm_eps, rope_base = config.number("rms_norm_eps", 0, 1), config.number("rope_theta", 1, MOST_ROPE_BASE)
    return LASADGenConfig(
        layers=count_of(shapes, "layers"),
        dim=dim,
        heads=config.integer("num_attention_heads") or 0,
        ffn_dim=shape_of(shapes, "layers.0.feed_forward.w1.weight", 2)[0],
        vocab_size=vocab_size,
        num_classes=shape_of(shapes, "cls_embedding.weight", 2)[0] - 1,
        grid=config.integer("grid_size") or 0,
        variant=Variant(variant),
        gate_rank=shape_of(shapes, "layers.0.attention.gate_down.weight", 2)[0],
        norm_eps=1e-5 if norm_eps is None else norm_eps,
        rope_base=rope_base or 10000.0,
    )


class LASADGenFamily(Family):
    name = "lasadgen"
    title = "LASADGen"
    cached = False
    takes = frozenset()
    config_type = LASADGenConfig
    layouts = (
        Layout(
            "linert's",
            {
                r"((?:tok_embeddings|cls_embedding|norm|output)\.weight)": r"\1",
                r"(layers\..+)": r"\1",
            },
            landmark="layers.0.attention.gate_down.weight",
        ),
    )

    def configure(self, facts: ModelFacts) -> LASADGenConfig:
        return infer_config(facts.shapes, facts.settings)

    def build(self, config: LASADGenConfig) -> LASADGen:
        return LASADGen(config)

    def usual_sampling(self, config: LASADGenConfig) -> SamplingSettings:
        return SamplingSettings(guidance=4.0)


FAMILY = LASADGenFamily()
