"""Open what turns requests into the inputs of a bundle: class ids, a tokenizer, or a text encoder."""

from __future__ import annotations

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import ClassInput
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.conditions import conditioner_of
from linert.runtime.drawing.tokenizer import TextTokenizer


def open_conditioner(bundle: Bundle, options: BackendOptions | None = None) -> Conditioner:
    """The conditioner of ``bundle``, to be closed by whoever opened it.

    Its tokenizer and its text encoder are loaded when a prompt first needs them, and must then be those that were verified.

    Args:
        options: where its text encoder runs, if it has one; on the CPU if None.
    """
    manifest = bundle.manifest
    spec = manifest.condition

    def open_tokenizer() -> TextTokenizer:
        name = "" if isinstance(spec, ClassInput) else spec.tokenizer
        bundle.require_unchanged([name])
        tokenizer = TextTokenizer(bundle.file(name))
        bundle.require_unchanged([name])
        return tokenizer

    def open_text_encoder() -> Backend:
        return (options or BackendOptions()).open(bundle, ["text_encoder"])

    rows = manifest.model.config.get("text_vocab_size")
    return conditioner_of(
        spec,
        manifest.raster.prefix_len,
        open_tokenizer,
        open_text_encoder,
        guided=manifest.guided,
        vocabulary=rows if isinstance(rows, int) else None,
    )
