"""Tokenizers of the tokenizers library, which is needed for prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.errors import BundleError, LinertError


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
        BundleError: the file is none.
        LinertError: the tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise LinertError("prompts need tokenizers: pip install 'linert[prompts]'") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare exceptions for whatever is wrong with a file.
        raise BundleError(f"{path} is no tokenizer.json: {error}") from error
