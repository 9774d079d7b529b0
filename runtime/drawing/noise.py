"""The noise that images are drawn with: it belongs to a seed and a position, and is made before the first token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = 53


def noise_rows(seed: int, tokens: int, size: int) -> NDArray[np.float32]:
    """The noise ``[tokens, size]`` float32 of the image with this ``seed``: reciprocals of exponentially distributed numbers.

    A probability times such a number, the largest of which is drawn, is what Gumbel noise is to a logit. The numbers depend on the seed
    and their place in the image alone, not on the batch, so that an image is the same in whatever company it is drawn. They
    are made of the raw stream of Philox (a counter-based generator, Salmon et al. 2011), which numpy promises never to change.
    """
    raw = np.random.Philox(key=seed).random_raw(tokens * size)
    # Of (0, 1), both ends excluded.
    uniform = ((raw >> np.uint64(64 - MANTISSA_BITS)) + 0.5) * 2.0**-MANTISSA_BITS
    noise: NDArray[np.float32] = (-1.0 / np.log(uniform)).astype(np.float32)
    return noise.reshape(tokens, size)


def noise_table(seeds: Iterable[int], tokens: int, size: int) -> NDArray[np.float32]:
    """The noise ``[I, tokens, size]`` of images with these ``seeds``."""
    return np.stack([noise_rows(seed, tokens, size) for seed in seeds])
