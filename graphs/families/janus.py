"""Janus and Janus-Pro (arXiv 2501.17811; deepseek-ai/Janus, code MIT): text to image.

A Llama decoder over text and VQ tokens in raster order: pre-RMSNorm, attention without biases, SwiGLU, one-dimensional rotary
embedding of halves. Image tokens have an embedding and a head of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.base import (
    MOST_LINES,
    Family,
    PromptFormat,
    SquareRaster,
    negative_or_usual,
    raster_faults,
)
from linert.graphs.families.llama import (
    LlamaBlock,
    PromptedLlama,
    check_positions,
    decoder_sizes,
    norm_eps,
    rope_base,
)
from linert.graphs.families.model_facts import Layout, ModelFacts, ModelOption, shape_of
from linert.graphs.line_buffer import KeyValueCache
from linert.graphs.transformer import Condition
from linert.runtime.bundles.sampling_settings import SamplingSettings

GRID = 24
"""Tokens in a line of every published size (384 px, patch 16)."""

PREFIX_LEN = 128
"""Longest prompt, in tokens, unless another is asked for."""

# Full-width bars, as DeepSeek's tokenizers have them.
BEGIN_OF_SENTENCE = "<\uff5cbegin▁of▁sentence\uff5c>"
PADDING = "<\uff5c▁pad▁\uff5c>"
BEGIN_OF_IMAGE = "<begin_of_image>"

PUBLISHED_HEADS = {(24, 2048): 16, (30, 4096): 32}
"""Attention heads by layers and width: the tensors do not tell them."""

ORIGINAL = Layout(
    "deepseek-ai's",
    {
        r"language_model\.model\.embed_tokens\.weight": "text_embedding.weight",
        r"language_model\.model\.(layers\.\d+\..+|norm\.weight)": r"\1",
        r"gen_embed\.weight": "gen_embed.weight",
        r"gen_aligner\.layers\.0\.(weight|bias)": r"gen_aligner.0.\1",
        r"gen_aligner\.layers\.2\.(weight|bias)": r"gen_aligner.1.\1",
        r"gen_head\.output_mlp_projector\.(weight|bias)": r"head.proj.\1",
        r"gen_head\.vision_head\.(weight|bias)": r"head.vision_head.\1",
    },
    landmark="gen_embed.weight",
    ignored=(r"(vision_model|aligner|gen_vision_model)\..+", r"language_model\.lm_head\.weight"),
)
"""``gen_embed`` and ``gen_aligner`` are folded into a table."""

TRANSFORMERS = Layout(
    "transformers'",
    {
        r"model\.language_model\.embed_tokens\.weight": "text_embedding.weight",
        r"model\.language_model\.(layers\.\d+\..+|norm\.weight)": r"\1",
        r"model\.generation_embeddings\.weight": "gen_embed.weight",
        r"model\.generation_aligner\.fc1\.(weight|bias)": r"gen_aligner.0.\1",
        r"model\.generation_aligner\.hidden_layers\.0\.(weight|bias)": r"gen_aligner.1.\1",
        r"model\.generation_head\.proj_out\.(weight|bias)": r"head.proj.\1",
        r"model\.generation_head\.vision_head\.(weight|bias)": r"head.vision_head.\1",
    },
    landmark="model.generation_embeddings.weight",
    ignored=(r"model\.(vision_model|aligner|vqmodel)\..+", r"lm_head\.weight"),
)
"""The same of ``JanusForConditionalGeneration``."""


@dataclass(frozen=True)
class JanusConfig(SquareRaster, KeyValueCache):
    """Shape of a Janus model.

    ``vocab_size``: image tokens. ``text_vocab_size``: those of prompts. ``prefix_len``: longest prompt. ``begin_of_sentence``,
    ``begin_of_image``, ``padding``: ids of the tokenizer's special tokens.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    text_vocab_size: int
    prefix_len: int
    begin_of_sentence: int
    begin_of_image: int
    padding: int
    grid: int = GRID
    norm_eps: float = 1e-6
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        faults = []
        if min(self.heads, self.kv_heads) < 1 or self.dim % self.heads or self.heads % self.kv_heads:
            faults.append(f"{self.heads} heads, {self.kv_heads} of keys, do not divide a width of {self.dim}")
        elif self.head_dim % 2:
            faults.append(f"head size {self.head_dim} is odd, and numbers are turned in pairs")
        if ids := [
            number
            for number in (self.begin_of_sentence, self.begin_of_image, self.padding)
            if not 0 <= number < self.text_vocab_size
        ]:
            faults.append(f"token {ids[0]} is outside a vocabulary of {self.text_vocab_size}")
        if self.layers < 1:
            faults.append("there must be a layer at least")
        faults += raster_faults(self.grid, self.grid, self.prefix_len)
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the module."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in Janus(self).named_parameters()}


def fold_image_embedding(tensors: Mapping[str, Tensor]) -> Tensor:
    """The table ``[V, dim]`` that ``gen_embed`` and ``gen_aligner`` are, as a function of the token alone.

    Raises:
        KeyError: one is missing; the argument is its name.
        ValueError: their shapes do not fit.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _, width = shape_of(shapes, "gen_embed.weight", 2)
    dim, _ = shape_of(shapes, "gen_aligner.1.weight", 2)
    for name, wanted in (
        ("gen_aligner.0.weight", (dim, width)),
        ("gen_aligner.0.bias", (dim,)),
        ("gen_aligner.1.weight", (dim, dim)),
        ("gen_aligner.1.bias", (dim,)),
    ):
        if shapes[name] != wanted:
            raise ValueError(f"{name} has shape {list(shapes[name])}, not {list(wanted)}")
    x = tensors["gen_embed.weight"].float()
    x = F.linear(x, tensors["gen_aligner.0.weight"].float(), tensors["gen_aligner.0.bias"].float())
    return F.linear(F.gelu(x), tensors["gen_aligner.1.weight"].float(), tensors["gen_aligner.1.bias"].float())


def told_grids(facts: ModelFacts) -> dict[str, int]:
    """Tokens in a line by where ``config.json`` tells them.

    Raises:
        ValueError: it tells a number of tokens that is no square, or a size that is no whole number of tokens.
    """
    vision, told = facts.config.section("vision_config"), {}
    if tokens := vision.integer("num_image_tokens", 1, MOST_LINES**2):
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(vision.fault("num_image_tokens", "the tokens of a square"))
        told["vision_config.num_image_tokens"] = math.isqrt(tokens)
    if rows := facts.config.section("vq_config").integer("num_patches", 1, MOST_LINES):
        told["vq_config.num_patches"] = rows
    for where in (vision, vision.section("params")):
        if side := where.integer("image_size"):
            if side % facts.patch:
                raise ValueError(
                    where.fault("image_size", f"a multiple of the {facts.patch} pixels of a token")
                )
            told["vision_config.image_size"] = side // facts.patch
    return told


class Head(nn.Module):
    """Image tokens' head: ``vision_head(gelu(proj x))``, with biases and the exact GELU."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.dim, config.dim)
        self.vision_head = nn.Linear(config.dim, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.proj(x)))


class Janus(PromptedLlama):
    """The transformer and what draws images with it; vision, and the head of text, stay in the checkpoint."""

    config: JanusConfig

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config, (LlamaBlock(config) for _ in range(config.layers)), config.vocab_size)
        self.head = Head(config)

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """Embedded prompts. Unconditional ones are of the same length, with padding for all but the tokens that begin a sentence
        and an image; it is seen like any other token."""
        tokens, starts, *negative = inputs
        if guided:
            config = self.config
            kept = (tokens == config.begin_of_sentence) | (tokens == config.begin_of_image)
            other, other_starts = negative_or_usual(
                torch.where(kept, tokens, config.padding), starts, negative
            )
            tokens, starts = torch.cat([tokens, other]), torch.cat([starts, other_starts])
        return Condition(self.text_embedding(tokens), starts)


class JanusFamily(Family):
    name = "janus"
    title = "Janus"
    reads_prompts = True
    takes = frozenset(
        {
            ModelOption.GRID,
            ModelOption.HEADS,
            ModelOption.PROMPT_TOKENS,
            ModelOption.TOKENIZER,
            ModelOption.TEMPLATE,
        }
    )
    config_type = JanusConfig
    layouts = (ORIGINAL, TRANSFORMERS)

    def configure(self, facts: ModelFacts) -> JanusConfig:
        text = facts.config.section("language_config", "text_config")
        sizes = decoder_sizes(facts, facts.shape("norm.weight", 1)[0], text, PUBLISHED_HEADS, self.title)
        vocab_size, _ = facts.shape("head.vision_head.weight")
        text_vocab_size, _ = facts.shape("text_embedding.weight")
        # What config.json leaves out is as in transformers' LlamaConfig.
        config = JanusConfig(
            **sizes._asdict(),
            vocab_size=vocab_size,
            text_vocab_size=text_vocab_size,
            prefix_len=PREFIX_LEN if facts.prefix_len is None else facts.prefix_len,
            begin_of_sentence=facts.token(facts.named("bos_token"), BEGIN_OF_SENTENCE),
            begin_of_image=facts.token(facts.named("image_start_tag"), BEGIN_OF_IMAGE),
            padding=facts.token(facts.named("pad_tag"), PADDING, facts.named("pad_token")),
            grid=self._grid(facts),
            norm_eps=norm_eps(text, 1e-6),
            rope_base=rope_base(text),
        )
        check_positions(config, text, "give less --prompt-tokens")
        return config

    def _grid(self, facts: ModelFacts) -> int:
        """Tokens in a line: as the files say, else as asked for, else as in every published size.

        Raises:
            ValueError: the files contradict each other or what is asked for.
        """
        told = told_grids(facts)
        if facts.grid is not None and (not told or facts.grid in told.values()):
            return facts.grid
        shown = ", ".join(f"{grid} by {where}" for where, grid in told.items())
        if facts.grid is not None:
            raise ValueError(
                f"an image row has {shown} tokens, and --grid {facts.grid} is asked for: leave it out"
            )
        if len(set(told.values())) > 1:
            raise ValueError(f"an image row has {shown} tokens: say which with --grid")
        return next(iter(told.values()), GRID)

    def build(self, config: JanusConfig) -> Janus:
        return Janus(config)

    def usual_sampling(self, config: JanusConfig) -> SamplingSettings:
        return SamplingSettings(guidance=5.0)

    def module_tensors(self, config: JanusConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded = {"image_embedding.weight": fold_image_embedding(parameters)}
        return folded | {
            name: tensor
            for name, tensor in parameters.items()
            if not name.startswith(("gen_embed.", "gen_aligner."))
        }

    def prompt_format(self, config: JanusConfig, facts: ModelFacts) -> PromptFormat:
        old = facts.processing.get("sft_format") == "deepseek_old"
        user, assistant = ("User", "Assistant") if old else ("<|User|>", "<|Assistant|>")
        if not old:
            # A tokenizer without them would read their names as text.
            facts.token(user)
            facts.token(assistant)
        template = f"{user}: {{prompt}}\n\n{assistant}:"
        return PromptFormat((config.begin_of_sentence,), template, (config.begin_of_image,))


FAMILY = JanusFamily()
