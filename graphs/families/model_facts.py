"""What a family makes a configuration of: tensor shapes, ``config.json``, the tokenizer and the options of an export."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from linert.graphs.families.settings import Settings

DERIVED = re.compile(
    r"(?:.+\.)?(?:inv_freq|original_inv_freq|freqs|freqs_cis|freqs_cos|freqs_sin|(?:cos|sin|cos_sin)_cached?|rope_(?:cache|table)"
    r"|position_ids|(?:causal_|attention_|attn_)?mask|masked_bias|tril|triu|[kv]_cache|n_averaged)"
)
"""Buffers that some files carry, by the end of their names: what follows from a model's sizes, and what it remembered last."""


class ModelOption(StrEnum):
    """What a user may say of a model, by the field of the request that says it."""

    GRID = "grid"
    HEADS = "heads"
    SIZE = "size"
    PROMPT_TOKENS = "prompt_tokens"
    TOKENIZER = "tokenizer"
    TEMPLATE = "template"
    TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class Layout:
    """How the files of a family name its tensors.

    ``who``: whose files. ``names``: their names, as patterns, and ours. ``ignored``: patterns of what draws no images.
    ``landmark``: the tensor that the layout is known by.
    """

    who: str
    names: Mapping[str, str]
    landmark: str
    ignored: tuple[str, ...] = ()

    def rename(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Names of a checkpoint to our own, and those that belong to nothing that is known."""
        known, unknown = {}, []
        for name in names:
            for pattern, ours in self.names.items():
                if not DERIVED.fullmatch(name) and (match := re.fullmatch(pattern, name)):
                    known[name] = match.expand(ours)
                    break
            else:
                if not (
                    DERIVED.fullmatch(name) or any(re.fullmatch(pattern, name) for pattern in self.ignored)
                ):
                    unknown.append(name)
        return known, unknown


def shape_of(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that has ``rank`` axes.

    Raises:
        KeyError: there is none of that ``name``, which is the argument.
        ValueError: it has another number of axes, or one of size 0.
    """
    shape = shapes[name]
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}; it must have {rank} axes, none of size 0")
    return shape


def count_of(shapes: Iterable[str], list_name: str) -> int:
    """How many modules a list has, by the names of its tensors: ``layers.0.``, ``layers.1.``, ... without a gap.

    Raises:
        KeyError: there are none.
        ValueError: one is missing, or their numbers are no numbers.
    """
    numbers = {
        name.removeprefix(f"{list_name}.").split(".")[0]
        for name in shapes
        if name.startswith(f"{list_name}.")
    }
    if not numbers:
        raise KeyError(f"{list_name}.0")
    if missing := [str(number) for number in range(len(numbers)) if str(number) not in numbers]:
        others = sorted(numbers - {str(number) for number in range(len(numbers))})
        raise ValueError(
            f"there is no {list_name}.{missing[0]} although there is {list_name}.{others[0][:40]}: tensors are missing, or not this model's"
        )
    return len(numbers)


def heads_of(
    told: int | None, published: Mapping[tuple[int, int], int], title: str, layers: int, dim: int
) -> int:
    """Attention heads of a model whose files do not tell them: as ``told``, or of the ``published`` size of so many layers and that width.

    Raises:
        ValueError: it is no published size, and nothing is told.
    """
    heads = published.get((layers, dim)) if told is None else told
    if heads is None:
        raise ValueError(
            f"{layers} layers of width {dim} are not a published {title} size, and the checkpoint does not hold the number of attention "
            "heads: give it with --heads"
        )
    return heads


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a checkpoint when its configuration is made.

    Args:
        shapes: name to shape of its tensors, by our names.
        settings: its ``config.json``; empty if there is none.
        processing: the ``processor_config.json`` and ``tokenizer_config.json`` beside it, joined.
        vocabulary: ids of its tokenizer's tokens by name; empty if it has none.
        grid, heads, prefix_len: what a user says of the model; None leaves them open.
        side: pixels along the side of the images, as far as the file's name tells.
        training: arguments that it was trained with, as far as the file has them.
        buffers: name to shape of what the file holds beside parameters (:data:`DERIVED`).
        size: width and height of the images in pixels, as a user asks for.
        patch: pixels along the side of a token.
    """

    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    processing: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    grid: int | None = None
    heads: int | None = None
    prefix_len: int | None = None
    side: int | None = None
    size: tuple[int, int] | None = None
    patch: int = 16
    training: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def config(self) -> Settings:
        """``config.json``, to be read with types and bounds."""
        return Settings(self.settings)

    def shape(self, name: str, rank: int = 2) -> tuple[int, ...]:
        """:func:`shape_of` a tensor."""
        return shape_of(self.shapes, name, rank)

    def layers(self) -> int:
        """Number of layers; see :func:`count_of` for the errors."""
        return count_of(self.shapes, "layers")

    def named(self, key: str) -> str:
        """A special token's name, as the tokenizer's settings have it under ``key``; empty if they do not.

        Raises:
            ValueError: they have something else.
        """
        token = self.processing.get(key)
        name = token.get("content") if isinstance(token, Mapping) else token
        if name is not None and not isinstance(name, str):
            raise ValueError(
                f"the tokenizer's settings: {key} is {reprlib.repr(token)}, must be a token's name"
            )
        return name or ""

    def token(self, *names: str) -> int:
        """The id of the first of ``names`` that the vocabulary has; empty ones are left out.

        Raises:
            ValueError: it has none.
        """
        wanted = list(dict.fromkeys(name for name in names if name))
        for name in wanted:
            if name in self.vocabulary:
                return self.vocabulary[name]
        raise ValueError(f"the tokenizer has no special token {' or '.join(wanted)}: it is not this model's")
