"""Lumina-mGPT (arXiv 2408.02657; Alpha-VLLM/Lumina-mGPT), a Chameleon (arXiv 2405.09818) that draws images of many sizes.

A Llama decoder over one vocabulary of text and image tokens, whose queries and keys pass a layer norm a head. Every line of an
image ends in a newline token. Image tokens are numbered here from 0, in the order of their ids; the newline comes behind them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families.base import Family, PromptFormat, negative_or_usual, raster_faults
from linert.graphs.families.layers import Rope
from linert.graphs.families.llama import (
    DecoderSizes,
    LlamaAttention,
    LlamaBlock,
    PromptedLlama,
    check_positions,
    decoder_sizes,
    norm_eps,
    rope_base,
)
from linert.graphs.families.model_facts import Layout, ModelFacts, ModelOption
from linert.graphs.line_buffer import KeyValueCache
from linert.graphs.transformer import Condition
from linert.runtime.bundles.sampling_settings import SamplingSettings

PREFIX_LEN = 128
"""Longest prompt, in tokens, unless another is asked for."""

PUBLISHED_HEADS = {(32, 4096): 32, (48, 8192): 64}
"""Attention heads by layers and width: the tensors do not tell them."""

PUBLISHED_SWIN_NORM = ((48, 8192),)
"""Layers and width of what has its norms behind each half of a layer, which the tensors do not tell either."""

BEGIN_OF_SENTENCE = "<s>"
BEGIN_OF_IMAGE = "<racm3:break>"
NEWLINE = "<reserved08799>"
END_OF_TURN = "<reserved08706>"
IMAGE_TOKEN = re.compile("IMGIMG([A-J]+)Z")
"""Names of image tokens: letters are the digits of the codebook's row."""

SIZE_UNIT = 32
"""Pixels that a size token counts in."""

UNCONDITIONAL = 3
"""What an unconditional sequence begins with: the last tokens of a prompt, which begin the image and tell its size."""

MOST_ASPECT = 4


def size_token(units: int) -> str:
    """Name of the token that stands for a side of so many times 32 pixels."""
    return f"<reserved{8800 + units:05d}>"


def sizes(side: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels that a model made for squares of ``side`` was trained on: the largest areas, and sides that
    differ by a factor of 4 at most. It draws smaller ones as well."""
    units = side // SIZE_UNIT
    most = units * units
    return [
        (width * SIZE_UNIT, height * SIZE_UNIT)
        for width in range(most, 0, -1)
        # One step of the side less leaves room that a taller image would take.
        for height in range(max(1, most // (width + 1)), most // width + 1)
        if max(width, height) <= MOST_ASPECT * min(width, height)
    ]


@dataclass(frozen=True)
class LuminaConfig(KeyValueCache):
    """Shape of a Lumina-mGPT model and of the image that it draws.

    ``vocab_size``: image tokens, whose ids begin with ``first_image_token``. ``newline_id``: the id of the newline.
    ``text_vocab_size``: all tokens. ``rows``, ``columns``: of the picture. ``prefix_len``: longest prompt. ``swin_norm``: norms come
    behind each half of a layer, not before it.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    first_image_token: int
    newline_id: int
    text_vocab_size: int
    prefix_len: int
    rows: int
    columns: int
    swin_norm: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        faults = []
        if min(self.heads, self.kv_heads) < 1 or self.dim % self.heads or self.heads % self.kv_heads:
            faults.append(f"{self.heads} heads, {self.kv_heads} of keys, do not divide a width of {self.dim}")
        elif self.head_dim % 2:
            faults.append(f"head size {self.head_dim} is odd, and numbers are turned in pairs")
        if max(self.first_image_token + self.vocab_size - 1, self.newline_id) >= self.text_vocab_size:
            faults.append(f"image tokens or the newline are outside a vocabulary of {self.text_vocab_size}")
        if self.prefix_len < UNCONDITIONAL or self.layers < 1:
            faults.append(f"there must be a layer at least, and prompts of {UNCONDITIONAL} tokens")
        faults += raster_faults(self.rows, self.columns, self.prefix_len)
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def line_width(self) -> int:
        return self.columns + 1

    @property
    def lines(self) -> int:
        return self.rows

    @property
    def image_tokens(self) -> int:
        return self.lines * self.line_width

    @property
    def newline_token(self) -> int | None:
        return self.vocab_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the module."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in Lumina(self).named_parameters()}


class HeadNorm(nn.Module):
    """Layer norm of every head by itself, with weights and biases of its own ``[heads * D]``."""

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = heads, head_dim, eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.unflatten(-1, (self.heads, -1)), (self.head_dim,), eps=self.eps)
        return normed.flatten(-2) * self.weight + self.bias


class Attention(LlamaAttention):
    def __init__(self, config: LuminaConfig) -> None:
        super().__init__(config)
        self.q_norm = HeadNorm(config.heads, config.head_dim)
        self.k_norm = HeadNorm(config.kv_heads, config.head_dim)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class SwinBlock(LlamaBlock):
    """One layer, normalised behind each half."""

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(x, rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.input_layernorm(self.self_attn.o_proj(attended.flatten(-2)))
        return x + self.post_attention_layernorm(self.mlp(x))


class Lumina(PromptedLlama):
    """The transformer: the head and the embedding of what images are made of, and the embedding of all tokens for prompts."""

    config: LuminaConfig

    def __init__(self, config: LuminaConfig) -> None:
        kind = SwinBlock if config.swin_norm else LlamaBlock
        blocks = (kind(config, Attention(config)) for _ in range(config.layers))
        # The last row is the newline's.
        super().__init__(config, blocks, config.vocab_size + 1)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def condition(self, inputs: Sequence[Tensor], *, guided: bool) -> Condition:
        """Embedded prompts. Unconditional sequences have what begins the image alone, at positions of their own."""
        tokens, starts, *negative = inputs
        if guided:
            short = torch.full_like(starts, self.config.prefix_len - UNCONDITIONAL)
            other, other_starts = negative_or_usual(tokens, short, negative)
            tokens, starts = torch.cat([tokens, other]), torch.cat([starts, other_starts])
        return Condition(self.text_embedding(tokens), starts)


class LuminaFamily(Family):
    name = "lumina"
    title = "Lumina-mGPT"
    reads_prompts = True
    takes = frozenset(
        {
            ModelOption.SIZE,
            ModelOption.HEADS,
            ModelOption.PROMPT_TOKENS,
            ModelOption.TOKENIZER,
            ModelOption.TEMPLATE,
        }
    )
    config_type = LuminaConfig
    layouts = (
        Layout(
            "Alpha-VLLM's or transformers' Chameleon",
            {
                r"model\.embed_tokens\.weight": "embed_tokens.weight",
                r"model\.(layers\.\d+\..+|norm\.weight)": r"\1",
                r"lm_head\.weight": "lm_head.weight",
            },
            landmark="model.layers.0.self_attn.q_norm.bias",
            ignored=(r"model\.vqmodel\..+",),
        ),
    )

    def configure(self, facts: ModelFacts) -> LuminaConfig:
        settings = facts.config
        text_vocab_size, dim = facts.shape("embed_tokens.weight")
        sizes = decoder_sizes(facts, dim, settings, PUBLISHED_HEADS, self.title)
        width, height = self._size(facts)
        images = sorted(number for name, number in facts.vocabulary.items() if IMAGE_TOKEN.fullmatch(name))
        if not images or images != list(range(images[0], images[0] + len(images))):
            raise ValueError(
                "there is no vocabulary map that tells which code an image token stands for: neither under vocabulary_map in "
                "config.json nor in a tokenizer are there tokens IMGIMG...Z; give the tokenizer.json of Lumina-mGPT-7B-768, or "
                "text_tokenizer.json of Chameleon, with --tokenizer"
            )
        config = LuminaConfig(
            **sizes._asdict(),
            vocab_size=len(images),
            first_image_token=images[0],
            newline_id=facts.token(NEWLINE),
            text_vocab_size=text_vocab_size,
            prefix_len=PREFIX_LEN if facts.prefix_len is None else facts.prefix_len,
            rows=height // facts.patch,
            columns=width // facts.patch,
            swin_norm=self._swin_norm(facts, sizes),
            norm_eps=norm_eps(settings, 1e-5),
            rope_base=rope_base(settings),
        )
        check_positions(config, settings, "give a smaller --size or less --prompt-tokens")
        return config

    @staticmethod
    def _swin_norm(facts: ModelFacts, sizes: DecoderSizes) -> bool:
        told = facts.config.flag("swin_norm")
        return (sizes.layers, sizes.dim) in PUBLISHED_SWIN_NORM if told is None else told

    def build(self, config: LuminaConfig) -> Lumina:
        return Lumina(config)

    def usual_sampling(self, config: LuminaConfig) -> SamplingSettings:
        return SamplingSettings(guidance=4.0, top_k=2000)

    def module_tensors(self, config: LuminaConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = slice(config.first_image_token, config.first_image_token + config.vocab_size)
        table = parameters["embed_tokens.weight"]
        tensors = {
            "text_embedding.weight": table,
            "image_embedding.weight": torch.cat([table[images], table[config.newline_id][None]]),
            "head.weight": parameters["lm_head.weight"][images],
        }
        for name, tensor in parameters.items():
            if ".q_norm." in name or ".k_norm." in name:
                heads = config.heads if ".q_norm." in name else config.kv_heads
                if tensor.ndim != 2 or not len(tensor) or heads % len(tensor):
                    raise ValueError(
                        f"{name} has shape {list(tensor.shape)}, which {heads} heads cannot share"
                    )
                # Files of Lumina-mGPT have a row for each part of a model that was split over devices.
                tensors[name] = tensor.repeat_interleave(heads // len(tensor), dim=0).flatten()
            elif name not in ("embed_tokens.weight", "lm_head.weight"):
                tensors[name] = tensor
        return tensors

    def prompt_format(self, config: LuminaConfig, facts: ModelFacts) -> PromptFormat:
        width, height = (side * facts.patch for side in (config.columns, config.rows))
        return PromptFormat(
            (facts.token(BEGIN_OF_SENTENCE),),
            f"Generate an image of {width}x{height} according to the following prompt:\n{{prompt}}",
            (
                facts.token(END_OF_TURN),
                facts.token(BEGIN_OF_IMAGE),
                facts.token(size_token(height // SIZE_UNIT)),
                facts.token(size_token(width // SIZE_UNIT)),
            ),
            stripped=False,
        )

    def code_order(self, facts: ModelFacts) -> list[int]:
        digits = str.maketrans("ABCDEFGHIJ", "0123456789")
        named = {
            number: int(match[1].translate(digits))
            for name, number in facts.vocabulary.items()
            if (match := IMAGE_TOKEN.fullmatch(name))
        }
        return [named[number] for number in sorted(named)]

    @staticmethod
    def _size(facts: ModelFacts) -> tuple[int, int]:
        if facts.side is None and facts.size is None:
            raise ValueError(
                "the checkpoint does not hold the size of its images, and its name has no 512, 768 or 1024: give it with --size, "
                "as in 768x768"
            )
        if facts.size is None:
            return facts.side or 0, facts.side or 0
        width, height = facts.size
        uneven = width % SIZE_UNIT or height % SIZE_UNIT or min(width, height) < SIZE_UNIT
        side = facts.side
        fits = side is None or width * height <= side * side
        if fits and not uneven and max(width, height) <= MOST_ASPECT * min(width, height):
            return width, height
        rule = f"sides are multiples of {SIZE_UNIT} that differ by a factor of {MOST_ASPECT} at most"
        if side is not None:
            listed = ", ".join(f"{w}x{h}" for w, h in sizes(side))
            rule += f", of {side}x{side} pixels in all at most; the model was trained on {listed}"
        raise ValueError(f"no images of {width}x{height} are on offer: {rule}")


FAMILY = LuminaFamily()
