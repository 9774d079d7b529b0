"""Quality metrics of the demo model, for ``linert compare --metrics scripts/digit_metrics.py``.

Class accuracy by the support vector machine of evaluate_demo.py, and a Fréchet distance from the real digits on the
penultimate layer of a small neural classifier. Neither has seen the tokenizer or the transformer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from evaluate_demo import DigitClassifier, features
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from train_demo import digits, upscale

from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance, Metric

HIDDEN = (128, 64)
MOVED_COPIES = 4


def pooled(pixels: np.ndarray) -> np.ndarray:
    """Grey levels ``[n, 144]`` of ``pixels [n, 3, H, W]``."""
    return features(torch.from_numpy(pixels))


class Embedding:
    """Penultimate features ``[n, 64]`` of a classifier trained on the real training digits."""

    def __init__(self) -> None:
        scans, labels = digits("train")
        generator = torch.Generator().manual_seed(2)
        views = [upscale(scans)] + [upscale(scans, generator) for _ in range(MOVED_COPIES)]
        self.model = MLPClassifier(HIDDEN, random_state=0, max_iter=40)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(np.concatenate([features(view) for view in views]), labels.repeat(len(views)))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        values = pooled(pixels)
        for weights, bias in zip(self.model.coefs_[:-1], self.model.intercepts_[:-1], strict=True):
            values = np.maximum(values @ weights + bias, 0)
        return values


def metrics() -> Sequence[Metric]:
    classifier, embedding = DigitClassifier(), Embedding()
    real = torch.cat([upscale(digits(split)[0]) for split in ("train", "test")])
    return [
        ClassAccuracy(lambda pixels: classifier(torch.from_numpy(pixels))),
        FrechetDistance(embedding, embedding(real.numpy())),
    ]
