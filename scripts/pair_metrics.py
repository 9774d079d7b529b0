"""Quality metrics of the pairs model, for ``linert compare --metrics scripts/pair_metrics.py``.

An image holds two digits side by side and the same two again below. The class names the left one; what the right one
below has to be stands eight lines above and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from digit_metrics import Embedding
from evaluate_demo import DigitClassifier
from train_demo import digit_pairs

from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance, Metric


def quarters(pixels: np.ndarray) -> list[np.ndarray]:
    """The digits above left, above right, below left and below right of ``pixels [n, 3, H, W]``, of half the size."""
    half = pixels.shape[-1] // 2
    rows = pixels[:, :, :half], pixels[:, :, half:]
    return [part for row in rows for part in (row[..., :half], row[..., half:])]


class RepeatAccuracy(Metric):
    """Share of the images whose right digit below is recognised as the one above it."""

    name = "right digit repeated"
    higher_is_better = True

    def __init__(self, classifier: DigitClassifier) -> None:
        self.classifier = classifier

    def measure(self, pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        _, above, _, below = (self.classifier(torch.from_numpy(part.copy())) for part in quarters(pixels))
        return (above == below).astype(np.float64)[:, None]

    def score(self, rows: np.ndarray) -> float:
        return float(rows.mean())


def metrics() -> Sequence[Metric]:
    classifier, embedding = DigitClassifier(), Embedding()
    real = torch.cat([digit_pairs(split, None)[0] for split in ("train", "test")]).numpy()

    def embed(pixels: np.ndarray) -> np.ndarray:
        """Of the right digits, above and below: their covariance tells whether they agree."""
        return np.concatenate([embedding(part.copy()) for part in quarters(pixels)[1::2]], axis=1)

    return [
        ClassAccuracy(lambda pixels: classifier(torch.from_numpy(quarters(pixels)[0].copy()))),
        RepeatAccuracy(classifier),
        FrechetDistance(embed, embed(real)),
    ]
