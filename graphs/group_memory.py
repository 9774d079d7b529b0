"""Keys and values of everything that was drawn, for models that draw an image in groups: nothing is evicted."""

from __future__ import annotations

import torch
from torch import Tensor

from linert.graphs.memory import Memory
from linert.graphs.stage_tensor import StateTensor
from linert.graphs.transformer import Condition
from linert.graphs.window import NO_DRAFT


class GroupMemory(Memory):
    """A slot for the condition, and one for every token that is ever fed, in the order in which they are drawn.

    ``drawn``: tokens of every image that are drawn. ``newest``: how many of them, the last, are not fed yet; at first it is the condition.
    """

    written = ("k_cache", "v_cache")
    unseen = written

    def loop_state(self) -> list[StateTensor]:
        geometry, config = self.geometry, self.geometry.config
        images = {"image": geometry.images}
        condition = {"sequence": geometry.sequences, "position": config.prefix_len, "channel": config.dim}
        return [
            StateTensor.of("tokens", torch.int64, images | {"token": config.image_tokens}),
            StateTensor.of("drawn", torch.int64, images),
            StateTensor.of("newest", torch.int64, images),
            StateTensor.of("condition", geometry.cache_dtype, condition),
        ]

    def first_loop(self, condition: Condition, position: Tensor) -> list[Tensor]:
        geometry = self.geometry
        nothing = torch.zeros(geometry.images, dtype=torch.int64)
        tokens = torch.full((geometry.images, geometry.config.image_tokens), NO_DRAFT)
        # A graph's output is no input of it.
        return [tokens, nothing, torch.ones_like(nothing), condition.embeddings.clone()]

    def layer_state(self) -> list[StateTensor]:
        geometry, config = self.geometry, self.geometry.config
        return [
            StateTensor.of(
                kind,
                geometry.cache_dtype,
                {
                    "sequence": geometry.sequences,
                    "head": config.kv_heads,
                    "slot": slots,
                    "channel": config.head_dim,
                },
                layer,
            )
            for layer, slots in enumerate(geometry.capacities)
            for kind in self.written
        ]
