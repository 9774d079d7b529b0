"""The noise that images are drawn with: it belongs to a seed and a position, and is made on the host."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.raster import Raster

MANTISSA_BITS = 53

PHILOX_WORDS = 4
"""Numbers that Philox makes of one value of its counter."""


def noise_rows(seed: int, tokens: int, size: int, first: int = 0) -> NDArray[np.float32]:
    """The noise ``[tokens, size]`` float32 of so many tokens of the image with this ``seed``, from token ``first`` on: reciprocals of
    exponentially distributed numbers.

    A probability times such a number, the largest of which is drawn, is what Gumbel noise is to a logit. The numbers depend on the seed
    and their place in the image alone, not on the batch, so that an image is the same in whatever company it is drawn. They
    are made of the raw stream of Philox (a counter-based generator, Salmon et al. 2011), which numpy promises never to change.
    """
    counter, skipped = divmod(first * size, PHILOX_WORDS)
    stream = np.random.Philox(key=seed, counter=counter)
    raw = stream.random_raw(skipped + tokens * size)[skipped:]
    # Of (0, 1), both ends excluded.
    uniform = ((raw >> np.uint64(64 - MANTISSA_BITS)) + 0.5) * 2.0**-MANTISSA_BITS
    noise: NDArray[np.float32] = (-1.0 / np.log(uniform)).astype(np.float32)
    return noise.reshape(tokens, size)


def noise_table(seeds: Iterable[int], tokens: int, size: int) -> NDArray[np.float32]:
    """The noise ``[I, tokens, size]`` of images with these ``seeds``."""
    return np.stack([noise_rows(seed, tokens, size) for seed in seeds])


class Noise:
    """The noise of a batch, a few lines at a time: token n of an image lies in row n modulo the rows of the table.

    A decode step draws in the line that a row of the batch feeds and in the next one. So it takes two lines, whatever the size of the
    image, and each is made when the line two above it is done.

    Args:
        seeds: of the images.
        held: tokens of an image that the table has at once; all of them where they are not drawn line by line.
        size: numbers that the draw of a token takes.

    Attributes:
        table: ``[I, held, size]`` float32, what decode steps draw with now.
    """

    def __init__(self, seeds: Iterable[int], held: int, size: int) -> None:
        self.seeds = list(seeds)
        self.table = noise_table(self.seeds, held, size)
        self._moved = False

    def restart(self) -> None:
        """Go back to what the first lines of all images are drawn with."""
        if self._moved:
            for image, seed in enumerate(self.seeds):
                self.begin(image, seed)
            self._moved = False

    def begin(self, image: int, seed: int) -> None:
        """Let the image of that number in the batch be the one of ``seed``, at its first line."""
        self.seeds[image] = seed
        _, held, size = self.table.shape
        self.table[image] = noise_rows(seed, held, size)

    def move(self, ended: Iterable[tuple[int, int]], raster: Raster) -> bool:
        """Replace what lines were drawn with that are done, of each image and line that ``ended``, by what is drawn with next.

        Returns:
            Whether the table changed: the last lines of an image are followed by none.
        """
        _, held, size = self.table.shape
        width, moved = raster.line_width, False
        for image, line in ended:
            done = line * width
            if done + held < raster.image_tokens:
                fresh = noise_rows(self.seeds[image], width, size, done + held)
                self.table[image, done % held : done % held + width] = fresh
                self._moved = moved = True
        return moved

    def whole(self, tokens: int) -> NDArray[np.float32]:
        """The noise ``[I, tokens, size]`` of the images from their beginning."""
        return noise_table(self.seeds, tokens, self.table.shape[2])
