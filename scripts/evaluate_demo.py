#!/usr/bin/env python3
"""Measure how many images of a demo bundle an independent digit classifier recognises.

The classifier (a support vector machine of scikit-learn on pooled pixels) is trained on the real training digits
and checked on the held-out ones; it has never seen the tokenizer or the transformer.

    python scripts/evaluate_demo.py BUNDLE --images 500 --guidance 4
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec
import numpy as np
import torch
from sklearn.svm import SVC
from torch.nn import functional as F
from train_demo import digits, upscale

from linert import Generator
from linert.exporter.intervals import share_interval
from linert.runtime.drawing.samples import asked_for

POOLED_SIDE = 12
MOVED_COPIES = 4


def features(pixels: torch.Tensor) -> np.ndarray:
    """Pooled grey levels ``[n, 144]`` in [0, 1] of ``pixels [n, 3, H, W]``."""
    grey = (pixels.mean(1, keepdim=True).clamp(-1, 1) + 1) / 2
    return F.adaptive_avg_pool2d(grey, POOLED_SIDE).flatten(1).numpy()


class DigitClassifier:
    """Trained on the real training digits, as they are and slightly moved. ``accuracy``: on the held-out ones."""

    def __init__(self) -> None:
        scans, labels = digits("train")
        generator = torch.Generator().manual_seed(1)
        views = [upscale(scans)] + [upscale(scans, generator) for _ in range(MOVED_COPIES)]
        self.model = SVC(C=10, gamma="scale")
        self.model.fit(np.concatenate([features(view) for view in views]), labels.repeat(len(views)))
        held_out, truth = digits("test")
        self.accuracy = float((self(upscale(held_out)) == truth.numpy()).mean())

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """The digit ``[n]`` in each image."""
        return self.model.predict(features(pixels))


def class_accuracy(
    bundle: Path, classifier: DigitClassifier, images: int, seed: int, guidance: float | None
) -> float:
    """Share of ``images`` drawn from ``bundle`` that are recognised as the class asked for."""
    generator = Generator(bundle)
    sampling = generator.manifest.sampling
    if guidance is not None:
        sampling = msgspec.structs.replace(sampling, guidance=guidance)
    drawn = generator.generate(list(range(10)), images, seed, sampling)
    seen = classifier(torch.from_numpy(np.stack([image.pixels for image in drawn])))
    return float((seen == asked_for([image.sample for image in drawn])).mean())


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--guidance", type=float, help="Default: the bundle's.")
def main(bundle: Path, images: int, seed: int, guidance: float | None) -> None:
    classifier = DigitClassifier()
    accuracy = class_accuracy(bundle, classifier, images, seed, guidance)
    interval = share_interval(round(accuracy * images), images)
    result = {
        "bundle": str(bundle),
        "images": images,
        "classifier_on_held_out_digits": round(classifier.accuracy, 4),
        "class_accuracy": round(accuracy, 4),
        "interval_95": [round(interval.low or 0.0, 4), round(interval.high or 1.0, 4)],
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
