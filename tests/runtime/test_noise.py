"""The noise of a batch, which is held for two lines of an image at a time."""

from __future__ import annotations

import numpy as np
import pytest

from linert.runtime.bundles.raster import Raster
from linert.runtime.drawing.noise import Noise, noise_table

RASTER = Raster(prefix_len=1, line_width=5, lines=6)
SIZE = 7


def held_noise(noise: Noise, image: int, line: int) -> np.ndarray:
    """What the table has for a line and the next one, in the order of their tokens."""
    width = RASTER.line_width
    return noise.table[image, np.arange(line * width, (line + 2) * width) % noise.table.shape[1]]


def test_every_line_and_the_next_are_held_whenever_an_image_draws_in_it() -> None:
    """Rows move on by themselves, and a row may be given to another image."""
    noise = Noise([3, 4], 2 * RASTER.line_width, SIZE)
    whole = {seed: noise_table([seed], RASTER.image_tokens, SIZE)[0] for seed in (3, 4, 9)}
    lines, seeds = [0, 0], [3, 4]

    def check() -> None:
        for image, (line, seed) in enumerate(zip(lines, seeds, strict=True)):
            first = line * RASTER.line_width
            expected = whole[seed][first : first + 2 * RASTER.line_width]
            np.testing.assert_array_equal(held_noise(noise, image, line)[: len(expected)], expected)

    check()
    for ended in ([0], [0, 1], [0], [1], [0], [0, 1]):
        changed = noise.move([(image, lines[image]) for image in ended], RASTER)
        # Behind the last line but one there is nothing new to draw with.
        assert changed == any(lines[image] + 2 < RASTER.lines for image in ended)
        for image in ended:
            lines[image] += 1
        check()
    noise.begin(0, 9)
    lines[0], seeds[0] = 0, 9
    check()
    assert noise.move([(0, 0)], RASTER)
    lines[0] = 1
    check()
    noise.restart()
    lines = [0, 0]
    check()
    np.testing.assert_array_equal(noise.whole(RASTER.image_tokens), np.stack([whole[9], whole[4]]))


@pytest.mark.parametrize("images", [1, 3])
def test_its_size_does_not_grow_with_the_image(images: int) -> None:
    assert Noise(range(images), 2 * RASTER.line_width, SIZE).table.shape == (images, 10, SIZE)
