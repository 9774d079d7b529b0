"""Tokenizers that stand beside checkpoints."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoint import TOKENIZER_NAME, Checkpoint
from runtime.errors import CheckpointError
from runtime.tokenizer import open_tokenizer

NAMES = (TOKENIZER_NAME, "text_tokenizer.json")
"""What folders call the file: those of the transformers library, and Chameleon's."""


@dataclass(frozen=True)
class TokenizerFile:
    """A ``tokenizer.json`` of the tokenizers library."""

    path: Path

    @staticmethod
    def find(checkpoint: Checkpoint, given: Path | None) -> TokenizerFile | None:
        """The one that a user has ``given`` (a file, or a folder with one), or that of ``checkpoint``.

        Raises:
            CheckpointError: the given one is not there.
        """
        if given is None:
            return TokenizerFile(checkpoint.tokenizer) if checkpoint.tokenizer else None
        for path in (given, *(given / name for name in NAMES)):
            if path.is_file():
                return TokenizerFile(path)
        raise CheckpointError(
            f"there is no tokenizer at {given}, neither a file nor {' or '.join(NAMES)} in a folder"
        )

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by name."""
        vocabulary: dict[str, int] = open_tokenizer(self.path).get_vocab(with_added_tokens=True)
        return vocabulary
