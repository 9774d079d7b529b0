#!/usr/bin/env python3
"""Count how many of the intervals of exporter/intervals.py hold the truth, in experiments whose truth is known.

    python scripts/interval_coverage.py --experiments 4000

An experiment draws a set of images, or two paired ones, from a known distribution, and asks for the interval. Of 95 % intervals 95 of
100 ought to hold the truth.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from linert.exporter.intervals import Interval, ScoredImages
from linert.runtime.measuring.metrics import (
    ClassAccuracy,
    FrechetDistance,
    Gaussian,
    Metric,
    Rows,
    frechet_distance,
)

SIZES = (40, 200, 1000)
Experiment = tuple[Interval, float]
"""An interval and the truth that it should hold."""

RIGHT = ClassAccuracy(lambda pixels: pixels)
SPREAD = np.array([2.0, 1.0, 0.5])
"""Standard deviations of the features of the real images that distances are from."""


class Mean(Metric):
    """Of any number an image."""

    name, higher_is_better = "mean", True

    def measure(self, pixels: np.ndarray, asked: np.ndarray) -> Rows:
        return pixels

    def score(self, rows: Rows) -> float:
        return float(rows.mean())


class Median(Mean):
    """A score that is no mean."""

    def score(self, rows: Rows) -> float:
        return float(np.median(rows))


class Distance(FrechetDistance):
    """From a Gaussian that is known, not measured."""

    name = "distance"

    def __init__(self, features: int) -> None:
        spread = np.resize(SPREAD, features)
        self.real = Gaussian(np.zeros(features), np.diag(spread**2))

    def of(self, mean: float, scale: float) -> float:
        """Of the distribution that is ``scale`` times as wide as the real one and ``mean`` off in every feature."""
        features = len(self.real.mean)
        return frechet_distance(self.real, Gaussian(np.full(features, mean), self.real.covariance * scale**2))


def share(rng: np.random.Generator, images: int) -> Experiment:
    truth = rng.uniform(0.8, 0.99)
    return ScoredImages(RIGHT, _column(rng.random(images) < truth)).interval(), truth


def share_difference(rng: np.random.Generator, images: int) -> Experiment:
    """Up to a tenth of the images become wrong, and up to a tenth right."""
    lost, won = rng.uniform(0, 0.1, 2)
    kind = rng.choice(4, images, p=(0.8 - won, 0.2 - lost, lost, won))
    before, after = np.isin(kind, (0, 2)), np.isin(kind, (0, 3))
    one, other = (ScoredImages(RIGHT, _column(rows)) for rows in (after, before))
    return one.minus(other), won - lost


def mean(rng: np.random.Generator, images: int) -> Experiment:
    """Skewed, as scores between bounds are."""
    return ScoredImages(Mean(), _column(rng.gamma(4, 0.25, images))).interval(), 1.0


def mean_difference(rng: np.random.Generator, images: int) -> Experiment:
    one = rng.gamma(4, 0.25, images)
    other = one + rng.normal(-0.1, 0.3, images)
    return ScoredImages(Mean(), _column(one)).minus(ScoredImages(Mean(), _column(other))), 0.1


def few_differ(rng: np.random.Generator, images: int) -> Experiment:
    """A tenth of the images differ."""
    one = rng.gamma(4, 0.25, images)
    other = one - (rng.random(images) < 0.1) * rng.normal(0.5, 1, images)
    return ScoredImages(Mean(), _column(one)).minus(ScoredImages(Mean(), _column(other))), 0.05


def median(rng: np.random.Generator, images: int) -> Experiment:
    return ScoredImages(Median(), _column(rng.normal(1, 1, images))).interval(), 1.0


def distance(rng: np.random.Generator, images: int, features: int = 3) -> Experiment:
    metric = Distance(features)
    return ScoredImages(metric, _drawn(rng, metric, images)).interval(), metric.of(0.1, 0.9)


def distance_difference(rng: np.random.Generator, images: int, features: int = 3) -> Experiment:
    """Half of each feature's deviation is the same in both sets."""
    metric = Distance(features)
    one = _drawn(rng, metric, images)
    fresh = (_drawn(rng, metric, images) - 0.1) / 0.9
    other = 0.2 + 1.1 * ((one - 0.1) / 0.9 + fresh) / np.sqrt(2)
    return ScoredImages(metric, other).minus(ScoredImages(metric, one)), metric.of(0.2, 1.1) - metric.of(
        0.1, 0.9
    )


KINDS: dict[str, Callable[[np.random.Generator, int], Experiment]] = {
    "share": share,
    "difference of shares": share_difference,
    "mean": mean,
    "difference of means": mean_difference,
    "difference of means, 10 % differ": few_differ,
    "median": median,
    "Fréchet distance": distance,
    "difference of Fréchet distances": distance_difference,
    "Fréchet distance, 64 features": lambda rng, images: distance(rng, images, 64),
    "difference of Fréchet distances, 64 features": lambda rng, images: distance_difference(rng, images, 64),
}


def coverage(kind: str, images: int, experiments: int) -> float:
    """Share of the intervals that hold the truth; one that claims nothing holds everything."""
    covered = 0
    for number in range(experiments):
        rng = np.random.default_rng((zlib.crc32(kind.encode()), images, number))
        interval, truth = KINDS[kind](rng, images)
        claims = interval.low is not None and interval.high is not None
        covered += not claims or interval.low <= truth <= interval.high
    return covered / experiments


def _column(values: np.ndarray) -> Rows:
    return values.astype(np.float64)[:, None]


def _drawn(rng: np.random.Generator, metric: Distance, images: int) -> Rows:
    """Features ``[images, k]`` of a distribution 0.1 off the real one and 0.9 times as wide."""
    deviations = np.sqrt(np.diag(metric.real.covariance))
    return 0.1 + 0.9 * deviations * rng.normal(size=(images, len(deviations)))


@click.command(help=__doc__)
@click.option("--experiments", default=1000, show_default=True, help="Of each kind and number of images.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Default: all. Repeatable."
)
def main(experiments: int, kinds: tuple[str, ...]) -> None:
    table = Table("interval of", *(f"{images} images" for images in SIZES))
    for kind in kinds or KINDS:
        table.add_row(kind, *(f"{coverage(kind, images, experiments):.1%}" for images in SIZES))
    Console(highlight=False, width=100).print(table)


if __name__ == "__main__":
    main()
