"""A metric of one's own for `linert compare`: how much of an image is dark.

linert compare bundle --metrics examples/own_metric.py --samples 100 --out compared
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linert import Metric


class Darkness(Metric):
    """The share of pixels below the middle. Rows of images are resampled, so that the value comes with an interval."""

    name, higher_is_better = "darkness", False

    def measure(self, pixels: NDArray[np.float32], asked: NDArray[np.generic]) -> NDArray[np.float64]:
        """One row an image: ``[images, 1]`` of pixels ``[images, 3, H, W]`` in -1 to 1. ``asked``: classes or prompts."""
        return (pixels < 0).mean((1, 2, 3), dtype=np.float64)[:, None]

    def score(self, rows: NDArray[np.float64]) -> float:
        """The metric of any number of rows."""
        return float(rows.mean())


def metrics() -> Sequence[Metric]:
    """What `linert compare` calls."""
    return [Darkness()]
