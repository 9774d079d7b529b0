"""Intervals: what they must hold, and that of 95 % intervals so many hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import KINDS, Distance, Mean, Median, coverage

from linert.exporter.intervals import (
    Interval,
    ScoredImages,
    mean_difference,
    share_difference,
    share_interval,
)
from linert.runtime.errors import RequestError
from linert.runtime.measuring.metrics import ClassAccuracy, Metric

RNG = np.random.default_rng(0)
RIGHT = ClassAccuracy(lambda pixels: pixels)


def scored(metric: Metric, values: np.ndarray) -> ScoredImages:
    return ScoredImages(metric, np.asarray(values, np.float64).reshape(len(values), -1))


def bounds(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize(
    ("kind", "images", "experiments", "least"),
    [
        ("share", 40, 400, 0.92),
        ("share", 200, 400, 0.92),
        ("share", 1000, 400, 0.92),
        ("difference of shares", 40, 400, 0.92),
        ("difference of shares", 200, 400, 0.92),
        ("difference of shares", 1000, 400, 0.92),
        ("mean", 40, 200, 0.92),
        ("mean", 200, 300, 0.92),
        ("difference of means", 40, 200, 0.92),
        ("difference of means", 1000, 150, 0.92),
        # Four images of forty do not tell how those differ that do.
        ("difference of means, 10 % differ", 40, 200, 0.9),
        ("difference of means, 10 % differ", 200, 100, 0.92),
        ("Fréchet distance", 40, 300, 0.92),
        ("Fréchet distance", 200, 200, 0.92),
        ("Fréchet distance", 1000, 100, 0.92),
        ("difference of Fréchet distances", 40, 200, 0.92),
        ("difference of Fréchet distances", 200, 150, 0.92),
        ("difference of Fréchet distances", 1000, 100, 0.92),
        ("Fréchet distance, 64 features", 40, 60, 0.92),
        ("difference of Fréchet distances, 64 features", 200, 50, 0.92),
    ],
)
def test_so_many_intervals_hold_the_truth(kind: str, images: int, experiments: int, least: float) -> None:
    assert coverage(kind, images, experiments) >= least


@pytest.mark.parametrize("kind", ["share", "mean", "Fréchet distance"])
def test_intervals_are_no_wider_than_they_need_to_be(kind: str) -> None:
    """Intervals that hold the truth always would say too little."""
    assert coverage(kind, 200, 200) <= 0.98


def test_every_kind_of_interval_is_tried() -> None:
    for kind, experiment in KINDS.items():
        interval, truth = experiment(np.random.default_rng(1), 40)
        assert np.isfinite([interval.value, truth]).all(), kind


def test_a_share_stays_among_the_shares() -> None:
    """Wilson's interval of 39 of 40, and of all."""
    assert bounds(share_interval(39, 40)) == pytest.approx((0.8712, 0.9956), abs=1e-4)
    assert bounds(share_interval(40, 40)) == pytest.approx((0.9124, 1.0), abs=1e-4)
    right = np.ones(40)
    right[3] = 0
    assert scored(RIGHT, right).interval() == share_interval(39, 40)


@pytest.mark.parametrize("differing", range(5))
def test_few_images_that_differ_do_not_tell_two_shares_apart(differing: int) -> None:
    """Even four of four in one direction happen once in eight times by chance (the sign test's p is 0.125)."""
    before, after = np.ones(40), np.ones(40)
    after[:differing] = 0
    interval = scored(RIGHT, after).minus(scored(RIGHT, before))
    low, high = bounds(interval)
    assert interval.value == pytest.approx(-differing / 40)
    assert low < interval.value < high
    assert low < 0 < high
    assert not interval.excludes_zero()


def test_many_images_that_differ_tell_two_shares_apart() -> None:
    differences = np.zeros(1000)
    differences[:30], differences[30:35] = -1, 1
    low, high = bounds(share_difference(differences))
    assert -0.05 < low < -0.025 < high < 0


def test_no_difference_among_more_images_says_more() -> None:
    """Bonett and Price's interval of none among n: 1.96 sqrt(2) / (n + 2)."""
    for images in (40, 1000):
        wanted = 1.96 * np.sqrt(2) / (images + 2)
        assert bounds(share_difference(np.zeros(images))) == pytest.approx((-wanted, wanted), rel=1e-3)


def test_one_image_that_differs_does_not_tell_two_means_apart() -> None:
    differences = np.zeros(40)
    differences[7] = 0.4
    low, high = bounds(mean_difference(differences))
    assert low < 0 < 0.01 < high


def test_images_that_do_not_differ_have_no_interval() -> None:
    same = scored(Mean(), RNG.normal(size=40))
    assert same.minus(same) == Interval(0.0, None, None, 0.0)
    assert scored(Mean(), np.full(40, 0.25)).interval().low is None
    assert scored(Mean(), np.array([0.25])).interval() == Interval(0.25, None, None, 0.25)
    assert scored(Median(), np.full(40, 0.25)).interval().high is None


def test_pairing_cancels_what_two_sets_share() -> None:
    shared = RNG.normal(size=400)
    one, other = scored(Mean(), shared + 0.1), scored(Mean(), shared + 0.01 * RNG.normal(size=400))
    low, high = bounds(one.minus(other))
    own = bounds(one.interval())
    assert low < 0.1 < high
    assert high - low < 0.05 * (own[1] - own[0])


def test_a_score_that_is_no_mean_is_resampled() -> None:
    """Bounds of a median from its resamples are near those from its order statistics."""
    values = np.sort(RNG.normal(size=101))
    low, high = bounds(scored(Median(), values).interval())
    assert values[38] <= low <= values[42]
    assert values[58] <= high <= values[62]
    shifted = scored(Median(), values + 1).minus(scored(Median(), values))
    assert shifted.value == pytest.approx(1)


def test_the_bias_of_a_distance_is_told_and_taken_off() -> None:
    """Two sets of one distribution: the plain distance is the larger of the smaller set, what remains is not."""
    metric = Distance(8)
    features = np.sqrt(np.diag(metric.real.covariance)) * RNG.normal(size=(2000, 8))
    few, many = scored(metric, features[:100]).interval(), scored(metric, features).interval()
    assert few.measured > 8 * many.measured
    assert few.bias == pytest.approx(few.measured, rel=0.3)
    for interval in (few, many):
        low, high = bounds(interval)
        assert low <= 0.01
        assert low <= interval.value <= high < interval.measured + 0.1


def test_a_distance_of_fewer_images_than_features_says_little() -> None:
    metric = Distance(64)
    interval = scored(metric, RNG.normal(size=(40, 64))).interval()
    low, high = bounds(interval)
    assert low == 0
    assert high >= interval.measured
    caution = scored(metric, RNG.normal(size=(40, 64))).caution
    assert "40 images are few for 64 features" in caution
    assert "320 or more" in caution
    assert not scored(metric, RNG.normal(size=(320, 64))).caution
    assert not scored(Mean(), RNG.normal(size=4)).caution
    assert scored(metric, RNG.normal(size=(3, 64))).interval().low is None
    with pytest.raises(RequestError, match="at least 2 images"):
        scored(metric, RNG.normal(size=(1, 64))).interval()


class Broken(Mean):
    name = "broken"

    def score(self, rows: np.ndarray) -> float:
        return float("nan") if len(rows) % 2 else rows["nothing"]  # type: ignore[call-overload]


def test_a_score_that_fails_is_named() -> None:
    with pytest.raises(RequestError, match="broken makes nan of 3 images"):
        scored(Broken(), np.arange(3)).interval()
    with pytest.raises(RequestError, match="broken cannot score 4 images: IndexError"):
        scored(Broken(), np.arange(4)).interval()
