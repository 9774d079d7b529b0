"""The importance that somebody else worked out."""

from __future__ import annotations

from torch import Tensor

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Given(Policy):
    """Take what stands in the place of the scores for the importance.

    So the LineEvict operation chooses for policies whose importance it does not know. Nobody can ask for it by name.
    """

    name = "given"
    carried = 1.0
    plugin_importance = Importance.ATTENTION

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return line.scores
