"""Checkpoints as models: family, configuration, tensors and where they came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from exporter.checkpoint import Checkpoint, check_tensors, open_checkpoint, shapes_of
from exporter.vocabulary import TokenizerFile
from graphs import text_encoder
from graphs.families import FAMILIES, vq
from graphs.families.base import Family, FamilyConfig, Given, Layout, PromptFormat, RasterTransformer
from graphs.text_encoder import TextEncoder, TextEncoderConfig
from runtime.errors import CheckpointError
from runtime.manifest import Source

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT", bound=nn.Module)

NAMED_SIDE = re.compile(r"[_-](256|384|512|768|1024)(?=[._-]|$)")
"""Pixels along the side of the images, in the name of a file or folder."""


@dataclass(frozen=True)
class Loaded(Generic[ConfigT, ModelT]):
    """A checkpoint's model: ``tensors`` are exactly what the model needs, memory-mapped where possible."""

    config: ConfigT
    tensors: Mapping[str, Tensor]
    checkpoint: Checkpoint
    build: Callable[[ConfigT], ModelT]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def source(self) -> Source:
        return self.checkpoint.source

    def hollow(self, dtype: torch.dtype = torch.float32) -> ModelT:
        """The module for tracing: parameters have shapes, ``dtype``, and no memory that was ever touched."""
        with torch.device("meta"):
            model = self.build(self.config)
        empty = {name: torch.empty(tuple(t.shape), dtype=dtype) for name, t in self.tensors.items()}
        model.load_state_dict(empty, strict=True, assign=True)
        return model.eval()

    def eager(self) -> ModelT:
        """The module with its weights, in float32."""
        with torch.device("meta"):
            model = self.build(self.config)
        model.load_state_dict({name: t.float() for name, t in self.tensors.items()}, strict=True, assign=True)
        return model.requires_grad_(False).eval()


LoadedImageDecoder = Loaded[vq.VQConfig, vq.VQModel]


@dataclass(frozen=True)
class LoadedTextEncoder(Loaded[TextEncoderConfig, TextEncoder]):
    """What makes features of captions, and its ``tokenizer``."""

    tokenizer: TokenizerFile


@dataclass(frozen=True)
class LoadedTransformer(Loaded[Any, RasterTransformer]):
    """A family's transformer.

    ``layout``: how its files name the tensors. ``prompts``: how its prompts become tokens, by ``tokenizer``; None if it reads none.
    ``code_order``: the codebook's row of every image token; None where they are numbered alike.
    """

    family: Family
    layout: Layout
    prompts: PromptFormat | None = None
    tokenizer: TokenizerFile | None = None
    code_order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ModelRequest:
    """What a user says of a checkpoint that its tensors do not; None leaves it open.

    ``grid``: tokens in an image row. ``heads``: of attention. ``prompt_tokens``: longest prompt. ``size``: width and height in pixels.
    ``tokenizer``: a file or a folder with one. ``template``: of prompts.
    """

    grid: int | None = None
    heads: int | None = None
    prompt_tokens: int | None = None
    size: tuple[int, int] | None = None
    tokenizer: Path | None = None
    template: str | None = None
    ema: bool = False


def load_models(
    path: Path, vq_path: Path | None, request: ModelRequest, *, config: FamilyConfig | None = None
) -> tuple[LoadedTransformer, LoadedImageDecoder]:
    """Load a transformer, of whatever family it is, and its image decoder.

    Args:
        path: the transformer's checkpoint.
        vq_path: the image decoder's; None looks for it in ``path``.
        config: a configuration to hold the transformer to, instead of making one.

    Raises:
        CheckpointError: unreadable, of no known family, or something that must be known is not.
    """
    checkpoint = open_checkpoint(path, ema=request.ema)
    if vq_path is None and vq.naming(checkpoint.tensors) is None:
        recognise(checkpoint)
        raise CheckpointError(
            f"{path} holds no image decoder: give one with --vq (vq_ds16_c2i.pt for LlamaGen; vqgan.ckpt of Meta's Chameleon "
            "release for Lumina-mGPT)"
        )
    decoder = load_image_decoder(vq_path or path, checkpoint if vq_path is None else None)
    transformer = load_transformer(checkpoint, request, patch=decoder.config.patch, config=config)
    if transformer.code_order is not None:
        decoder = _reordered(decoder, transformer)
    return transformer, decoder


def recognise(checkpoint: Checkpoint) -> tuple[Family, Layout]:
    """The family and the layout of a checkpoint.

    Raises:
        CheckpointError: none that is known; the message lists what was looked for.
    """
    for family in FAMILIES.values():
        for layout in family.layouts:
            if layout.landmark in checkpoint.tensors:
                return family, layout
    wanted = [
        f"{layout.landmark} ({f.title}, {layout.who})" for f in FAMILIES.values() for layout in f.layouts
    ]
    names = sorted(checkpoint.tensors)
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise CheckpointError(
        f"{checkpoint.path} is of no family that is known: it has none of {', '.join(wanted)}; it has {shown}"
    )


def load_transformer(
    checkpoint: Checkpoint, request: ModelRequest, *, patch: int, config: FamilyConfig | None = None
) -> LoadedTransformer:
    """Make a family's transformer of a checkpoint.

    Args:
        patch: pixels along the side of a token.
        config: as in :func:`load_models`.

    Raises:
        CheckpointError: of no known family, or something that must be known is not.
    """
    family, layout = recognise(checkpoint)
    path = checkpoint.path
    names, unknown = layout.rename(checkpoint.tensors)
    found = {ours: checkpoint.tensors[name] for name, ours in names.items()}
    tokenizer = TokenizerFile.find(checkpoint, request.tokenizer)
    if family.reads_prompts and tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json beside it: give one with --tokenizer")
    mapped = checkpoint.settings.get("vocabulary_map") or {}
    side = NAMED_SIDE.search(path.resolve().name)
    given = Given(
        shapes_of(found),
        checkpoint.settings,
        checkpoint.processing,
        {**mapped, **(tokenizer.vocabulary if tokenizer else {})},
        request.grid,
        request.heads,
        request.prompt_tokens,
        int(side[1]) if side else None,
        request.size,
        patch,
    )
    try:
        config = config or family.configure(given)
        tensors = family.module_tensors(config, found)
        prompts = family.prompt_format(config, given)
        order = family.code_order(given)
    except KeyError as error:
        raise _lacks(path, f"a {family.title} transformer", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    what = f"a {family.title} transformer of {config.layers} layers of width {config.dim}"
    check_tensors(path, tensors, config.tensor_shapes(), what=what, unknown=unknown)
    if prompts is not None:
        if request.template is not None:
            if request.template.count("{prompt}") != 1:
                raise CheckpointError(f"the template {request.template!r} must hold {{prompt}} once")
            prompts = replace(prompts, template=request.template)
    elif request.template is not None or request.tokenizer is not None:
        raise CheckpointError(
            f"{path} is a {family.title} that reads no prompts: leave template and tokenizer out"
        )
    return LoadedTransformer(
        config,
        tensors,
        checkpoint,
        family.build,
        family,
        layout,
        prompts,
        tokenizer if prompts else None,
        tuple(order) if order is not None else None,
    )


def load_image_decoder(path: Path, checkpoint: Checkpoint | None = None) -> LoadedImageDecoder:
    """Load a VQ image decoder, by itself or out of a checkpoint that holds more; its encoder is left in the file.

    Args:
        checkpoint: that of ``path``, if it is open.

    Raises:
        CheckpointError: unreadable, or no VQ tokenizer of this architecture.
    """
    checkpoint = checkpoint or open_checkpoint(path)
    naming = vq.naming(checkpoint.tensors)
    if naming is None:
        wanted = ", ".join(f"{prefix}quantize.embedding.weight" for prefix in vq.PREFIXES)
        raise _lacks(path, "a VQ tokenizer", KeyError(f"any of {wanted}"), checkpoint.tensors)
    tensors = {ours: checkpoint.tensors[name] for name, ours in naming.ours.items()}
    try:
        config = vq.infer_config(shapes_of(tensors), unit_codes=naming.unit_codes)
    except KeyError as error:
        raise _lacks(path, "a VQ tokenizer", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a VQ tokenizer: {error}") from error
    what = f"a VQ tokenizer ({config})"
    check_tensors(path, tensors, config.tensor_shapes(), what=what, unknown=naming.unknown)
    return Loaded(config, tensors, checkpoint, vq.VQModel)


def load_text_encoder(path: Path) -> LoadedTextEncoder:
    """Load the encoder of a T5 1.1 or Flan-T5 from its folder; the decoder is left there.

    Raises:
        CheckpointError: unreadable, another model, or without a tokenizer.
    """
    checkpoint = open_checkpoint(path)
    names, unknown = text_encoder.LAYOUT.rename(checkpoint.tensors)
    tensors = {ours: checkpoint.tensors[name] for name, ours in names.items()}
    try:
        config = text_encoder.infer_config(shapes_of(tensors), checkpoint.settings)
    except KeyError as error:
        raise _lacks(path, "a T5 encoder", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_tensors(path, tensors, config.tensor_shapes(), what="a T5 encoder", unknown=unknown)
    tokenizer = TokenizerFile.find(checkpoint, None)
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json beside it")
    return LoadedTextEncoder(config, tensors, checkpoint, TextEncoder, tokenizer)


def _reordered(decoder: LoadedImageDecoder, transformer: LoadedTransformer) -> LoadedImageDecoder:
    """``decoder`` with the row of every image token of ``transformer`` at that token's number."""
    order = torch.tensor(transformer.code_order)
    codebook = decoder.tensors["quantize.embedding.weight"]
    if sorted(order.tolist()) != list(range(len(codebook))):
        raise CheckpointError(
            f"{transformer.path} has {len(order)} image tokens, for codes up to {int(order.max())}, and {decoder.path} has "
            f"{len(codebook)} codes: they do not belong together"
        )
    return replace(decoder, tensors={**decoder.tensors, "quantize.embedding.weight": codebook[order]})


def _lacks(path: Path, what: str, error: KeyError, names: Mapping[str, object]) -> CheckpointError:
    shown = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
    return CheckpointError(f"{path} is not {what}: it has no tensor {error.args[0]} (it has {shown})")
