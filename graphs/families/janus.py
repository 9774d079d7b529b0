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

from graphs.families.base import (
    Condition,
    Family,
    Given,
    KeyValueCache,
    Layout,
    PromptFormat,
    SquareRaster,
    UsualSampling,
    unless_given,
)
from graphs.families.llama import LlamaBlock, PromptedLlama, rope_base

GRID = 24
"""Tokens in an image row of every published size (384 px, patch 16)."""

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
        if self.dim % self.heads or self.heads % self.kv_heads:
            faults.append(f"{self.heads} heads, {self.kv_heads} of keys, do not divide a width of {self.dim}")
        if ids := [
            number
            for number in (self.begin_of_sentence, self.begin_of_image, self.padding)
            if not 0 <= number < self.text_vocab_size
        ]:
            faults.append(f"token {ids[0]} is outside a vocabulary of {self.text_vocab_size}")
        if min(self.layers, self.prefix_len, self.grid) < 1:
            faults.append("layers, prefix_len and grid must be at least 1")
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
    """The table ``[V, dim]`` that ``gen_embed`` and ``gen_aligner`` are, as a function of the token alone."""
    x = tensors["gen_embed.weight"].float()
    x = F.linear(x, tensors["gen_aligner.0.weight"].float(), tensors["gen_aligner.0.bias"].float())
    return F.linear(F.gelu(x), tensors["gen_aligner.1.weight"].float(), tensors["gen_aligner.1.bias"].float())


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
            other, other_starts = unless_given(torch.where(kept, tokens, config.padding), starts, negative)
            tokens, starts = torch.cat([tokens, other]), torch.cat([starts, other_starts])
        return Condition(self.text_embedding(tokens), starts)


class JanusFamily(Family):
    name = "janus"
    title = "Janus"
    reads_prompts = True
    config_type = JanusConfig
    layouts = (ORIGINAL, TRANSFORMERS)

    def configure(self, given: Given) -> JanusConfig:
        text = given.settings.get("language_config") or given.settings.get("text_config") or {}
        layers, dim = given.layers(), given.shapes["norm.weight"][0]
        heads = given.heads or text.get("num_attention_heads") or PUBLISHED_HEADS.get((layers, dim))
        if heads is None:
            raise ValueError(
                f"{layers} layers of width {dim} are not a published size of Janus, and there is no config.json that tells the "
                "number of attention heads: give it with --heads"
            )
        # What config.json leaves out is as in transformers' LlamaConfig.
        drawn = (given.settings.get("vision_config") or {}).get("num_image_tokens", GRID * GRID)
        return JanusConfig(
            layers=layers,
            dim=dim,
            heads=heads,
            kv_heads=given.shapes["layers.0.self_attn.k_proj.weight"][0] * heads // dim,
            ffn_dim=given.shapes["layers.0.mlp.gate_proj.weight"][0],
            vocab_size=given.shapes["head.vision_head.weight"][0],
            text_vocab_size=given.shapes["text_embedding.weight"][0],
            prefix_len=given.prefix_len or PREFIX_LEN,
            begin_of_sentence=given.token(given.named("bos_token"), BEGIN_OF_SENTENCE),
            begin_of_image=given.token(given.named("image_start_tag"), BEGIN_OF_IMAGE),
            padding=given.token(given.named("pad_tag"), PADDING, given.named("pad_token")),
            grid=given.grid or math.isqrt(drawn),
            norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_base=rope_base(text),
        )

    def build(self, config: JanusConfig) -> Janus:
        return Janus(config)

    def usual_sampling(self, config: JanusConfig) -> UsualSampling:
        return UsualSampling(5.0)

    def module_tensors(self, config: JanusConfig, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded = {"image_embedding.weight": fold_image_embedding(found)}
        return folded | {
            name: tensor
            for name, tensor in found.items()
            if not name.startswith(("gen_embed.", "gen_aligner."))
        }

    def prompt_format(self, config: JanusConfig, given: Given) -> PromptFormat:
        old = given.processing.get("sft_format") == "deepseek_old"
        user, assistant = ("User", "Assistant") if old else ("<|User|>", "<|Assistant|>")
        template = f"{user}: {{prompt}}\n\n{assistant}:"
        return PromptFormat((config.begin_of_sentence,), template, (config.begin_of_image,))


FAMILY = JanusFamily()
