"""Export a model with an eviction policy of one's own, and draw with it.

    python examples/own_policy.py demo/c2i_demo.pt --vq demo/vq_demo.pt --grid 16 --heads 4 --out own

What follows the script's name is what follows `linert export`. The policy becomes a stage of the bundle, so that drawing
needs neither this file nor torch.
"""

from __future__ import annotations

import sys

from torch import Tensor

from linert.graphs.policies import FinishedLine, LineEndParams, Policy, register
from linert.runtime.cli import cli


@register
class Columns(Policy):
    """Keep the tokens that lie nearest to the middle column; what is kept has the largest importance."""

    name = "columns"

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        column = (line.slot_pos - line.prefix_len) % line.line_width
        return -(column - line.line_width // 2).abs().float()


if __name__ == "__main__":
    cli.main(["export", *sys.argv[1:], "--policy", f"{Columns.name},streaming"])
