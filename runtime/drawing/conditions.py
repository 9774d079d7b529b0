"""Conditions as the prefill stage takes them: class ids, prompts as tokens, and captions of :mod:`linert.runtime.drawing.captions`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from linert.runtime.bundles.manifest import CaptionInput, ClassInput, PromptInput
from linert.runtime.drawing.caption_encoder import CaptionEncoder
from linert.runtime.drawing.captions import CaptionConditioner
from linert.runtime.drawing.conditioner import USUAL_PROMPTS, Conditioner, Inputs
from linert.runtime.drawing.samples import Caption, ClassLabel, Condition, Prompt, shortened
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import RequestError

if TYPE_CHECKING:
    from linert.runtime.backends.base import Backend


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
