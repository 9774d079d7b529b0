"""What a family provides, so that the stages can be built around any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.families.given import Given, Layout, ModelOption
from graphs.line_buffer import LineBuffer
from graphs.memory import Memory
from graphs.stage import Geometry
from graphs.tensor_spec import TensorSpec

MOST_LINES = 512
"""Lines of an image, and tokens in one: four times as many as were ever measured. What is larger is taken for a slip."""

MOST_PROMPT = 1 << 16
"""Tokens of a prompt, likewise."""


def raster_faults(lines: int, columns: int, prefix_len: int) -> list[str]:
    """What is wrong with an image of so many ``lines`` of so many tokens behind ``prefix_len`` positions."""
    found = []
    if not 1 <= min(lines, columns) <= max(lines, columns) <= MOST_LINES:
        found.append(f"an image of {lines} lines of {columns} tokens; must be 1 to {MOST_LINES} of each")
    if not 1 <= prefix_len <= MOST_PROMPT:
        found.append(f"prompts of {prefix_len} tokens; must be 1 to {MOST_PROMPT}")
    return found


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

    def memory(self, geometry: Geometry) -> Memory:
        """What the layers keep between steps."""
        ...


class KeyValueCache:
    """Of models whose layers keep keys and values."""

    def memory(self, geometry: Geometry) -> Memory:
        return LineBuffer(geometry)


class SquareRaster:
    """The raster of models that draw ``grid`` lines of ``grid`` tokens."""

    grid: int

    @property
    def line_width(self) -> int:
        return self.grid

    @property
    def lines(self) -> int:
        return self.grid

    @property
    def image_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def newline_token(self) -> int | None:
        return None


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


def prompt_inputs(images: int, prefix_len: int, *, guided: bool) -> list[TensorSpec]:
    """Token ids of prompts, padded on the left with anything, and the padding of each; where guided, of negative prompts as well,
    whose padding is -1 where there is none."""
    kinds = ("prompt", "negative") if guided else ("prompt",)
    return [
        spec
        for kind in kinds
        for spec in (
            TensorSpec(f"{kind}_tokens", torch.int64, (images, prefix_len)),
            TensorSpec(f"{kind}_starts", torch.int64, (images,)),
        )
    ]


def unless_given(usual: Tensor, usual_starts: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The unconditional sequences ``[I, T, ...]`` and their padding ``[I]``: the ``given`` ones where their padding is no -1."""
    values, starts = given
    taken = starts >= 0
    shaped = taken.reshape(-1, *[1] * (usual.ndim - 1))
    return torch.where(shaped, values, usual), torch.where(taken, starts, usual_starts)


class RasterTransformer(nn.Module, ABC):
    """A decoder over image tokens in raster order. Axes: B sequences, S positions."""

    config: FamilyConfig

    @abstractmethod
    def blocks(self) -> Iterable[Block]:
        """The layers in order."""

    @abstractmethod
    def condition_inputs(self, images: int, *, guided: bool) -> list[TensorSpec]:
        """What a batch of images is conditioned on, as the prefill stage takes it."""

    @abstractmethod
    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """What the sequences see before their images.

        Args:
            inputs: as :meth:`condition_inputs` says.
            guided: whether the unconditional sequences follow the conditional ones.
        """

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, S, dim]`` of image tokens ``[B, S]``."""

    @abstractmethod
    def rope(self, positions: Tensor, starts: Tensor) -> Any:
        """Whatever the blocks need to encode ``positions [B or 1, S]`` (the prefix and its padding included).

        ``starts``: as in :class:`Condition`.
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab_size]`` of the residual stream ``x [..., dim]``."""

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

    def block(self, block: Block, x: Tensor, rope: Any, visible: Tensor) -> Tensor:
        """One of :meth:`blocks` over whole sequences ``x [B, S, dim]`` that see ``visible [B, S, S]``."""
        q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible[:, None], scale=1.0, enable_gqa=True
        )
        return block.finish(x, attended.transpose(1, 2))


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: ``embedding``, ``output``, or its layer's number."""
    first, *rest = name.split(".")
    if first == "layers":
        return rest[0]
    return "embedding" if first.endswith(("embedding", "embeddings")) else "output"


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes tokens: ids, the tokens of ``template`` with the prompt in place of ``{prompt}``, ids.

    ``stripped``: white space around the prompt goes.
    """

    first: tuple[int, ...]
    template: str
    last: tuple[int, ...]
    stripped: bool = True


@dataclass(frozen=True)
class UsualSampling:
    """How a family's images are usually drawn."""

    guidance: float
    top_k: int = 0


class Family(ABC):
    """A kind of model: how its files are read, and how it is asked for images.

    ``name``: in the manifest. ``title``: for people. ``reads_prompts``: needs a tokenizer. ``cached``: its layers
    keep keys and values, for which there are policies. ``takes``: what may be said of its models when they are exported.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads_prompts: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    takes: ClassVar[frozenset[ModelOption]]
    layouts: ClassVar[tuple[Layout, ...]]
    config_type: ClassVar[type[Any]]

    @abstractmethod
    def configure(self, given: Given) -> Any:
        """The configuration.

        Raises:
            KeyError: a tensor that tells the size is missing; the argument is its name.
            ValueError: something is not known, or contradicts something else; the message says what to do.
        """

    @abstractmethod
    def build(self, config: Any) -> RasterTransformer:
        """The module, on whatever is torch's device."""

    @abstractmethod
    def usual_sampling(self, config: Any) -> UsualSampling:
        """What the authors recommend."""

    def module_tensors(self, config: Any, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters of those that the checkpoint has, by our names.

        Raises:
            KeyError: one is missing; the argument is its name.
        """
        return dict(found)

    def remarks(self, config: Any, given: Given) -> list[str]:
        """What a user should know of how the configuration was made."""
        return []

    def caption_dim(self, config: Any) -> int:
        """Width of the features of captions that the model sees; 0 if it sees none."""
        return 0

    def prompt_format(self, config: Any, given: Given) -> PromptFormat | None:
        """How prompts become tokens; None for a model that reads none."""
        return None

    def code_order(self, given: Given) -> list[int] | None:
        """The codebook's row of every image token; None where they are numbered alike.

        Raises:
            ValueError: it is not known.
        """
        return None
