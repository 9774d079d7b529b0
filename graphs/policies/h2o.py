"""``h2o``: heavy hitters (arXiv 2306.14048)."""

from __future__ import annotations

from torch import Tensor

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class H2O(Policy):
    """Keep the recent window and the tokens that all queries so far, summed, attended to most, per head."""

    name = "h2o"
    carried = 1.0
    plugin_importance = Importance.ATTENTION

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return line.scores
