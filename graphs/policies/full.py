"""``full``: every token stays; the ground truth for every other policy."""

from __future__ import annotations

import torch
from torch import Tensor

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Full(Policy):
    """The full KV cache. Its capacity holds the whole image, so that only empty slots are ever chosen."""

    name = "full"
    plugin_importance = Importance.NOTHING

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return torch.zeros_like(line.scores)
