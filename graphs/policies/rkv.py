"""``rkv``: importance against redundancy (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy, pool_along_raster

KERNEL = 7
NEAR_DUPLICATE = 0.5
IMPORTANCE_SHARE = 0.1


class RKV(Policy):
    """Keep by ``0.1 x importance - 0.9 x redundancy``.

    Importance: mean attention of the last 8 queries, max-pooled along the raster (kernel 7). Redundancy: mean cosine
    similarity of a key to the others, where of every key's near-duplicates (above 0.5) the most recent one is
    exempt, softmaxed over the keys held. The attention is what the line buffer accounts for: a softmax over
    everything visible, averaged over the query heads of a KV head (published: over the older keys, the largest
    logit of the group).
    """

    name = "rkv"
    window = 8
    reads_keys = True

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        queries = min(self.window, line.line_width)
        attention = torch.where(params.score_max != 0, line.scores, line.scores / queries)
        pooled = pool_along_raster(
            attention, line, lambda laid_out: F.max_pool1d(laid_out, KERNEL, stride=1, padding=KERNEL // 2)
        )
        return IMPORTANCE_SHARE * pooled - (1 - IMPORTANCE_SHARE) * redundancy(line)


def redundancy(line: FinishedLine) -> Tensor:
    """Redundancy ``[R, C]`` of the key in each slot; sums to 1 over the slots that hold one, zero elsewhere."""
    assert line.keys is not None
    visible = line.visible
    keys = torch.where(visible[:, :, None], line.keys.float(), 0.0)
    # Not `+ 1e-8`: the ONNX optimizer drops an addition that small.
    directions = keys / keys.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-8)
    similarity = directions @ directions.mT
    # A key is not its own duplicate: no similarity is above 2.
    slot = torch.arange(keys.shape[1])
    bound = torch.where(slot[:, None] == slot, 2.0, NEAR_DUPLICATE)
    duplicate_pos = torch.where(similarity > bound, line.slot_pos[:, None].float(), -1.0)
    latest = duplicate_pos.argmax(2, keepdim=True)
    exempt = torch.where((slot == latest) & (duplicate_pos >= 0), similarity, 0.0)
    # The column sums of the similarities, without the big matrix: its own, and those exempt, do not count. No scatter_add:
    # TensorRT has no reducing scatter.
    totals = (directions * directions.sum(1, keepdim=True)).sum(-1) - directions.square().sum(-1)
    counted = totals - exempt.sum(1)
    mean = counted / visible.sum(1, keepdim=True)
    return torch.where(visible, mean, float("-inf")).softmax(-1)
