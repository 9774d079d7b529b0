"""A transformer over image tokens in raster order, as the stages see it: its sizes, its layers, what it is conditioned on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.stage_tensor import StageTensor


class FamilyConfig(Protocol):
    """What the stages need to know of a family's configuration."""

    @property
    def layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def prefix_len(self) -> int: ...
    @property
    def line_width(self) -> int: ...
    @property
    def lines(self) -> int: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def newline_token(self) -> int | None:
        """The token that ends every line and is no part of the picture; it is never drawn but forced."""
        ...


class Block(Protocol):
    """One layer, cut at the attention so that every stage can supply its own."""

    def qkv(self, x: Tensor, rope: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (times the softmax scale), rotated keys, and values ``[B, S, heads, D]`` of ``x [B, S, dim]``."""
        ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attention's output ``attended [B, S, heads, D]`` and the rest of the layer to ``x [B, S, dim]``."""
        ...


class Condition(NamedTuple):
    """What B sequences see before their images.

    ``embeddings``: ``[B, T, dim]``. ``starts``: ``[B]`` int64, how many of the T positions are padding, which nothing else
    sees; they come first, so that all images begin at position T.
    """

    embeddings: Tensor
    starts: Tensor

    def visible(self, positions: int) -> Tensor:
        """Which of so many ``positions`` each sees in a causal pass: ``[B, positions, positions]`` bool; padding sees itself."""
        at = torch.arange(positions)
        causal = (at <= at[:, None]) & (at >= self.starts[:, None, None])
        return causal | (at == at[:, None])


class Transformer(nn.Module, ABC):
    """What the transformers of all families have, in whatever order they draw. Axes: B sequences, S positions."""

    config: FamilyConfig

    @abstractmethod
    def blocks(self) -> Iterable[Block]:
        """The layers in order."""

    @abstractmethod
    def condition_inputs(self, images: int, *, guided: bool) -> list[StageTensor]:
        """What a batch of images is conditioned on, as the prefill stage takes it."""

    @abstractmethod
    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """What the sequences see before their images.

        Args:
            inputs: as :meth:`condition_inputs` says.
            guided: whether the unconditional sequences follow the conditional ones.
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""

    def block(self, block: Block, x: Tensor, rope: Any, visible: Tensor) -> Tensor:
        """One of :meth:`blocks` over whole sequences ``x [B, S, dim]`` that see ``visible [B or 1, S, S]``."""
        q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible[:, None], scale=1.0, enable_gqa=True
        )
        return block.finish(x, attended.transpose(1, 2))


class RasterTransformer(Transformer):
    """A decoder over image tokens in raster order."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of image tokens ``[B, S]``."""

    @abstractmethod
    def rope(self, positions: Tensor, starts: Tensor) -> Any:
        """Whatever the blocks need to encode ``positions [B or 1, S]`` (the prefix and its padding included).

        ``starts``: as in :class:`Condition`.
        """

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Parallel causal pass with nothing evicted: the full-cache model.

        Args:
            condition: of B sequences.
            tokens: ``[B, S]`` int64 image tokens, S < image_tokens.

        Returns:
            ``[B, S + 1, vocab_size]`` float32: row i is the prediction of image token i.
        """
        x = torch.cat([condition.embeddings, self.embed(tokens)], dim=1)
        rope = self.rope(torch.arange(x.shape[1])[None], condition.starts)
        visible = condition.visible(x.shape[1])
        for block in self.blocks():
            x = self.block(block, x, rope, visible)
        return self.logits(x[:, self.config.prefix_len - 1 :])


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: ``embedding``, ``output``, or its layer's number."""
    first, *rest = name.split(".")
    if first == "layers":
        return rest[0]
    return "embedding" if first.endswith(("embedding", "embeddings")) else "output"
