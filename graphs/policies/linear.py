"""``linear``: LineAR's inter-line guidance (arXiv 2512.04857)."""

from __future__ import annotations

import torch
from torch import Tensor

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Linear(Policy):
    """Keep what the line just finished attended to: adjacent lines attend to nearly the same tokens.

    The importance of a slot is the mean attention over those queries of the finished line that could see it: all W,
    or for a token of the line itself those that came after it and its own. (The paper does not publish how it
    aggregates over queries and heads; both are options here.)
    """

    name = "linear"
    plugin_importance = Importance.ATTENTION_PER_QUERY

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        seen_by = (line.position - line.slot_pos).clamp(max=line.line_width)
        return torch.where(params.score_max != 0, line.scores, line.scores / seen_by)
