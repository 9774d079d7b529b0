"""``streaming``: attention sinks and a window (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from torch import Tensor

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Streaming(Policy):
    """Keep the first tokens and the newest; scores play no part.

    The prefix and the anchor tokens are the sinks; of the rest the oldest line goes.
    """

    name = "streaming"
    plugin_importance = Importance.POSITION

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return line.slot_pos.float()
