"""The PyTorch reference of models that draw in groups: keys and values of what was fed, one after the other.

There are no slots, no widths and nothing is padded, so that what the stages do of these is checked against something that does none of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.group_transformer import GroupTransformer


class GroupHistory:
    """Runs one batch on all that it has seen.

    Args:
        model: the family's module with its weights.
        guided: whether unconditional sequences follow the conditional ones.
    """

    def __init__(self, model: GroupTransformer, *, guided: bool) -> None:
        self.model, self.config = model, model.config
        self.guided = guided

    @property
    def branches(self) -> int:
        """Sequences an image."""
        return 2 if self.guided else 1

    @torch.no_grad()
    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Take the condition that ``inputs`` of the prefill stage say; it is fed with the first group."""
        self._newest = self.model.condition(inputs, guided=self.guided).embeddings
        empty = self._newest.new_zeros(len(self._newest), self.config.kv_heads, 0, self.config.head_dim)
        self._seen = [(empty, empty)] * self.config.layers

    @torch.no_grad()
    def ask(self, cells: Tensor) -> Tensor:
        """Feed what is new, and predict the tokens of the next group's ``cells [I, n]``: logits ``[B, n, V]``."""
        asking = self.model.queries_in(cells.repeat(self.branches, 1))
        x = torch.cat([self._newest, asking], dim=1)
        fed = self._newest.shape[1]
        for layer, block in enumerate(self.model.blocks()):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, None))
            before_k, before_v = self._seen[layer]
            known = torch.cat([before_k, k[:, :, :fed]], dim=2), torch.cat([before_v, v[:, :, :fed]], dim=2)
            asked = torch.cat([known[0], k[:, :, fed:]], dim=2), torch.cat([known[1], v[:, :, fed:]], dim=2)
            attended = torch.cat(
                [
                    F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
                    for queries, (keys, values) in ((q[:, :, :fed], known), (q[:, :, fed:], asked))
                ],
                dim=2,
            )
            self._seen[layer] = known
            x = block.finish(x, attended.transpose(1, 2))
        return self.model.logits(x[:, fed:])

    @torch.no_grad()
    def tell(self, cells: Tensor, tokens: Tensor) -> None:
        """The ``tokens [I, n]`` of the last group's ``cells``, to be fed with the next."""
        self._newest = self.model.tokens_in(cells.repeat(self.branches, 1), tokens.repeat(self.branches, 1))
