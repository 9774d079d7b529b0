"""What LlamaGen and LASADGen share: decoders over a square grid of image tokens with two-dimensional rotary embedding."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.base import SquareRaster, raster_faults
from linert.graphs.families.layers import RMSNorm, Rope, rope_tables, swiglu
from linert.graphs.rotary import axial_table
from linert.graphs.transformer import Block, FamilyConfig, RasterTransformer


class AxialConfig(FamilyConfig, Protocol):
    """Sizes of a decoder."""

    @property
    def grid(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def rope_base(self) -> float: ...


class AxialSizes(SquareRaster):
    """What follows from the sizes of a decoder that has as many heads of keys as of queries.

    ``head_multiple``: what the head size is a multiple of; two-dimensional rotary embedding turns pairs of each half.
    """

    head_multiple: ClassVar[int] = 4

    dim: int
    heads: int
    prefix_len: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads

    def faults(self, optional: Collection[str] = ()) -> list[str]:
        """What is wrong with the sizes; those that are ``optional`` may be 0."""
        faults = [
            f"{name} is {value}, must be at least 1"
            for name, value in vars(self).items()
            if isinstance(value, int) and value < (name not in optional)
        ]
        if not faults:
            faults = raster_faults(self.grid, self.grid, self.prefix_len)
        if not faults and self.dim % self.heads:
            faults.append(f"dim {self.dim} is not a multiple of heads {self.heads}")
        elif not faults and self.head_dim % self.head_multiple:
            faults.append(f"head size {self.head_dim} is not a multiple of {self.head_multiple}")
        return faults


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: AxialConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.w1, self.w3, self.w2)


class AxialTransformer(RasterTransformer):
    """The decoder around what its family knows of conditions.

    Args:
        config: its sizes.
        cls_embedding: of conditions.
        blocks: its layers.
        prefix_turned: whether positions before the image have the angle 0; LlamaGen's rotary tables zero them.
    """

    rope_table: Tensor

    def __init__(
        self,
        config: AxialConfig,
        cls_embedding: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        prefix_turned: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = cls_embedding
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        with torch.device("cpu"):
            cos, sin = axial_table(config.grid, config.prefix_len, config.head_dim, config.rope_base)
            if prefix_turned:
                cos[: config.prefix_len] = 1.0
        self.register_buffer("rope_table", rope_tables(cos, sin, config.head_dim), persistent=False)

    def blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.layers)

    def rope(self, positions: Tensor, starts: Tensor) -> Rope:
        """Rotary tables at ``positions [B or 1, S]``. Images begin at one position whatever their padding: ``starts`` plays no part."""
        table = F.embedding(positions, self.rope_table).type_as(self.norm.weight)
        return Rope(*table.chunk(4, dim=-1))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of image tokens ``[B, S]``."""
        return F.embedding(tokens, self.tok_embeddings.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""
        return self.output(self.norm(x)).float()
