"""Conditions as the prefill stage takes them: class ids, prompts as tokens, features of captions."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.manifest import CaptionInput, ClassInput, PromptInput
from linert.runtime.drawing.caption_encoder import CaptionEncoder
from linert.runtime.drawing.samples import Caption, ClassLabel, Condition, Prompt, shortened
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import RequestError
from linert.runtime.files.text_files import is_lfs_pointer, lfs_remedy

if TYPE_CHECKING:
    from linert.runtime.backends.base import Backend

Inputs = dict[str, NDArray[Any]]

REMEMBERED = 256
"""Prompts whose features are kept for the next image, the latest ones: a batch needs its own, and a negative prompt all the time."""

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

    def begins(self, inputs: Inputs) -> NDArray[np.int64]:
        """The first position ``[I]`` of each image's conditions that is not padding, of what :meth:`inputs` made."""
        starts = [
            np.where(values < 0, self.prefix_len, values)
            for name, values in inputs.items()
            if name.endswith("_starts")
        ]
        images = len(next(iter(inputs.values())))
        return np.min(starts, axis=0).astype(np.int64) if starts else np.zeros(images, np.int64)

    @abstractmethod
    def usual(self) -> list[Condition]:
        """Conditions for a command that needs any and was given none."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what it holds of a device."""

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
    """Of a model that reads prompts.

    ``open_tokenizer``: reads its tokenizer when it is first needed. ``vocabulary``: rows of the embedding of its tokens, beyond which a tokenizer may have more; None if that is not known.
    """

    def __init__(
        self,
        spec: PromptInput,
        prefix_len: int,
        open_tokenizer: Callable[[], TextTokenizer],
        vocabulary: int | None,
        *,
        guided: bool,
    ) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec, self._open_tokenizer, self.vocabulary = spec, open_tokenizer, vocabulary

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return self._open_tokenizer()

    @cached_property
    def _template_specials(self) -> int:
        """Special tokens of the template without a prompt."""
        return len(self._tokenizer.specials_among(self._encoded("")))

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt, from the beginning of the sentence to that of the image.

        Raises:
            RequestError: it is longer than the prefix of the bundle, contains the text of a special token or what the tokenizer leaves
                out, or becomes a token that the model has no embedding for.
        """
        spec = self.spec
        text = prompt.strip() if spec.stripped else prompt
        names = self._tokenizer.special.values()
        if special := max((name for name in names if name in text), key=len, default=None):
            raise RequestError(
                f"the prompt {shortened(text)!r} contains {special!r}, which the tokenizer takes for a special token: leave it out"
            )
        ids = self._encoded(text)
        # Letters that the tokenizer takes for others may spell one as well.
        if len(self._tokenizer.specials_among(ids)) != self._template_specials:
            raise RequestError(
                f"the tokenizer takes a part of the prompt {shortened(text)!r} for a special token: leave it out"
            )
        if self.vocabulary is not None:
            check_embedded(ids, self.vocabulary, self._tokenizer, text)
        capacity = self.prefix_len
        if len(ids) > capacity:
            raise RequestError(
                f"the prompt {shortened(text)!r} has {len(ids)} tokens, {len(spec.first) + len(spec.last)} of them special, and the "
                f"bundle's prefix has room for {capacity}: shorten it, or export with --prompt-tokens {len(ids)} or more"
            )
        return ids

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
        arrays = self._padded("prompt", [prompt.text for prompt in prompts])
        if self.guided:
            arrays |= self._padded("negative", [prompt.negative for prompt in prompts])
        return arrays

    def _padded(self, kind: str, texts: Sequence[str | None]) -> Inputs:
        """Tokens ``[I, T]``, padded on the left, and the padding ``[I]``: -1 for a text that is None."""
        capacity = self.prefix_len
        # Padding is seen by nothing; it repeats a token that there is.
        tokens = np.full((len(texts), capacity), self.spec.first[0], np.int64)
        starts = np.full(len(texts), -1, np.int64)
        for row, text in enumerate(texts):
            if text is not None:
                ids = self.tokens(text)
                starts[row] = capacity - len(ids)
                tokens[row, starts[row] :] = ids
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
        return [*spec.first, *self._tokenizer.ids(whole), *spec.last]


def check_embedded(ids: Sequence[int], rows: int, tokenizer: TextTokenizer, text: str) -> None:
    """Raise :class:`RequestError` for a token of ``text`` beyond the ``rows`` of an embedding."""
    if beyond := [number for number in ids if not 0 <= number < rows]:
        named = {number: name for name, number in tokenizer.vocabulary.items()}
        raise RequestError(
            f"{shortened(text)!r} becomes token {beyond[0]}, {named.get(beyond[0], 'of no name')!r}, and the model has embeddings for "
            f"{rows}: the tokenizer {tokenizer.path} has tokens that the model was not trained with; word it without that token"
        )


class CaptionConditioner(Conditioner):
    """Of a model that sees features of a text encoder.

    ``encoder`` makes them of prompts; None where the bundle has none.
    """

    def __init__(
        self, spec: CaptionInput, prefix_len: int, encoder: CaptionEncoder | None, *, guided: bool
    ) -> None:
        super().__init__(prefix_len, guided=guided)
        self.spec, self.encoder = spec, encoder
        self._features: dict[str, NDArray[np.float32]] = {}
        self._encoded: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

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
        # What is too large for float32 becomes infinite, which is looked for.
        with np.errstate(all="ignore"):
            [nonzero] = np.nonzero(features.any(axis=1))
            if not len(nonzero):
                raise RequestError(f"{name}: features that are nothing but zeros")
            length = int(nonzero[-1] + 1 - nonzero[0])
            if length > capacity:
                raise RequestError(
                    f"{name}: features of {length} tokens; the bundle's prefix has room for {capacity}"
                )
            kept = np.ascontiguousarray(features[nonzero[0] : nonzero[-1] + 1], np.float32)
        if not np.isfinite(kept).all():
            raise RequestError(f"{name}: features that are not finite, or not in float32")
        digest = hashlib.sha256(kept.tobytes()).hexdigest()
        self._features[digest] = kept
        return Caption(digest, name)

    def read(self, path: Path) -> list[Caption]:
        """:meth:`add` all features of a ``.npy`` file: ``[length, feature_dim]`` or ``[n, length, feature_dim]``.

        Raises:
            RequestError: no such file, no ``.npy``, or no features that fit.
        """
        # A name is shown and recorded, in whatever bytes the file system has it.
        name = path.name.encode(errors="replace").decode()
        values = _mapped_array(path)
        if values.ndim not in (2, 3):
            raise RequestError(
                f"{path} must hold one array of features, [length, d] or [captions, length, d], not {list(values.shape)}"
            )
        if values.ndim == 2:
            return [self.add(values, name)]
        return [self.add(row, f"{name} {number}") for number, row in enumerate(values)]

    def features(self, conditions: Iterable[Condition]) -> dict[str, NDArray[np.float32]]:
        """The features ``[length, feature_dim]`` of the captions among ``conditions``, by their digest."""
        return {
            condition.sha256: self._features[condition.sha256]
            for condition in conditions
            if isinstance(condition, Caption)
        }

    def keep(self, features: Mapping[str, NDArray[np.float32]]) -> None:
        """Know these :meth:`features` of another conditioner, and no others."""
        self._features = dict(features)

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
        arrays = self._padded("caption", [self._of(condition) for condition in listed])
        if self.guided:
            negative = [label.negative if isinstance(label, Prompt) else None for label in listed]
            rows = [None if text is None else self._encode(text) for text in negative]
            arrays |= self._padded("negative", rows)
        return arrays

    def _of(self, condition: Condition) -> NDArray[np.float32]:
        if isinstance(condition, Caption):
            return self._features[condition.sha256]
        if isinstance(condition, Prompt):
            return self._encode(condition.text)
        raise TypeError(f"{condition} is neither a caption nor a prompt")

    def _encode(self, text: str) -> NDArray[np.float32]:
        if self.encoder is None:
            raise RequestError("the bundle has no text encoder: export it with --text-encoder")
        features = self._encoded.pop(text, None)
        if features is None:
            features = self.encoder(text)
        self._encoded[text] = features
        while len(self._encoded) > REMEMBERED:
            self._encoded.popitem(last=False)
        return features

    def close(self) -> None:
        if self.encoder is not None:
            self.encoder.close()

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


def _mapped_array(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file, mapped: of what its header promises nothing is allocated.

    Raises:
        RequestError: no such file, or it is none.
    """
    if not path.is_file():
        raise RequestError(f"{path} does not exist" if not path.exists() else f"{path} is no .npy file")
    if is_lfs_pointer(path):
        raise RequestError(lfs_remedy(path))
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        # A damaged header fails in whatever way its text leads to.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RequestError(f"{path} is no .npy file: {reason}") from error
    if not isinstance(values, np.ndarray):
        raise RequestError(
            f"{path} holds several arrays, as .npz files do: save the features alone, by numpy.save"
        )
    return values


def conditioner_of(
    spec: ClassInput | PromptInput | CaptionInput,
    prefix_len: int,
    open_tokenizer: Callable[[], TextTokenizer],
    open_stage: Callable[[], Backend] | None = None,
    *,
    guided: bool,
    vocabulary: int | None = None,
) -> Conditioner:
    """What turns requests into the inputs of a model that draws what ``spec`` says.

    Args:
        open_tokenizer: reads the tokenizer when it is first needed; not called where there is none.
        open_stage: loads the text encoder's stage, if there is one.
        vocabulary: rows of the embedding of prompts' tokens; None if that is not known.
    """
    if isinstance(spec, ClassInput):
        return ClassConditioner(spec, prefix_len, guided=guided)
    if isinstance(spec, PromptInput):
        return PromptConditioner(spec, prefix_len, open_tokenizer, vocabulary, guided=guided)
    encoder = None
    if spec.encoder is not None and open_stage is not None:
        encoder = CaptionEncoder(open_stage, open_tokenizer, prefix_len)
    return CaptionConditioner(spec, prefix_len, encoder, guided=guided)


def conditions_of(values: Iterable[Condition | int | str]) -> list[Condition]:
    """Whole numbers are classes and texts are prompts.

    Raises:
        RequestError: something else, or one text in the place of a list.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"{values!r} is no list of what to draw: put it into one, like [{values!r}]")
    return [_condition_of(value) for value in values]


def _condition_of(value: object) -> Condition:
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, ClassLabel | Prompt | Caption):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return ClassLabel(int(value))
    raise RequestError(
        f"{value!r} is neither a class (a whole number) nor a prompt (text) nor a condition of linert.runtime.drawing.samples"
    )
