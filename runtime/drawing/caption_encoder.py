"""Captions as features, by a stage of the bundle."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.drawing.samples import shortened
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from linert.runtime.backends.base import Backend

END_OF_TEXT = "</s>"
"""The token that T5 has behind every text."""


class CaptionEncoder:
    """The bundle's stage that makes features of captions.

    Args:
        open_stage: loads the stage when it is first needed.
        open_tokenizer: reads its tokenizer, likewise.
        length: most tokens.
    """

    def __init__(
        self, open_stage: Callable[[], Backend], open_tokenizer: Callable[[], TextTokenizer], length: int
    ) -> None:
        self._open, self._open_tokenizer, self._length = open_stage, open_tokenizer, length
        self._lock = Lock()
        self._closed = False

    @cached_property
    def _backend(self) -> Backend:
        return self._open()

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return self._open_tokenizer()

    def close(self) -> None:
        """Give back the stage's memory and device, if it was needed."""
        with self._lock:
            self._closed = True
            if "_backend" in vars(self):
                self._backend.close()

    def tokens(self, text: str) -> list[int]:
        """Token ids of a cleaned caption.

        Raises:
            RequestError: there are too many, it contains the text of a special token, or what the tokenizer leaves out.
            BundleError: the tokenizer is not T5's.
        """
        ids = t5_tokens(self._tokenizer, text)
        if len(ids) > self._length:
            raise RequestError(
                f"the prompt {shortened(text)!r} has {len(ids)} tokens; the model was trained with at most {self._length}: shorten it"
            )
        return ids

    def __call__(self, text: str) -> NDArray[np.float32]:
        """Features ``[length of the text in tokens, feature_dim]`` float32."""
        ids = self.tokens(text)
        tokens = np.zeros((1, self._length), np.int64)
        tokens[0, : len(ids)] = ids
        with self._lock:
            if self._closed:
                raise RequestError("the text encoder is closed: open the bundle again")
            return self._run(tokens, ids, text)[: len(ids)]

    def _run(self, tokens: NDArray[np.int64], ids: Sequence[int], text: str) -> NDArray[np.float32]:
        backend = self._backend
        backend.load("text_encoder")
        backend.write("text_tokens", tokens)
        backend.write("text_lengths", np.array([len(ids)]))
        try:
            backend.run("text_encoder")
        except Exception as error:
            # Runtimes have exceptions of their own. Bundles whose tokenizer was not held to the table may make such tokens.
            raise BundleError(
                f"the text encoder has no embedding for a token of {shortened(text)!r}, the largest of which is {max(ids)}: export the "
                f"bundle again with the tokenizer that belongs to the encoder ({str(error).strip().splitlines()[0][:200]})"
            ) from error
        features = cast("NDArray[np.float32]", backend.read("text_features"))
        return cast("NDArray[np.float32]", features[0])


def t5_tokens(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Token ids of a cleaned caption, of whatever length; see :meth:`CaptionEncoder.tokens` for the errors."""
    end = tokenizer.vocabulary.get(END_OF_TEXT)
    if end is None:
        raise BundleError(f"the tokenizer {tokenizer.path} has no {END_OF_TEXT}: it is not T5's")
    ids = tokenizer.ids(clean_caption(text))
    if special := tokenizer.specials_among(ids):
        raise RequestError(
            f"the prompt {shortened(text)!r} contains {special[0]!r}, which the tokenizer takes for a special token: leave it out"
        )
    return [*ids, end]


def clean_caption(text: str) -> str:
    """A caption as those that LlamaGen was trained on: lower case, without addresses and markup, in one line."""
    plain = re.sub(r"<[^<>]*>", " ", html.unescape(html.unescape(text)))
    plain = re.sub(r"(?:https?://|www\.)\S+", " ", plain)
    return " ".join(plain.lower().split())
