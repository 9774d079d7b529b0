"""The committed demo models: what they draw is recognised by an independent classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT, Result

if TYPE_CHECKING:
    from evaluate_demo import DigitClassifier

DEMO = ROOT / "demo"
FILES = DEMO / "c2i_demo.pt", DEMO / "vq_demo.pt"
LASADGEN = DEMO / "lasadgen_demo"
LPD = DEMO / "lpd_demo.pth"
WORDS = DEMO / "words"
PAIRS = DEMO / "c2i_pairs.pt", DEMO / "vq_pairs.pt"
OPTIONS = ("--grid", 16, "--heads", 4, "--guidance", 3)
IMAGES = 100


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    from evaluate_demo import DigitClassifier

    return DigitClassifier()


@pytest.fixture(scope="module")
def full_cache(export: Callable[..., Path]) -> Path:
    return export(*FILES, *OPTIONS, "--policy", "full", "--batch", 10)


def test_the_demo_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) <= 10e6
    assert sum(path.stat().st_size for path in WORDS.iterdir()) <= 12e6
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 28e6


def test_guided_samples_are_recognised(full_cache: Path, classifier: DigitClassifier) -> None:
    from evaluate_demo import class_accuracy

    assert classifier.accuracy >= 0.97
    assert class_accuracy(full_cache, classifier, IMAGES, seed=0, guidance=None) >= 0.90


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_digits_without_a_cache(
    precision: str, linert: Callable[..., Result], export: Callable[..., Path], classifier: DigitClassifier
) -> None:
    """The LASADGen demo costs in every precision what that may, and what it draws is recognised."""
    from evaluate_demo import class_accuracy

    options = ("--guidance", 3, "--batch", 10, "--precision", precision, "--block-size", 32)
    bundle = export(LASADGEN, FILES[1], *options)
    result = linert("validate", bundle)
    assert result.code == 0, result.out + result.err
    assert class_accuracy(bundle, classifier, IMAGES, seed=0, guidance=None) >= 0.90


def test_digits_in_twenty_steps(
    linert: Callable[..., Result], export: Callable[..., Path], classifier: DigitClassifier
) -> None:
    """What the LPD demo draws, in steps of many tokens, is recognised."""
    from evaluate_demo import class_accuracy

    assert LPD.stat().st_size <= 3.5e6
    bundle = export(LPD, FILES[1], "--heads", 4, "--batch", 10)
    result = linert("validate", bundle)
    assert result.code == 0, result.out + result.err
    assert class_accuracy(bundle, classifier, IMAGES, seed=0, guidance=None) >= 0.90


def test_a_quarter_of_the_lines_validates(linert: Callable[..., Result], export: Callable[..., Path]) -> None:
    bundle = export(*FILES, *OPTIONS, "--budget-lines", 4, "--batch", 4)
    result = linert("validate", bundle)
    assert result.code == 0, result.out + result.err


def test_pairs_are_repeated_from_far_above(export: Callable[..., Path], classifier: DigitClassifier) -> None:
    """With all lines the digits below are those above; a window that lost them can only guess the right one."""
    import numpy as np
    from pair_metrics import RepeatAccuracy

    from linert import Generator
    from linert.runtime.drawing.cache_request import CacheRequest

    generator = Generator(export(*PAIRS, *OPTIONS, "--policy", "streaming,full", "--batch", 30))
    manifest, metric = generator.manifest, RepeatAccuracy(classifier)
    repeated = {}
    for policy, lines in (("full", 16), ("streaming", 4)):
        request = CacheRequest(policy=policy, budget_lines=lines)
        cache = request.settle(manifest.raster, manifest.capacity_lines, manifest.cache)
        images = generator.generate(range(10), 30, seed=3, cache=cache)
        pixels = np.stack([image.pixels for image in images])
        repeated[policy] = metric.score(metric.measure(pixels, np.zeros(30, np.int64)))
    assert repeated["full"] >= 0.9
    assert repeated["streaming"] <= 0.5


def test_words_become_pictures_of_their_colours(linert: Callable[..., Result], tmp_path: Path) -> None:
    """Names and paraphrases are read: what is drawn is of the colour of what they name."""
    import numpy as np

    from linert import Generator

    bundle = tmp_path / "bundle"
    options = ("--prompt-tokens", 28, "--guidance", 1.5, "--temperature", 0.5)
    result = linert("export", WORDS, "--policy", "full", "--batch", 6, *options, "--out", bundle)
    assert result.code == 0, result.err
    colours = {
        "a red apple": (1, 0, 0),
        "tomato": (1, 0, 0),
        "green heart": (0, 1, 0),
        "show me a cactus": (0, 1, 0),
        "blue heart": (0, 0, 1),
        "draw a blue book": (0, 0, 1),
    }
    with Generator(bundle) as generator:
        images = generator.generate(list(colours), seed=1)
    of_prompt = np.array([np.argmax(colours[image.sample.condition.text]) for image in images])
    levels = np.stack([(image.pixels.clip(-1, 1) + 1) / 2 for image in images])
    coloured = np.ptp(levels, axis=1, keepdims=True) > 0.25
    means = (levels * coloured).sum((2, 3)) / coloured.sum((2, 3))
    assert (means.argmax(1) == of_prompt).sum() >= 5
