"""A request for one image: a class, a prompt or a caption's features, and a seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from linert.runtime.bundles.manifest import Record
from linert.runtime.errors import RequestError

MAX_SEED = 2**63 - 1

MOST_IMAGES = 1_000_000
"""Images of one request: twenty times what quality is measured on. All are listed before the first is drawn."""

SLUG_LETTERS = 40
"""Most letters of a prompt, or of a caption's name, in a file name."""


class ClassLabel(Record, frozen=True, tag="class"):
    """A class of the model."""

    class_id: int

    @property
    def slug(self) -> str:
        """For file names."""
        return f"class_{self.class_id:04d}"

    @property
    def label(self) -> str:
        """For people, short."""
        return f"{self.class_id}"


class Prompt(Record, frozen=True, tag="prompt"):
    """Text, and what guidance leads away from: None is the model's own unconditional sequence."""

    text: str
    negative: str | None = None

    @property
    def slug(self) -> str:
        words = re.sub(r"[^\w]+", "-", self.text.lower())[:SLUG_LETTERS].strip("-")
        digest = hashlib.sha256(f"{self.text}\0{self.negative}".encode()).hexdigest()[:8]
        return f"{words or 'prompt'}_{digest}"

    @property
    def label(self) -> str:
        return shortened(self.text)


class Caption(Record, frozen=True, tag="caption"):
    """Features that a text encoder made of a caption: their digest, and the name of where they are."""

    sha256: str
    name: str

    @property
    def slug(self) -> str:
        # Its end tells which of a file it is.
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.name)[-SLUG_LETTERS:].strip("-")
        return f"{words or 'caption'}_{self.sha256[:8]}"

    @property
    def label(self) -> str:
        return shortened(self.name)


Condition = ClassLabel | Prompt | Caption


class Sample(Record, frozen=True):
    """One image to draw; together with bundle and settings it determines the image."""

    condition: Condition
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)]

    @property
    def file_name(self) -> str:
        """Of its picture."""
        return f"{self.condition.slug}_seed_{self.seed:06d}.png"

    @property
    def label(self) -> str:
        """Below its picture on a contact sheet."""
        return f"{self.condition.label} · {self.seed}"


def shortened(text: str, letters: int = 24) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= letters else f"{line[: letters - 1]}…"


def list_samples(conditions: Sequence[Condition], num_images: int | None, seed: int) -> list[Sample]:
    """Assign a condition and a seed to every image.

    Conditions take turns until ``num_images`` are listed (default: one each). The k-th image of a condition, from 0, has seed
    ``seed + k``: the same request with more images begins with the same ones.

    Raises:
        RequestError: no condition, fewer than one image or more than :data:`MOST_IMAGES`, a seed out of range, or no whole numbers.
    """
    for name, value in (
        ("num_images", len(conditions) if num_images is None else num_images),
        ("seed", seed),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}, must be a whole number")
    # Sums of numpy's integers may overflow.
    count, seed = len(conditions) if num_images is None else int(num_images), int(seed)
    faults = []
    if not conditions:
        faults.append("nothing to draw was given")
    if conditions and not 1 <= count <= MOST_IMAGES:
        faults.append(f"{count} images asked for, must be at least 1 and at most {MOST_IMAGES}")
    if not 0 <= seed <= MAX_SEED - max(count, 0):
        faults.append(f"seed {seed} out of range 0 to {MAX_SEED - max(count, 0)}")
    if faults:
        raise RequestError("; ".join(faults))
    drawn: dict[Condition, int] = {}
    samples = []
    for index in range(count):
        condition = conditions[index % len(conditions)]
        samples.append(Sample(condition, seed + drawn.get(condition, 0)))
        drawn[condition] = drawn.get(condition, 0) + 1
    return samples


def asked_for(samples: Sequence[Sample]) -> NDArray[np.generic]:
    """What was asked for: class ids ``[n]`` int64, or prompts (names of captions) ``[n]`` as text."""
    labels = [sample.condition for sample in samples]
    classes = [label.class_id for label in labels if isinstance(label, ClassLabel)]
    if len(classes) == len(labels):
        return np.array(classes, np.int64)
    return np.array([label.text if isinstance(label, Prompt) else label.label for label in labels])
