"""Quality of a set of images: what a metric is, the Fréchet distance, class accuracy.

A metric says what it needs to know of each image (``measure``) and how a set of those makes one number (``score``),
so that large sets need not be held as pixels and that intervals come of the same rows (:mod:`linert.exporter.intervals`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.errors import RequestError

Rows = NDArray[np.float64]


class Metric(ABC):
    """A quality metric. ``higher_is_better`` tells how to read it; ``digits`` how to print it.

    ``distance``: whether the score is a distance between the distribution of the images and another one, and thus never
    below 0 and the larger the fewer images it is of.
    """

    name: str
    higher_is_better: bool
    digits: int = 3
    distance: bool = False

    @abstractmethod
    def measure(self, pixels: NDArray[np.float32], asked: NDArray[Any]) -> Rows:
        """What ``score`` needs to know of each image: ``[n, k]`` float64.

        Args:
            pixels: ``[n, 3, H, W]``, about [-1, 1] and not clamped.
            asked: ``[n]``, what was asked for: classes int64, or prompts as text.
        """

    @abstractmethod
    def score(self, rows: Rows) -> float:
        """The metric of a set of images, of their rows ``[n, k]``."""


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[k]`` and covariance ``[k, k]`` of features."""

    mean: Rows
    covariance: Rows

    @staticmethod
    def of(features: NDArray[Any]) -> Gaussian:
        """Of ``features [n, k]``."""
        values = np.asarray(features, np.float64)
        return Gaussian(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)))

    @cached_property
    def root(self) -> Rows:
        """The symmetric square root of the covariance; negative eigenvalues are rounding."""
        values, vectors = np.linalg.eigh(self.covariance)
        return cast("Rows", (vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Fréchet distance of two Gaussians (arXiv 1706.08500): ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.

    The eigenvalues of S1 S2 are those of the symmetric ``S1^(1/2) S2 S1^(1/2)``; negative ones are rounding.
    """
    mixed = np.linalg.eigvalsh(one.root @ other.covariance @ one.root)
    shift = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(shift @ shift + traces - 2 * np.sqrt(mixed.clip(min=0)).sum())


class FrechetDistance(Metric):
    """Fréchet distance of features of the images drawn from those of real ones; with Inception features it is FID.

    Args:
        embed: features ``[n, k]`` of pixels ``[n, 3, H, W]``.
        real: features of the real images, ``[m, k]``.
        name: what to call it.
    """

    higher_is_better = False
    digits = 2
    distance = True

    def __init__(
        self,
        embed: Callable[[NDArray[np.float32]], NDArray[Any]],
        real: NDArray[Any],
        name: str = "Fréchet distance",
    ) -> None:
        self.embed = embed
        self.real = Gaussian.of(real)
        self.name = name

    def measure(self, pixels: NDArray[np.float32], classes: NDArray[np.int64]) -> Rows:
        return np.asarray(self.embed(pixels), np.float64)

    def score(self, rows: Rows) -> float:
        """Of two images or more.

        Raises:
            RequestError: of one.
        """
        if len(rows) < 2:
            raise RequestError(
                f"{self.name} needs at least 2 images, and has {len(rows)}: draw more --samples"
            )
        return frechet_distance(self.real, Gaussian.of(rows))


class ClassAccuracy(Metric):
    """Share of the images that a classifier takes for what was asked for.

    Args:
        classify: classes ``[n]`` of pixels ``[n, 3, H, W]``.
    """

    name = "class accuracy"
    higher_is_better = True

    def __init__(self, classify: Callable[[NDArray[np.float32]], NDArray[Any]]) -> None:
        self.classify = classify

    def measure(self, pixels: NDArray[np.float32], classes: NDArray[np.int64]) -> Rows:
        return np.asarray(self.classify(pixels) == classes, np.float64)[:, None]

    def score(self, rows: Rows) -> float:
        return float(rows.mean())
