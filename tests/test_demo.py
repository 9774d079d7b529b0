"""The committed demo model: it draws digits that an independent classifier recognises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Result

DEMO = ROOT / "demo"
FILES = DEMO / "c2i_demo.pt", DEMO / "vq_demo.pt"
IMAGES = 200


@pytest.fixture(scope="module")
def full_cache(export: Callable[..., Path]) -> Path:
    return export(*FILES, "--grid", 16, "--heads", 4, "--policy", "full", "--batch", 10, "--guidance", 3)


def test_the_demo_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) <= 10e6


def test_guided_samples_are_recognised(full_cache: Path) -> None:
    from evaluate_demo import DigitClassifier, class_accuracy

    classifier = DigitClassifier()
    assert classifier.accuracy >= 0.97
    assert class_accuracy(full_cache, classifier, IMAGES, seed=0, guidance=None) >= 0.90


def test_a_quarter_of_the_lines_validates(linert: Callable[..., Result], export: Callable[..., Path]) -> None:
    bundle = export(*FILES, "--grid", 16, "--heads", 4, "--budget-lines", 4, "--batch", 4, "--guidance", 3)
    result = linert("validate", bundle)
    assert result.code == 0, result.out + result.err
