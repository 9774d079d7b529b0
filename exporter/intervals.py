"""What a set of images says of a metric, and two sets of their difference, with 95 % intervals.

A mean over images that are right or wrong is a share: Wilson's interval, and Bonett and Price's for paired differences. A
distance between distributions is too large of few images, by what the jackknife finds and takes off. Everything else is
resampled. ``tests/exporter/test_intervals.py`` draws experiments of known truth and counts how many intervals hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from linert.runtime.errors import LinertError, RequestError
from linert.runtime.measuring.metrics import Metric, Rows

CONFIDENCE = 0.95
ROUNDS = 2000
BLOCKS = 20
"""Parts of a set that the jackknife leaves out in turn."""

IMAGES_A_FEATURE = 5
"""With fewer images for each feature, what the jackknife takes off a distance is too rough to be relied on."""

PAIRS_A_FEATURE = 2
"""The same for the difference of two distances, whose errors mostly cancel."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    ``value``: of ever more images like these. ``low``, ``high``: its interval; None where the images tell none, as they are
    too few or do not differ. ``measured``: the plain score of these images, which is above ``value`` by the bias of a
    distance, and ``value`` itself for other metrics.
    """

    value: float
    low: float | None
    high: float | None
    measured: float

    @property
    def bias(self) -> float:
        """What so few images add to the score."""
        return self.measured - self.value

    def text(self, digits: int, sign: str = "") -> str:
        """For people: ``0.975 [0.871, 0.996]``; ``sign`` is ``+`` for a difference.

        Of a distance that may be nothing, its bias being about as large, the bounds alone: ``0.000 to 1.200``.
        """
        form = f"{sign}.{digits}f"
        if self.high is not None and self.value == self.low and self.bias:
            return f"{self.low:{form}} to {self.high:{form}}"
        bounds = "" if self.low is None or self.high is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{bounds}"

    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def require_images(metrics: Sequence[Metric], images: int) -> None:
    """Check before any work that so many images have a score.

    Raises:
        RequestError: a distance of a single image.
    """
    if names := [metric.name for metric in metrics if metric.distance and images < 2]:
        raise RequestError(
            f"{', '.join(names)} needs at least 2 images, and has {images}: draw more --samples"
        )


def of_value(value: float, low: float | None = None, high: float | None = None) -> Interval:
    """The interval of a score that has no bias. Rounding leaves ``value`` inside."""
    if low is None or high is None or not low < high:
        return Interval(value, None, None, value)
    return Interval(value, min(low, value), max(high, value), value)


@dataclass(frozen=True)
class ScoredImages:
    """A set of images under a metric: its ``rows [n, k]`` of them.

    Sets to be subtracted hold the same conditions and seeds in the same order, so that what they share cancels.
    """

    metric: Metric
    rows: Rows

    @cached_property
    def score(self) -> float:
        """The metric of the whole set.

        Raises:
            RequestError: the metric fails, or makes no finite number.
        """
        return self._score(self.rows)

    @cached_property
    def is_mean(self) -> bool:
        """Whether the metric is the mean of one number an image."""
        return self.rows.shape[1] == 1 and math.isclose(
            self.score, float(self.rows.mean()), rel_tol=1e-9, abs_tol=1e-12
        )

    @cached_property
    def is_share(self) -> bool:
        """Whether it is the share of the images that are right."""
        return self.is_mean and bool(np.isin(self.rows, (0, 1)).all())

    @property
    def caution(self) -> str:
        """What is to be said of the intervals of so few images; empty if nothing."""
        images, features = self.rows.shape
        if not self.metric.distance or not self._too_few(IMAGES_A_FEATURE):
            return ""
        return (
            f"{self.metric.name}: {images:,} images are few for {features:,} features, so that its bias is not well known and its "
            f"interval begins at 0; {IMAGES_A_FEATURE * features:,} or more tell it"
        )

    def interval(self) -> Interval:
        """Of the score."""
        if self.metric.distance:
            return self._distance()
        if self.is_share:
            return share_interval(round(self.rows.sum()), len(self.rows))
        if self.is_mean:
            return of_value(self.score, *resampled_mean(self.rows[:, 0]))
        return of_value(self.score, *resampled(lambda images: self._score(self.rows[images]), len(self.rows)))

    def minus(self, other: ScoredImages) -> Interval:
        """Of this score minus that of ``other``, paired image by image."""
        if self.metric.distance:
            return self._distance_minus(other)
        if self.is_share and other.is_share:
            return share_difference(self.rows[:, 0] - other.rows[:, 0])
        if self.is_mean and other.is_mean:
            return mean_difference(self.rows[:, 0] - other.rows[:, 0])
        bounds = resampled(
            lambda images: self._score(self.rows[images]) - self._score(other.rows[images]), len(self.rows)
        )
        return of_value(self.score - other.score, *bounds)

    @cached_property
    def _pseudo_values(self) -> Rows | None:
        """What each block of neighbouring images says of ever more images ``[blocks]``; None if images are too few.

        Their mean is the score without its bias to first order in 1 / n (Quenouille, Tukey). Conditions take turns, so
        that a block of neighbours holds them in the shares that the whole set does.
        """
        blocks = min(BLOCKS, len(self.rows))
        if len(self.rows) < 4:
            return None
        parts = np.array_split(np.arange(len(self.rows)), blocks)
        without = np.array([self._score(np.delete(self.rows, part, axis=0)) for part in parts])
        return blocks * self.score - (blocks - 1) * without

    def _distance(self) -> Interval:
        """A distance is at least 0; of too few images for its features, between 0 and what they show."""
        pseudo = self._pseudo_values
        if pseudo is None:
            return Interval(self.score, None, None, self.score)
        value, spread = float(pseudo.mean()), half_width(pseudo)
        low, high = value - spread, value + spread
        if self._too_few(IMAGES_A_FEATURE):
            low, high = 0.0, max(high, self.score + spread)
        value = min(max(value, 0.0), self.score)
        return Interval(value, max(low, 0.0), max(high, value), self.score)

    def _distance_minus(self, other: ScoredImages) -> Interval:
        measured = self.score - other.score
        ours, theirs = self._pseudo_values, other._pseudo_values
        if ours is None or theirs is None or np.array_equal(ours, theirs):
            return Interval(measured, None, None, measured)
        pseudo = ours - theirs
        value, spread = float(pseudo.mean()), half_width(pseudo)
        low, high = value - spread, value + spread
        if self._too_few(PAIRS_A_FEATURE):
            low, high = min(low, measured - spread), max(high, measured + spread)
        return Interval(value, low, high, measured)

    def _too_few(self, images_a_feature: int) -> bool:
        images, features = self.rows.shape
        return images < images_a_feature * features

    def _score(self, rows: Rows) -> float:
        try:
            score = float(self.metric.score(rows))
        except LinertError:
            raise
        except Exception as error:
            # Whatever a metric of somebody's own raises.
            raise RequestError(
                f"{self.metric.name} cannot score {len(rows)} images: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(score):
            raise RequestError(f"{self.metric.name} makes {score} of {len(rows)} images: mend its score()")
        return score


def share_interval(right: int, images: int) -> Interval:
    """Wilson's interval of a share (JASA 22, 1927)."""
    bounds = stats.binomtest(right, images).proportion_ci(CONFIDENCE, method="wilson")
    return of_value(right / images, float(bounds.low), float(bounds.high))


def share_difference(differences: Rows) -> Interval:
    """Interval of the difference of two paired shares, of ``differences [n]`` that are -1, 0 or 1.

    Two pairs that differ, one in either direction, are added to those seen (Bonett & Price, J. Educ. Behav. Stat. 37, 2012):
    so a single pair that differs, or none, does not pass for certainty.
    """
    value = float(differences.mean())
    seen = np.append(differences, (1, -1))
    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    spread = float(z * seen.std() / math.sqrt(len(seen)))
    middle = float(seen.mean())
    return of_value(value, max(middle - spread, -1.0), min(middle + spread, 1.0))


def mean_difference(differences: Rows) -> Interval:
    """Interval of the mean of paired ``differences [n]``.

    As for shares, two differences of the usual size, one in either direction, are added before resampling: where few
    images differ, resamples of them alone are too much alike.
    """
    value = float(differences.mean())
    others = differences[differences != 0]
    if not len(others):
        return of_value(value)
    usual = math.sqrt(float(np.square(others).mean()))
    return of_value(value, *resampled_mean(np.append(differences, (usual, -usual))))


def resampled_mean(values: Rows) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile bootstrap bounds of the mean of ``values [n]``; None of fewer than two."""
    if len(values) < 2:
        return None, None
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=ROUNDS,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def resampled(score: Callable[[np.ndarray], float], images: int) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile bootstrap bounds of ``score``, a function of the numbers of the images that are in the set."""
    if images < 2:
        return None, None
    bounds = stats.bootstrap(
        (np.arange(images),),
        score,
        vectorized=False,
        n_resamples=ROUNDS,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def half_width(pseudo_values: Rows) -> float:
    """Half of the 95 % interval of the mean of independent ``pseudo_values [n]``."""
    n = len(pseudo_values)
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * pseudo_values.std(ddof=1) / math.sqrt(n))
