"""``leverage``: how far a token can move what attention puts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from linert.graphs.policies.base import FinishedLine, LineEndParams, Policy


class Leverage(Policy):
    """Keep tokens of large values whose keys stand apart; attention received plays no part.

    The importance of a slot is the length of its value, times the distance of its key from the mean key of the image tokens
    held. What a token adds to attention's output is no longer than its value, and a query can only favour it by what its key
    differs in. Both last as long as the image, where what one line attended to holds for the next lines at best. (Nobody
    else's; how it measures is in the documentation.)
    """

    name = "leverage"
    reads_keys = True
    reads_values = True
    # It knows by itself which early tokens to keep.
    usual: ClassVar[Mapping[str, Any]] = {"anchor_tokens": 4, "share_guidance": True}

    def importance(self, line: FinishedLine, params: LineEndParams) -> Tensor:
        assert line.keys is not None
        assert line.values is not None
        held = (line.slot_pos >= line.prefix_len).float()
        keys = line.keys.float()
        # What other slots hold does not count: zeros, or what an image before left there.
        mean = (held[:, None] @ keys) / held.sum(1).clamp(min=1)[:, None, None]
        return vector_norm(line.values.float(), dim=-1) * vector_norm(keys - mean, dim=-1)
