"""PyTorch peers of a bundle: the same transformer with a static KV cache that holds the whole image."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.models import LoadedImageDecoder, LoadedTransformer
from runtime.generator import picture


def set_threads(threads: int) -> None:
    """CPU threads of PyTorch's operators."""
    torch.set_num_threads(threads)


class PyTorchPeer:
    """Draws a batch of images, token by token.

    The cache is written in place and attention reads as much of it as is filled, as published loops do.

    Args:
        transformer, image_decoder: the checkpoints.
        images: images in a batch.
        guidance: scale; above 1 every image has an unconditional row.
        compiled: compile the step with ``torch.compile``. Attention then reads all of the cache under a mask: its shapes
            must not change.
    """

    def __init__(
        self,
        transformer: LoadedTransformer,
        image_decoder: LoadedImageDecoder,
        images: int,
        guidance: float,
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.image_decoder = transformer.eager(), image_decoder.eager()
        self.images, self.guidance, self.compiled = images, guidance, compiled
        config = self.model.config
        self.slots = config.prefix_len + config.image_tokens
        self.sequences = images * (2 if guidance > 1 else 1)
        shape = (self.sequences, config.heads, self.slots, config.head_dim)
        self.k_cache = [torch.zeros(shape) for _ in range(config.layers)]
        self.v_cache = [torch.zeros(shape) for _ in range(config.layers)]
        self.generator = torch.Generator().manual_seed(0)
        self._forward: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(self._masked_step, dynamic=False) if compiled else self._sliced_step
        )

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Feed ``tokens [B]`` at ``position`` and draw the next, ``[I]``."""
        return self._feed(self.model.embed(tokens[:, None]), position)

    def _feed(self, x: Tensor, position: int) -> Tensor:
        logits = self._forward(x, torch.tensor([position]))
        if self.guidance > 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.guidance * (conditional - unconditional)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """Milliseconds of ``count`` steps with half of the image drawn."""
        tokens = torch.zeros(self.sequences, dtype=torch.int64)
        first = self.slots // 2
        times = []
        for position in range(first, first + count):
            start = time.perf_counter()
            self.step(tokens, position)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    @torch.inference_mode()
    def image(self) -> float:
        """Seconds of a whole batch, from the condition to encoded PNGs."""
        start = time.perf_counter()
        config = self.model.config
        branches = self.sequences // self.images
        classes = torch.arange(self.images) % config.num_classes
        condition = self.model.condition([classes], guided=branches == 2)
        drawn = [self._feed(condition.embeddings, 0)]
        for index in range(1, config.image_tokens):
            drawn.append(self.step(drawn[-1].repeat(branches), index))
        grids = torch.stack(drawn, dim=1).unflatten(1, (config.lines, config.line_width))
        for grid in grids:
            picture(self.image_decoder.decode(grid[None])[0].numpy()).save(io.BytesIO(), format="PNG")
        return time.perf_counter() - start

    def _sliced_step(self, x: Tensor, position: Tensor) -> Tensor:
        """Logits ``[B, V]``; attention reads the filled part of the cache."""
        at = int(position)
        return self._step(x, position, lambda cache: cache[:, :, : at + 1], None)

    def _masked_step(self, x: Tensor, position: Tensor) -> Tensor:
        """The same in static shapes."""
        visible = (torch.arange(self.slots) <= position)[None, None, None]
        return self._step(x, position, lambda cache: cache, visible)

    def _step(
        self, x: Tensor, position: Tensor, seen: Callable[[Tensor], Tensor], mask: Tensor | None
    ) -> Tensor:
        rope = self.model.rope(position[None], torch.zeros(1, dtype=torch.int64))
        for layer, block in enumerate(self.model.blocks()):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
            k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
            k_cache.index_copy_(2, position, k)
            v_cache.index_copy_(2, position, v)
            attended = F.scaled_dot_product_attention(
                q, seen(k_cache), seen(v_cache), attn_mask=mask, scale=1.0
            )
            x = block.finish(x, attended.transpose(1, 2))
        return self.model.logits(x)[:, 0]
