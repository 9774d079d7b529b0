"""The transformer in the form it is trained in: Janus' own parts, whole sequences at once.

A sequence is a prompt and its picture, from the first position on, and what is behind them is padding. So causal attention alone
keeps padding out, and no mask is needed; positions count from the first token either way, so that this is what the stages compute
of prompts that are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linert.graphs.families import janus
from words import image_tokens, prompts
from words.clock import load_floats

FILE = "lm.safetensors"
LAYERS, DIM, HEADS, FFN_DIM = 6, 256, 8, 576

PUBLISHED = {
    "janus.text_embedding.": "language_model.model.embed_tokens.",
    "janus.layers.": "language_model.model.layers.",
    "janus.norm.": "language_model.model.norm.",
    "janus.head.proj.": "gen_head.output_mlp_projector.",
    "janus.head.vision_head.": "gen_head.vision_head.",
    "gen_embed.": "gen_embed.",
    "gen_aligner.0.": "gen_aligner.layers.0.",
    "gen_aligner.1.": "gen_aligner.layers.2.",
}
"""Beginnings of our names, and deepseek-ai's."""

IGNORED = -100
"""The target of a position that predicts no image token."""

Layer = Callable[[nn.Module, Tensor, Any], Tensor]


def config(codes: int, tokens: prompts.PromptTokens, layers: int = LAYERS) -> janus.JanusConfig:
    return janus.JanusConfig(
        layers=layers,
        dim=DIM,
        heads=HEADS,
        kv_heads=HEADS,
        ffn_dim=FFN_DIM,
        vocab_size=codes,
        text_vocab_size=len(tokens.tokenizer.vocabulary),
        prefix_len=prompts.LONGEST,
        begin_of_sentence=tokens.begin_of_sentence,
        begin_of_image=tokens.begin_of_image,
        padding=tokens.padding,
        grid=image_tokens.GRID,
    )


def layer(block: Any, x: Tensor, rope: Any) -> Tensor:
    """One of the transformer's layers over whole sequences ``x [B, S, dim]``."""
    q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
    attended = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, is_causal=True, scale=1.0)
    return block.finish(x, attended.transpose(1, 2))


class TrainedJanus(nn.Module):
    """A Janus whose embedding of image tokens is made as published ones are: of a few numbers a token, by two layers.

    Args:
        config: its sizes.
        codebook: ``[V, d]``, what image tokens begin as; tokens that look alike are alike from the first step on.
    """

    def __init__(self, config: janus.JanusConfig, codebook: Tensor) -> None:
        super().__init__()
        self.config = config
        self.janus = janus.Janus(config)
        # It is made of the two below, and only for drawing.
        self.janus.image_embedding.requires_grad_(False)
        self.gen_embed = nn.Embedding(*codebook.shape)
        self.gen_aligner = nn.ModuleList(
            [nn.Linear(codebook.shape[1], config.dim), nn.Linear(config.dim, config.dim)]
        )
        for name, parameter in self.janus.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.gen_aligner[1].weight, std=0.02)
        with torch.no_grad():
            self.gen_embed.weight.copy_(F.normalize(codebook, dim=-1))

    def image_table(self) -> Tensor:
        """Embeddings ``[V, dim]`` of image tokens."""
        first, second = self.gen_aligner
        return second(F.gelu(first(self.gen_embed.weight)))

    def sequences(self, tokens: Tensor, lengths: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """What is read and what is to be predicted.

        Args:
            tokens: prompts ``[B, T]``, padded on the right.
            lengths: of the prompts, ``[B]``.
            grids: image tokens ``[B, N]``.

        Returns:
            ids ``[B, T + N - 1]``, image tokens behind those of text; and targets of the same shape, :data:`IGNORED` where there are none.
        """
        n, longest = grids.shape[1], tokens.shape[1]
        at = torch.arange(longest + n - 1, device=tokens.device).expand(len(tokens), -1)
        behind = at - lengths[:, None]
        images = grids.gather(1, behind.clamp(0, n - 1)) + self.config.text_vocab_size
        ids = torch.where(behind < 0, tokens.gather(1, at.clamp(max=longest - 1)), images)
        next_ = behind + 1
        targets = grids.gather(1, next_.clamp(0, n - 1))
        return ids, torch.where((next_ >= 0) & (next_ < n), targets, IGNORED)

    def embedded(self, ids: Tensor) -> Tensor:
        table = torch.cat([self.janus.text_embedding.weight, self.image_table()])
        return F.embedding(ids, table)

    def hidden(self, ids: Tensor, layer: Layer = layer) -> Tensor:
        """The residual stream ``[B, S, dim]`` behind all layers."""
        x = self.embedded(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = self.janus.rope(positions, torch.zeros(1, dtype=torch.int64, device=ids.device))
        for block in self.janus.blocks():
            x = layer(block, x, rope)
        return x

    def unconditional(self, tokens: Tensor, lengths: Tensor, dropped: Tensor) -> Tensor:
        """``tokens [B, T]`` where those of ``dropped [B]`` are as in Janus' unconditional rows: padding but for what begins a sentence
        and an image."""
        config = self.config
        kept = (tokens == config.begin_of_sentence) | (tokens == config.begin_of_image)
        return torch.where(dropped[:, None] & ~kept, config.padding, tokens)

    def fold(self) -> janus.Janus:
        """The module that draws, with its embedding of image tokens made."""
        with torch.no_grad():
            self.janus.image_embedding.weight.copy_(self.image_table())
        return self.janus

    def published(self) -> dict[str, Tensor]:
        """Its parameters under deepseek-ai's names."""
        named = {}
        for name, tensor in self.state_dict().items():
            ours = next((beginning for beginning in PUBLISHED if name.startswith(beginning)), None)
            if ours is not None:
                named[PUBLISHED[ours] + name.removeprefix(ours)] = tensor
        return named

    def load_published(self, tensors: dict[str, Tensor]) -> None:
        """Take parameters under deepseek-ai's names."""
        ours = {}
        for name, tensor in tensors.items():
            mine, theirs = next(pair for pair in PUBLISHED.items() if name.startswith(pair[1]))
            ours[mine + name.removeprefix(theirs)] = tensor
        missing, unexpected = self.load_state_dict(ours, strict=False)
        if unexpected or set(missing) - {"janus.image_embedding.weight"}:
            raise KeyError(f"weights lack {missing}, and {unexpected} are not known")


def prediction_loss(model: TrainedJanus, x: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats an image token of a residual stream ``[B, S, dim]``."""
    logits = model.janus.logits(x)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def load(out: Path, device: torch.device) -> TrainedJanus:
    """The trained transformer, in float32."""
    tensors = load_floats(out / FILE)
    layers = 1 + max(int(n.split(".")[3]) for n in tensors if n.startswith("language_model.model.layers."))
    codes = tensors["gen_embed.weight"]
    model = TrainedJanus(config(len(codes), prompts.PromptTokens(out), layers), codes)
    model.load_published(tensors)
    return model.requires_grad_(False).eval().to(device)
