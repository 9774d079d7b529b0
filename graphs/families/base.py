"""What a family provides, so that the stages can be built around any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class FamilyConfig(Protocol):
    """What the stages need to know of a family's configuration."""

    @property
    def layers(self) -> int: ...
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


class Block(Protocol):
    """One layer, cut at the attention so that every stage can supply its own."""

    def qkv(self, x: Tensor, rope: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (times the softmax scale), rotated keys, and values ``[B, S, heads, D]`` of ``x [B, S, dim]``."""
        ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attention's output ``attended [B, S, heads, D]`` and the rest of the layer to ``x [B, S, dim]``."""
        ...


class RasterTransformer(nn.Module, ABC):
    """A decoder over image tokens in raster order. Axes: B sequences, S positions."""

    config: FamilyConfig

    @abstractmethod
    def blocks(self) -> Iterable[Block]:
        """The layers in order."""

    @abstractmethod
    def guided_classes(self, class_ids: Tensor) -> Tensor:
        """``[2 I]``: ``class_ids [I]``, then the unconditional condition for each."""

    @abstractmethod
    def condition_tokens(self, class_ids: Tensor) -> Tensor:
        """Tokens ``[I, prefix_len]``, behind the vocabulary, by which :meth:`embed` knows the conditions ``class_ids [I]``."""

    @abstractmethod
    def guided_tokens(self, tokens: Tensor) -> Tensor:
        """``[2 I]``: ``tokens [I]``, then what the unconditional rows are fed, which have a condition of their own."""

    @abstractmethod
    def prefix(self, class_ids: Tensor) -> Tensor:
        """Embeddings of the condition, ``[B, prefix_len, dim]``, of ``class_ids [B]``."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of image or condition tokens ``[B, S]``."""

    @abstractmethod
    def rope(self, positions: Tensor) -> Any:
        """Whatever the blocks need to encode ``positions [B, S]`` (of the sequence, the prefix included)."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""
