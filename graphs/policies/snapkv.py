"""``snapkv``: the last queries' attention, pooled over neighbours (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from linert.graphs.line_evict import Importance
from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy, pool_along_raster

KERNEL = 5


class SnapKV(Policy):
    """The finished line is the observation window; its attention is average-pooled along the raster (kernel 5).

    Published for the end of a prompt; here it is applied at every line end. Positions that left count as zero.
    """

    name = "snapkv"
    plugin_importance = Importance.POOLED_ATTENTION

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        return pool_along_raster(
            line.scores, line, lambda laid_out: F.avg_pool1d(laid_out, KERNEL, stride=1, padding=KERNEL // 2)
        )
