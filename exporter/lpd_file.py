"""Write LPD's weights under the names that its authors publish them by."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PUBLISHED = {
    r"tok_embeddings\.weight": "token_emb.weight",
    r"input_norm\.(\w+)": r"z_proj_ln.\1",
    r"layers\.(\d+)\.attention_norm\.(\w+)": r"blocks.\1.norm1.\2",
    r"layers\.(\d+)\.ffn_norm\.(\w+)": r"blocks.\1.norm2.\2",
    r"layers\.(\d+)\.attention\.wqkv\.(\w+)": r"blocks.\1.attn.qkv.\2",
    r"layers\.(\d+)\.attention\.wo\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"layers\.(\d+)\.feed_forward\.w([12])\.(\w+)": r"blocks.\1.mlp.fc\2.\3",
    r"norm\.(\w+)": r"norm.\1",
    r"output\.weight": "head.weight",
}
"""Our names, as patterns, and theirs, of tensors that are the same."""


def published_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, a ``state_dict`` of :class:`linert.graphs.families.lpd.LPD`, as published files hold them.

    Raises:
        ValueError: one is none of an LPD's.
    """
    classes = tensors["cls_embedding.weight"]
    published = {
        "class_emb.weight": classes[:-1],
        "fake_latent": classes[-1:],
        "mask_token": tensors["mask_embedding.weight"][None],
        "pos_embed": tensors["pos_embedding.weight"][None],
    }
    split = {"cls_embedding.weight", "mask_embedding.weight", "pos_embedding.weight"}
    for name in tensors.keys() - split:
        for pattern, theirs in PUBLISHED.items():
            if match := re.fullmatch(pattern, name):
                published[match.expand(theirs)] = tensors[name]
                break
        else:
            raise ValueError(f"an LPD has no tensor {name}")
    return {name: tensor.contiguous() for name, tensor in sorted(published.items())}
