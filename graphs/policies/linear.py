"""``linear``: LineAR's inter-line guidance (arXiv 2512.04857)."""

from __future__ import annotations

from torch import Tensor

from graphs.policies.base import FinishedLine, LineEndParams, Policy


class Linear(Policy):
    """Keep what the line just finished attended to: adjacent lines attend to nearly the same tokens.

    The importance of a slot is the attention that it received from the W queries of the finished line. (The paper
    does not publish how it aggregates over queries and heads; both are options here.)
    """

    name = "linear"

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return line.scores
