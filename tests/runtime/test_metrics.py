"""The Fréchet distance and class accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from linert.runtime.errors import RequestError
from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance, Gaussian, frechet_distance

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


def test_a_distance_tells_shifted_images_apart() -> None:
    pixels = RNG.normal(size=(300, 3, 2, 2)).astype(np.float32)
    metric = FrechetDistance(lambda images: images.reshape(len(images), -1), pixels.reshape(300, -1))
    near = metric.score(metric.measure(pixels, np.zeros(300, np.int64)))
    far = metric.score(metric.measure(pixels + 0.5, np.zeros(300, np.int64)))
    assert near == pytest.approx(0, abs=1e-5)
    assert far == pytest.approx(12 * 0.25, rel=1e-3)


def test_a_distance_needs_two_images_and_takes_one_feature() -> None:
    metric = FrechetDistance(lambda images: images, RNG.normal(size=(50, 1)))
    with pytest.raises(RequestError, match="at least 2 images, and has 1"):
        metric.score(np.zeros((1, 1)))
    assert metric.score(np.array([[1.0], [3.0]])) > 0


def test_class_accuracy_is_the_share_of_right_images() -> None:
    metric = ClassAccuracy(lambda pixels: pixels[:, 0, 0, 0])
    rows = metric.measure(np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1), np.array([0, 1, 1, 3]))
    assert rows.tolist() == [[1], [1], [0], [1]]
    assert metric.score(rows) == 0.75
