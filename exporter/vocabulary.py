"""Find, check and copy the ``tokenizer.json`` that belongs to a checkpoint."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from linert.exporter.checkpoint import TOKENIZER_NAME, Checkpoint, snapshot_of
from linert.runtime.drawing.caption_encoder import t5_tokens
from linert.runtime.drawing.conditioner import USUAL_PROMPTS
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import CheckpointError

NAMES = (TOKENIZER_NAME, "text_tokenizer.json")
"""What folders call the file: those of the transformers library, and Chameleon's."""


@dataclass(frozen=True)
class TokenizerFile:
    """A ``tokenizer.json`` of the tokenizers library."""

    path: Path

    @staticmethod
    def find(checkpoint: Checkpoint, user_path: Path | None) -> TokenizerFile | None:
        """The one at a user's ``user_path`` (a file, or a folder with one), or that of ``checkpoint``.

        Raises:
            CheckpointError: there is none at ``user_path``.
        """
        if user_path is None:
            listed = [checkpoint.tokenizer] if checkpoint.tokenizer else []
        else:
            folder = snapshot_of(user_path)
            listed = [path for path in (user_path, *(folder / name for name in NAMES)) if path.is_file()]
        if listed or user_path is None:
            return TokenizerFile(listed[0]) if listed else None
        raise CheckpointError(
            f"there is no tokenizer at {user_path}, neither a file nor {' or '.join(NAMES)} in a folder"
        )

    @functools.cached_property
    def opened(self) -> TextTokenizer:
        """The tokenizer.

        Raises:
            BundleError: the file is none.
        """
        return TextTokenizer(self.path)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by name."""
        return self.opened.vocabulary

    def check_t5(self, rows: int) -> None:
        """Check that it is the tokenizer of a T5 whose embedding has so many ``rows``.

        Raises:
            CheckpointError: it has tokens beyond them.
            BundleError: it has no token for the end of a text.
            RequestError: it leaves usual words out.
        """
        name, largest = max(self.vocabulary.items(), key=lambda item: item[1], default=("", -1))
        if largest >= rows:
            raise CheckpointError(
                f"{self.path} has a token {name!r} of number {largest}, and the text encoder has embeddings for {rows}: they do not "
                "belong together"
            )
        for text in USUAL_PROMPTS:
            t5_tokens(self.opened, text)
