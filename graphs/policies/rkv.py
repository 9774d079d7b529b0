"""``rkv``: importance against redundancy (R-KV, arXiv 2505.24133)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.policies.base import FinishedLine, LineEndParams, Policy, pool_along_raster

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
    others = ~torch.eye(keys.shape[1], dtype=torch.bool)
    near = (similarity > NEAR_DUPLICATE) & others
    duplicate_pos = torch.where(near, line.slot_pos[:, None], -1)
    exempt = near & (duplicate_pos == duplicate_pos.amax(2, keepdim=True))
    counted = torch.where(others & ~exempt, similarity, 0.0)
    mean = counted.sum(1) / visible.sum(1, keepdim=True)
    return torch.where(visible, mean, float("-inf")).softmax(-1)
