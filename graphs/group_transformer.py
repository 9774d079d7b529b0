"""A transformer that draws an image in groups of tokens, in an order of its own, as the stages see it.

Every token of a group is predicted at once, each by a query that stands in the cell to be drawn; queries of a group see one another and all
tokens of the groups before, and tokens see their own group and those before (LPD, arXiv 2507.01957).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from linert.graphs.transformer import Condition, Transformer


class GroupTransformer(Transformer):
    """A decoder over groups of image tokens. Axes: B sequences, N tokens of an image, S rows.

    What all sequences see first is one row. Places in the image are cells, numbered in raster order; a token's rank is its number in the
    order of its image.
    """

    @abstractmethod
    def tokens_in(self, cells: Tensor, tokens: Tensor) -> Tensor:
        """Rows ``[B, S, dim]`` of ``tokens [B, S]`` that stand in ``cells [B, S]``."""

    @abstractmethod
    def queries_in(self, cells: Tensor) -> Tensor:
        """Rows ``[B, S, dim]`` that ask for the tokens of ``cells [B, S]``."""

    def forward(self, condition: Condition, tokens: Tensor, orders: Tensor, sizes: Sequence[int]) -> Tensor:
        """Predict every token in one pass, as in training.

        Args:
            condition: of B sequences.
            tokens: ``[B, N]`` int64 in raster order.
            orders: ``[B, N]`` int64, the cell of the token of every rank.
            sizes: of the groups; they sum to N.

        Returns:
            ``[B, N, vocab_size]`` float32, by rank.
        """
        x = self.rows(condition, tokens, orders, sizes)
        visible = group_visibility(sizes)[None]
        for block in self.blocks():
            x = self.block(block, x, None, visible)
        return self.logits(x[:, -tokens.shape[1] :])

    def rows(self, condition: Condition, tokens: Tensor, orders: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the pass of :meth:`forward` runs on: the condition, all tokens but the last group's, and all queries."""
        fed = orders[:, : tokens.shape[1] - sizes[-1]]
        context = self.tokens_in(fed, tokens.gather(1, fed))
        return torch.cat([condition.embeddings, context, self.queries_in(orders)], dim=1)


def group_visibility(sizes: Sequence[int]) -> Tensor:
    """Which rows each of :meth:`GroupTransformer.rows` sees: ``[S, S]`` bool.

    A token sees the condition and the tokens of the groups up to its own; a query sees those before its own, and the queries of it.
    """
    groups = torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(sizes))
    context = torch.cat([torch.zeros(1, dtype=torch.int64), groups[: len(groups) - sizes[-1]]])
    queries = groups[:, None]
    of_context = torch.cat(
        [context[:, None] >= context, torch.zeros(len(context), len(groups), dtype=torch.bool)], dim=1
    )
    return torch.cat([of_context, torch.cat([queries > context, queries == groups], dim=1)])
