"""Quality of a set of images: what a metric is, the Fréchet distance, and bootstrap intervals.

A metric says what it needs to know of each image (``measure``) and how a set of those makes one number (``score``),
so that large sets need not be held as pixels and that intervals come from resampling images.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError

Rows = NDArray[np.float64]
DEFAULT_FACTORY = "metrics"


class Metric(ABC):
    """A quality metric. ``higher_is_better`` tells how to read it; ``digits`` how to print it."""

    name: str
    higher_is_better: bool
    digits: int = 3

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
        return Gaussian(values.mean(axis=0), np.cov(values, rowvar=False))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Fréchet distance of two Gaussians (arXiv 1706.08500): ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``.

    The eigenvalues of S1 S2 are those of the symmetric ``S1^(1/2) S2 S1^(1/2)``; negative ones are rounding.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other.covariance @ root)
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
        return frechet_distance(Gaussian.of(rows), self.real)


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


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """A ``score`` of a set of images, and its scores ``resampled [rounds]`` on images drawn with replacement.

    Every set of equal size is resampled alike. So when two sets hold the same conditions and seeds in the same order,
    what they share cancels in their difference.
    """

    score: float
    resampled: Rows

    @staticmethod
    def of(score: Callable[[Rows], float], rows: Rows, *, rounds: int = 200) -> Bootstrap:
        """What ``score``, a metric's or any other, makes of ``rows [n, k]``."""
        rng = np.random.default_rng(0)
        drawn = [score(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(rounds)]
        return Bootstrap(score(rows), np.array(drawn))

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return Bootstrap(self.score - other.score, self.resampled - other.resampled)

    def interval(self) -> Interval:
        """The 95 % interval: the spread of the resampled scores, laid around the score itself.

        (Resampling adds to a Fréchet distance, which already grows as images get fewer. So compare values at equal
        numbers of images.)
        """
        low, high = np.quantile(self.resampled, [0.025, 0.975]) - self.resampled.mean()
        return Interval(self.score, self.score + float(low), self.score + float(high))


def load_metrics(source: str) -> Sequence[Metric]:
    """The metrics that ``source`` makes: ``package.module[:function]`` or ``path/to/file.py[:function]``.

    The function (``metrics`` unless named) takes nothing and returns a sequence of :class:`Metric`.

    Raises:
        RequestError: there is no such file, module or function, or it does not return metrics.
    """
    place, _, name = source.partition(":")
    factory = getattr(_module(place), name or DEFAULT_FACTORY, None)
    if not callable(factory):
        raise RequestError(f"{place} has no function {name or DEFAULT_FACTORY}() that makes metrics")
    made = list(cast("Sequence[Metric]", factory()))
    if not made or not all(isinstance(metric, Metric) for metric in made):
        raise RequestError(f"{source} returned no runtime.metrics.Metric objects")
    return made


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise RequestError(f"cannot import {place} for its metrics: {error}") from error
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RequestError(f"there is no file {place} to take metrics from")
    # What stands beside the file may be imported by it, as if it were run.
    sys.path.insert(0, str(path.parent.resolve()))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
