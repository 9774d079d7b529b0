"""``fading``: attention received, of which a little is forgotten at every line's end."""

from __future__ import annotations

from torch import Tensor

from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Fading(Policy):
    """Keep what the queries so far attended to most, where those of older lines count less.

    Between ``linear``, which forgets all attention but the finished line's, and ``h2o``, which forgets none: a score is the sum
    of the attention received, and 95 % of it go on from line to line. (Nobody else's; how it measures is in the documentation.)
    """

    name = "fading"
    carried = 0.95

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return line.scores
