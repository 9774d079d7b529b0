"""Tokenizers of the tokenizers library, which is needed for prompts alone."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from linert.runtime.drawing.samples import shortened
from linert.runtime.errors import BundleError, LinertError, RequestError
from linert.runtime.files.text_files import read_text

VISIBLE = frozenset("LMNPS")
"""Unicode's major categories of letters, marks, numbers, punctuation and symbols: what a text says."""

SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Marks that say nothing but how the character before them is drawn."""


class TextTokenizer:
    """A tokenizer that makes the tokens of a text: all of them, the same every time, and no others.

    Files also tell how batches were cut, padded and framed where they were saved, and how words were broken at random while a model
    was trained. None of that acts here: callers know what stands around a text, and how long it may be.

    Args:
        path: a ``tokenizer.json``.

    Raises:
        BundleError: the file is none.
        LinertError: the tokenizers library is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise LinertError("prompts need tokenizers: pip install 'linert[prompts]'") from error
        self.path = path
        text = read_text(path, BundleError)
        try:
            self._tokenizer: Any = Tokenizer.from_str(text)
        except BaseException as error:
            _require_library_fault(error)
            raise BundleError(f"{path} is no tokenizer.json: {shortened(str(error), 200)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None
        for name in ("dropout", "alpha", "nbest_size"):
            if hasattr(self._tokenizer.model, name):
                setattr(self._tokenizer.model, name, None)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by name."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @cached_property
    def special(self) -> dict[int, str]:
        """Tokens that are no text, by id. Tokenizers also list whole letters and words beside their vocabulary, which are text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {
            number: token.content
            for number, token in added.items()
            if token.special or re.fullmatch("<.+>", token.content)
        }

    def specials_among(self, ids: Iterable[int]) -> list[str]:
        """Names of the special tokens among ``ids``, in order. What stands for text that there is no other token for is none."""
        specials = [number for number in ids if number in self.special]
        return [self.special[number] for number in specials if number != self._unknown] if specials else []

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for text that there is no other token for."""
        name = getattr(self._tokenizer.model, "unk_token", None)
        if name is not None:
            return self.vocabulary.get(name)
        number: int | None = json.loads(self._tokenizer.to_str())["model"].get("unk_id")
        return number

    def ids(self, text: str) -> list[int]:
        """Ids of the tokens of a text, without any around it.

        Raises:
            RequestError: the text holds what is no character (bytes of a command line that are no UTF-8), the tokenizer has no token
                for a part of it, or would leave a part out.
        """
        if lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
            raise RequestError(
                f"the text {shortened(text)!r} holds {lone!r}, which is no character: give it in UTF-8"
            )
        encoding = self._encode(text)
        covered = {index for first, last in encoding.offsets for index in range(first, last)}
        if left := [c for i, c in enumerate(text) if i not in covered and _is_visible(c)]:
            letters = dict.fromkeys(c for c in text if _is_visible(c))
            dropped = [c for c in letters if not self._encode(c).ids] or left
            raise RequestError(
                f"the tokenizer {self.path} leaves {''.join(dropped[:8])!r} out of {shortened(text)!r}: it has no token for that, or "
                "drops it before it looks; word it without, or use the tokenizer of the published model"
            )
        ids: list[int] = encoding.ids
        return ids

    def _encode(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            _require_library_fault(error)
            raise RequestError(
                f"the tokenizer {self.path} cannot read {shortened(text)!r}: {shortened(str(error), 200)}"
            ) from error


def _require_library_fault(error: BaseException) -> None:
    """Raise again what is no fault of the tokenizers library: that raises bare exceptions, and where it panics, no exceptions at all."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] in VISIBLE and not SELECTORS.match(character)
