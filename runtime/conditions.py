"""Conditions as the prefill stage takes them: class ids, prompts as tokens, features of captions."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.manifest import CaptionInput, ClassInput, PromptInput
from runtime.samples import Caption, ClassLabel, Condition, Prompt, shortened
from runtime.text_encoder import TextEncoder
from runtime.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from runtime.backend import Backend

Inputs = dict[str, NDArray[Any]]

USUAL_PROMPTS = (
    "a red fox sitting in fresh snow at the edge of a forest",
    "a bowl of ripe oranges on a blue wooden table, soft morning light",
    "an old stone lighthouse on a cliff above a stormy sea",
    "a portrait of a woman in a yellow raincoat, rain on the window behind her",
    "a small robot watering flowers on a balcony, watercolour",
    "a narrow street in a mountain village at night, lanterns and wet cobblestones",
    "a steam train crossing a high stone bridge in autumn",
    "a close-up of a dragonfly on a reed, shallow depth of field",
)
"""What is drawn where a command needs any prompts and none are given."""


class Conditioner(ABC):
    """Turns what people ask for into the inputs of a prefill stage.

    Args:
        prefix_len: positions of a condition.
        guided: whether there are unconditional rows.
    """

    def __init__(self, prefix_len: int, *, guided: bool) -> None:
        self.prefix_len, self.guided = prefix_len, guided

    @abstractmethod
    def check(self, conditions: Iterable[Condition]) -> None:
        """Raise :class:`RequestError` for what the bundle cannot draw, before anything is drawn."""

    @abstractmethod
    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        """The prefill stage's inputs for one condition an image of a batch.

        Raises:
            RequestError: as :meth:`check` does.
        """

    @abstractmethod
    def usual(self) -> list[Condition]:
        """Conditions for a command that needs any and was given none."""

    def _check_negative(self, prompt: Prompt) -> None:
        if prompt.negative is not None and not self.guided:
            raise RequestError(
                "a negative prompt needs unconditional rows and the bundle was exported without: export it with "
                "--guidance above 1"
            )

    def _refuse_others(self, conditions: Iterable[Condition], kind: type, remedy: str) -> None:
        if any(not isinstance(condition, kind) for condition in conditions):
            raise RequestError(f"the model does not draw what was asked for; {remedy}")


class ClassConditioner(Conditioner):
    """Of a model of classes."""

    def __init__(self, spec: ClassInput, prefix_len: int, *, guided: bool) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec = spec

    def check(self, conditions: Iterable[Condition]) -> None:
        listed = list(conditions)
        self._refuse_others(listed, ClassLabel, "it has classes: say which with --classes")
        known = self.spec.num_classes
        ids = {label.class_id for label in listed if isinstance(label, ClassLabel)}
        if wrong := sorted(number for number in ids if not 0 <= number < known):
            raise RequestError(
                f"class {', '.join(map(str, wrong))} out of range: the model has classes 0 to {known - 1}"
            )

    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        self.check(conditions)
        ids = [label.class_id for label in conditions if isinstance(label, ClassLabel)]
        return {"class_ids": np.array(ids, np.int64)}

    def usual(self) -> list[Condition]:
        """All classes."""
        return [ClassLabel(number) for number in range(self.spec.num_classes)]


class PromptConditioner(Conditioner):
    """Of a model that reads prompts, by the ``tokenizer`` file."""

    def __init__(self, spec: PromptInput, prefix_len: int, tokenizer: Path, *, guided: bool) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec, self.path = spec, tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.path)

    @cached_property
    def _special(self) -> list[str]:
        """Texts that the tokenizer does not take for text; longest first.

        Tokenizers also list whole letters and words beside their vocabulary, which are text.
        """
        added = self._tokenizer.get_added_tokens_decoder().values()
        marked = [token.content for token in added if token.special or re.fullmatch("<.+>", token.content)]
        return sorted(marked, key=len, reverse=True)

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt, from the beginning of the sentence to that of the image.

        Raises:
            RequestError: it is longer than the prefix of the bundle, or contains the text of a special token.
        """
        spec = self.spec
        text = prompt.strip() if spec.stripped else prompt
        if held := next((token for token in self._special if token in text), None):
            raise RequestError(
                f"the prompt {shortened(text)!r} contains {held!r}, which the tokenizer takes for a special token: leave it out"
            )
        found = self._encoded(text)
        capacity = self.prefix_len
        if len(found) > capacity:
            raise RequestError(
                f"the prompt {shortened(text)!r} has {len(found)} tokens, {len(spec.first) + len(spec.last)} of them special, and the "
                f"bundle's prefix has room for {capacity}: shorten it, or export with --prompt-tokens {len(found)} or more"
            )
        return found

    def check(self, conditions: Iterable[Condition]) -> None:
        for prompt in set(self._prompts(list(conditions))):
            self.tokens(prompt.text)
            self.tokens(prompt.negative or "")

    def _prompts(self, conditions: Sequence[Condition]) -> list[Prompt]:
        """``conditions``, which must all be prompts that the bundle has rows for."""
        self._refuse_others(
            conditions, Prompt, "it reads prompts: say what to draw with --prompt or --prompt-file"
        )
        prompts = [prompt for prompt in conditions if isinstance(prompt, Prompt)]
        for prompt in prompts:
            self._check_negative(prompt)
        return prompts

    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        prompts = self._prompts(conditions)
        found = self._padded("prompt", [prompt.text for prompt in prompts])
        if self.guided:
            found |= self._padded("negative", [prompt.negative for prompt in prompts])
        return found

    def _padded(self, kind: str, texts: Sequence[str | None]) -> Inputs:
        """Tokens ``[I, T]``, padded on the left, and the padding ``[I]``: -1 for a text that is None."""
        capacity = self.prefix_len
        # Padding is seen by nothing; it repeats a token that there is.
        tokens = np.full((len(texts), capacity), self.spec.first[0], np.int64)
        starts = np.full(len(texts), -1, np.int64)
        for row, text in enumerate(texts):
            if text is not None:
                found = self.tokens(text)
                starts[row] = capacity - len(found)
                tokens[row, starts[row] :] = found
        return {f"{kind}_tokens": tokens, f"{kind}_starts": starts}

    def usual(self) -> list[Condition]:
        """Prompts of our own, as much of each as fits."""
        return [Prompt(self._cut(text)) for text in USUAL_PROMPTS]

    def _cut(self, text: str) -> str:
        """The first words of ``text`` that fit the prefix."""
        words = text.split()
        while words and len(self._encoded(" ".join(words))) > self.prefix_len:
            words.pop()
        return " ".join(words)

    def _encoded(self, text: str) -> list[int]:
        spec = self.spec
        whole = spec.template.replace("{prompt}", text)
        return [*spec.first, *self._tokenizer.encode(whole, add_special_tokens=False).ids, *spec.last]


class CaptionConditioner(Conditioner):
    """Of a model that sees features of a text encoder.

    ``encoder`` makes them of prompts; None where the bundle has none.
    """

    def __init__(
        self, spec: CaptionInput, prefix_len: int, encoder: TextEncoder | None, *, guided: bool
    ) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec, self.encoder = spec, encoder
        self._features: dict[str, NDArray[np.float32]] = {}
        self._encoded: dict[str, NDArray[np.float32]] = {}

    def add(self, features: NDArray[Any], name: str) -> Caption:
        """Make features known that can then be drawn.

        Args:
            features: ``[length, feature_dim]``; rows of nothing but zeros at either end are padding, and go.
            name: what to call them.

        Raises:
            RequestError: of another shape, longer than the bundle's prefix, not finite, or nothing but zeros.
        """
        capacity, width = self.prefix_len, self.spec.feature_dim
        if features.ndim != 2 or features.shape[1] != width or features.dtype.kind != "f":
            raise RequestError(
                f"{name}: features must be real numbers of shape [length, {width}], not {features.dtype} {features.shape}"
            )
        if not np.isfinite(features).all():
            raise RequestError(f"{name}: features that are not finite")
        [held] = np.nonzero(features.any(axis=1))
        if not len(held):
            raise RequestError(f"{name}: features that are nothing but zeros")
        kept = np.ascontiguousarray(features[held[0] : held[-1] + 1], np.float32)
        if len(kept) > capacity:
            raise RequestError(
                f"{name}: features of {len(kept)} tokens; the bundle's prefix has room for {capacity}"
            )
        digest = hashlib.sha256(kept.tobytes()).hexdigest()
        self._features[digest] = kept
        return Caption(digest, name)

    def read(self, path: Path) -> list[Caption]:
        """:meth:`add` all features of a ``.npy`` file: ``[length, feature_dim]`` or ``[n, length, feature_dim]``.

        Raises:
            RequestError: no such file, no ``.npy``, or no features that fit.
        """
        try:
            values = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise RequestError(f"{path} does not exist") from None
        except (OSError, ValueError, EOFError) as error:
            raise RequestError(f"{path} is no .npy file: {error}") from error
        if not isinstance(values, np.ndarray) or values.ndim not in (2, 3):
            raise RequestError(
                f"{path} must hold one array of features, [length, d] or [captions, length, d]"
            )
        if values.ndim == 2:
            return [self.add(values, path.name)]
        return [self.add(row, f"{path.name} {number}") for number, row in enumerate(values)]

    def check(self, conditions: Iterable[Condition]) -> None:
        for condition in conditions:
            if isinstance(condition, Prompt) and self.encoder is not None:
                self.encoder.tokens(condition.text)
                self.encoder.tokens(condition.negative or "")
                self._check_negative(condition)
            elif not isinstance(condition, Caption):
                remedy = "export it with --text-encoder for prompts" if self.encoder is None else "or prompts"
                raise RequestError(
                    "the model does not draw what was asked for; it sees features of captions: give them with --captions FILE.npy, "
                    f"{remedy}"
                )
            elif condition.sha256 not in self._features:
                raise RequestError(
                    f"the features of {condition.name} (sha256 {condition.sha256[:16]}) are not there: give them with --captions"
                )

    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        listed = list(conditions)
        self.check(listed)
        found = self._padded("caption", [self._of(condition) for condition in listed])
        if self.guided:
            negative = [label.negative if isinstance(label, Prompt) else None for label in listed]
            rows = [None if text is None else self._encode(text) for text in negative]
            found |= self._padded("negative", rows)
        return found

    def _of(self, condition: Condition) -> NDArray[np.float32]:
        if isinstance(condition, Caption):
            return self._features[condition.sha256]
        if isinstance(condition, Prompt):
            return self._encode(condition.text)
        raise TypeError(f"{condition} is neither a caption nor a prompt")

    def _encode(self, text: str) -> NDArray[np.float32]:
        if self.encoder is None:
            raise RequestError("the bundle has no text encoder: export it with --text-encoder")
        if text not in self._encoded:
            self._encoded[text] = self.encoder(text)
        return self._encoded[text]

    def _padded(self, kind: str, rows: Sequence[NDArray[np.float32] | None]) -> Inputs:
        capacity, width = self.prefix_len, self.spec.feature_dim
        features = np.zeros((len(rows), capacity, width), np.float32)
        starts = np.full(len(rows), -1, np.int64)
        for index, row in enumerate(rows):
            if row is not None:
                starts[index] = capacity - len(row)
                features[index, starts[index] :] = row
        return {f"{kind}_features": features, f"{kind}_starts": starts}

    def usual(self) -> list[Condition]:
        """Prompts of our own if there is an encoder, else noise of every length."""
        if self.encoder is not None:
            return [Prompt(text) for text in USUAL_PROMPTS]
        random = np.random.default_rng(0)
        capacity, width = self.prefix_len, self.spec.feature_dim
        lengths = np.linspace(1, capacity, 8).astype(int)
        return [
            self.add(random.standard_normal((length, width), np.float32), f"noise of {length}")
            for length in lengths
        ]


def conditioner_of(
    spec: ClassInput | PromptInput | CaptionInput,
    prefix_len: int,
    folder: Path,
    open_stage: Callable[[], Backend] | None = None,
    *,
    guided: bool,
) -> Conditioner:
    """What turns requests into the inputs of a model that draws what ``spec`` says; its files are in ``folder``.

    Args:
        open_stage: loads the text encoder's stage, if there is one.
    """
    if isinstance(spec, ClassInput):
        return ClassConditioner(spec, prefix_len, guided=guided)
    if isinstance(spec, PromptInput):
        return PromptConditioner(spec, prefix_len, folder / spec.tokenizer, guided=guided)
    encoder = None
    if spec.encoder is not None and open_stage is not None:
        encoder = TextEncoder(open_stage, folder / spec.tokenizer, prefix_len)
    return CaptionConditioner(spec, prefix_len, encoder, guided=guided)


def conditions_of(values: Iterable[Condition | int | str]) -> list[Condition]:
    """Numbers are classes and texts are prompts."""
    found: list[Condition] = []
    for value in values:
        if isinstance(value, str):
            found.append(Prompt(value))
        elif isinstance(value, ClassLabel | Prompt | Caption):
            found.append(value)
        else:
            found.append(ClassLabel(int(value)))
    return found
