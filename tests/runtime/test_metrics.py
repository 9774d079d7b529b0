"""The Fréchet distance, bootstrap intervals, and metrics that come from elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.errors import RequestError
from runtime.metrics import (
    Bootstrap,
    ClassAccuracy,
    FrechetDistance,
    Gaussian,
    frechet_distance,
    load_metrics,
)

RNG = np.random.default_rng(0)


def test_frechet_distance_of_gaussians_with_a_closed_form() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 over the standard deviations of the common axes."""
    axes, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    one, other = RNG.uniform(0.1, 3, (2, 5))
    shift = RNG.normal(size=5)
    first = Gaussian(np.zeros(5), axes @ np.diag(one**2) @ axes.T)
    second = Gaussian(shift, axes @ np.diag(other**2) @ axes.T)
    wanted = shift @ shift + ((one - other) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_equals_the_matrix_square_root_in_general() -> None:
    """Against eigenvalues of the product of two covariances that do not commute."""
    one, other = (Gaussian.of(RNG.normal(size=(40, 6)) @ RNG.normal(size=(6, 6))) for _ in range(2))
    roots = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).real.clip(min=0))
    shift = one.mean - other.mean
    wanted = shift @ shift + np.trace(one.covariance + other.covariance) - 2 * roots.sum()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-8)


def test_intervals_cover_and_pairing_cancels() -> None:
    metric = ClassAccuracy(lambda pixels: pixels)
    rows = (RNG.random((400, 1)) < 0.9).astype(float)
    whole = Bootstrap.of(metric.score, rows)
    interval = whole.interval()
    assert interval.value == rows.mean()
    assert interval.low < 0.9 < interval.high
    assert interval.high - interval.low == pytest.approx(4 * np.sqrt(0.09 / 400), rel=0.25)
    same = (whole - Bootstrap.of(metric.score, rows)).interval()
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = rows.copy()
    worse[:40] = 0
    difference = (Bootstrap.of(metric.score, worse) - whole).interval()
    assert difference.high < 0
    assert difference.high - difference.low < 1.5 * (interval.high - interval.low)


def test_a_distance_tells_shifted_images_apart() -> None:
    pixels = RNG.normal(size=(300, 3, 2, 2)).astype(np.float32)
    metric = FrechetDistance(lambda images: images.reshape(len(images), -1), pixels.reshape(300, -1))
    near = metric.score(metric.measure(pixels, np.zeros(300, np.int64)))
    far = metric.score(metric.measure(pixels + 0.5, np.zeros(300, np.int64)))
    assert near == pytest.approx(0, abs=1e-5)
    assert far == pytest.approx(12 * 0.25, rel=1e-3)


METRICS = """
import numpy as np
from helper import SHIFT
from runtime.metrics import Metric

class Brightness(Metric):
    name, higher_is_better = "brightness", True
    def measure(self, pixels, classes):
        return pixels.mean((1, 2, 3), dtype=np.float64)[:, None] + SHIFT
    def score(self, rows):
        return float(rows.mean())

def metrics():
    return [Brightness()]

def nothing():
    return []
"""


@pytest.fixture
def metric_file(tmp_path: Path) -> Path:
    path = tmp_path / "some_metrics.py"
    path.write_text(METRICS)
    (tmp_path / "helper.py").write_text("SHIFT = 1.0")
    return path


def test_metrics_come_from_a_file_or_a_module(metric_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (metric,) = load_metrics(str(metric_file))
    assert metric.measure(np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.int64)).tolist() == [[1], [1]]
    monkeypatch.syspath_prepend(str(metric_file.parent))
    assert load_metrics("some_metrics:metrics")[0].name == "brightness"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}:nothing", "returned no"),
        ("{}:absent", "has no function absent"),
        ("missing.py", "no file missing.py"),
        ("missing.module", "cannot import missing.module"),
    ],
)
def test_metrics_that_are_none_are_refused(source: str, message: str, metric_file: Path) -> None:
    with pytest.raises(RequestError, match=message):
        load_metrics(source.format(metric_file))
