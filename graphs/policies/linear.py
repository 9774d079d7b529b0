"""``linear``: LineAR's inter-line guidance (arXiv 2512.04857)."""

from __future__ import annotations

from torch import Tensor

from graphs.policies.base import FinishedLine, Policy


class Linear(Policy):
    """Keep what the line just finished attended to: adjacent lines attend to nearly the same tokens.

    The importance of a slot is the mean attention probability over the W queries of the finished line, per
    sequence and KV head. (The paper does not publish its aggregation; the mean per head is this project's.)
    """

    name = "linear"

    def importance(self, line: FinishedLine) -> Tensor:
        return line.scores / line.line_width
