"""Checkpoints as models: family, configuration, tensors and where they came from."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from linert.exporter.checkpoint import Checkpoint, checked_tensors, names_of, open_checkpoint, shapes_of
from linert.exporter.model_options import check_options
from linert.exporter.precision import largest_of
from linert.exporter.state_dicts import check_stored, listed
from linert.exporter.vocabulary import TokenizerFile
from linert.graphs import text_encoder
from linert.graphs.families import FAMILIES, vq
from linert.graphs.families.base import Family, PromptFormat
from linert.graphs.families.model_facts import DERIVED, Layout, ModelFacts, ModelOption
from linert.graphs.families.settings import Settings
from linert.graphs.text_encoder import TextEncoder, TextEncoderConfig
from linert.graphs.transformer import FamilyConfig, Transformer
from linert.runtime.bundles.manifest import Source
from linert.runtime.errors import CheckpointError, RequestError

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT", bound=nn.Module)

NAMED_SIDE = re.compile(r"[_-](256|384|512|768|1024)(?=[._-]|$)")
"""Pixels along the side of the images, in the name of a file or folder."""

SHOWN = 6
"""Tensors that a message names as what a file has."""

MOST_TOKENS = 1 << 24
"""Tokens of a vocabulary: a hundred times the largest published one's."""


@dataclass(frozen=True)
class Loaded(Generic[ConfigT, ModelT]):
    """A checkpoint's model: ``tensors`` are exactly what the model needs, memory-mapped where possible.

    ``sources``: names of tensors of the checkpoint that they were made of.
    """

    config: ConfigT
    tensors: Mapping[str, Tensor]
    checkpoint: Checkpoint
    build: Callable[[ConfigT], ModelT]
    sources: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @functools.cached_property
    def largest(self) -> dict[str, float | None]:
        """The largest absolute value of every tensor; None where one is not finite. Reads all of them, once."""
        return {name: largest_of(tensor) for name, tensor in self.tensors.items()}

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


@dataclass(frozen=True, kw_only=True)
class LoadedTransformer(Loaded[Any, Transformer]):
    """A family's transformer.

    ``layout``: how its files name the tensors. ``prompts``: how its prompts become tokens, by ``tokenizer``; None if it reads none.
    ``code_order``: the codebook's row of every image token; None where they are numbered alike. ``remarks``: what people should
    know of how it was loaded.
    """

    family: Family
    layout: Layout
    prompts: PromptFormat | None = None
    tokenizer: TokenizerFile | None = None
    code_order: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What a user says of a checkpoint that its tensors do not; None leaves it open.

    ``grid``: tokens in a line. ``heads``: of attention. ``prompt_tokens``: longest prompt. ``size``: width and height in pixels.
    ``tokenizer``: a file or a folder with one. ``template``: of prompts. ``ema``: take the moving average that a training file holds;
    ``vq_ema``: of the image decoder's own file, which must be said where ``ema`` is and that file has one too. ``text_encoder``: folder of
    what makes features of captions; it is loaded apart.
    """

    grid: int | None = None
    heads: int | None = None
    prompt_tokens: int | None = None
    size: tuple[int, int] | None = None
    tokenizer: Path | None = None
    template: str | None = None
    ema: bool = False
    vq_ema: bool | None = None
    text_encoder: Path | None = None

    def options(self) -> dict[ModelOption, object]:
        """What it says of the model, by option."""
        return {option: getattr(self, option) for option in ModelOption}


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
    family, _ = recognise(checkpoint)
    check_options(path, family, request.options())
    if vq_path is None and vq.naming(checkpoint.tensors) is None:
        raise CheckpointError(
            f"{path} holds no image decoder: give one with --vq (vq_ds16_c2i.pt for LlamaGen and LPD; vqgan.ckpt of Meta's "
            "Chameleon release for Lumina-mGPT)"
        )
    if vq_path is None:
        if request.vq_ema is not None:
            raise RequestError(f"the image decoder is in {path}, which --ema is for: leave --vq-ema out")
        decoder = load_image_decoder(path, checkpoint)
    else:
        decoder = load_image_decoder(vq_path, open_checkpoint(vq_path, ema=bool(request.vq_ema)))
        if request.ema and request.vq_ema is None and decoder.checkpoint.averaged:
            raise RequestError(
                f"{vq_path} holds a moving average too: say with --vq-ema that it is to be taken, or with --no-vq-ema that it is not"
            )
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
    wanted = ", ".join(f"{layout.landmark} ({f.title})" for f in FAMILIES.values() for layout in f.layouts)
    raise CheckpointError(
        f"{checkpoint.path} is of no family that is known: it has none of {wanted}; it has {listed(checkpoint.tensors, SHOWN)}"
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
    check_options(path, family, request.options())
    names, unknown = layout.rename(checkpoint.tensors)
    parameters = {ours: checkpoint.tensors[name] for name, ours in names.items()}
    check_stored(path, {name: checkpoint.tensors[name] for name in names})
    tokenizer = TokenizerFile.find(checkpoint, request.tokenizer) if family.reads_prompts else None
    if family.reads_prompts and tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json beside it: give one with --tokenizer")
    try:
        facts = _facts(checkpoint, request, parameters, tokenizer, patch)
        config = config or family.configure(facts)
        check_rotary_buffers(checkpoint, config)
        tensors = family.module_tensors(config, parameters)
        prompts = family.prompt_format(config, facts)
        order = family.code_order(facts)
    except KeyError as error:
        raise _lacks(path, f"{family.a_title} transformer", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    what = f"{family.a_title} transformer of {config.layers} layers of width {config.dim}"
    others = {name: checkpoint.tensors[name] for name in unknown}
    tensors = checked_tensors(path, tensors, config.tensor_shapes(), what=what, unknown=others)
    if prompts is not None and request.template is not None:
        if request.template.count("{prompt}") != 1:
            raise CheckpointError(f"the template {request.template!r} must hold {{prompt}} once")
        prompts = replace(prompts, template=request.template)
    return LoadedTransformer(
        config=config,
        tensors=tensors,
        checkpoint=checkpoint,
        build=family.build,
        sources=tuple(names),
        family=family,
        layout=layout,
        prompts=prompts,
        tokenizer=tokenizer if prompts else None,
        code_order=tuple(order) if order is not None else None,
        remarks=tuple(family.remarks(config, facts)),
    )


def _facts(
    checkpoint: Checkpoint,
    request: ModelRequest,
    parameters: Mapping[str, Tensor],
    tokenizer: TokenizerFile | None,
    patch: int,
) -> ModelFacts:
    """What is known of a checkpoint whose parameters, by our names, are ``parameters``.

    Raises:
        ValueError: its files contradict each other.
    """
    mapped: dict[str, int] = {}
    if tokenizer is not None:
        mapped = Settings(checkpoint.settings).numbered("vocabulary_map", MOST_TOKENS)
        vocabulary = tokenizer.vocabulary
        if other := next(
            (name for name in mapped if vocabulary.get(name, mapped[name]) != mapped[name]), None
        ):
            raise ValueError(
                f"config.json numbers {other[:40]!r} {mapped[other]} in its vocabulary_map, and {tokenizer.path} numbers it "
                f"{vocabulary[other]}: they do not belong together"
            )
        mapped |= vocabulary
    buffers = {name: tensor for name, tensor in checkpoint.tensors.items() if DERIVED.fullmatch(name)}
    return ModelFacts(
        shapes=shapes_of(parameters),
        settings=checkpoint.settings,
        processing=checkpoint.processing,
        vocabulary=mapped,
        grid=request.grid,
        heads=request.heads,
        prefix_len=request.prompt_tokens,
        side=named_side(names_of(checkpoint.path)),
        size=request.size,
        patch=patch,
        training=checkpoint.training,
        buffers=shapes_of(buffers),
    )


def named_side(names: Iterable[str]) -> int | None:
    """Pixels along the side of the images by the first of ``names`` that tells; None where none does, or one tells several."""
    for name in names:
        if sides := {int(side) for side in NAMED_SIDE.findall(name)}:
            return sides.pop() if len(sides) == 1 else None
    return None


def check_rotary_buffers(checkpoint: Checkpoint, config: FamilyConfig) -> None:
    """Raise :class:`ValueError` where a checkpoint carries frequencies of another rotary embedding than its configuration's.

    Frequencies follow from the configuration and are not read. They say when it is another model's.
    """
    base, width = getattr(config, "rope_base", None), config.head_dim
    if base is None:
        return
    wanted = torch.tensor([base ** (-2 * pair / width) for pair in range(width // 2)])
    for name, tensor in checkpoint.tensors.items():
        told = name.endswith("inv_freq") and tensor.shape == wanted.shape and tensor.is_floating_point()
        # Halves keep three digits.
        if told and not torch.allclose(tensor.float(), wanted, rtol=0.02, atol=1e-7):
            raise ValueError(
                f"{name} holds the frequencies of another rotary embedding than one of base {base:g}: config.json is missing, or "
                "belongs to another model"
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
        wanted = ", ".join(f"{prefix}{vq.LANDMARK}" for prefix in vq.PREFIXES)
        raise _lacks(path, "a VQ tokenizer", KeyError(f"any of {wanted}"), checkpoint.tensors)
    tensors = {ours: checkpoint.tensors[name] for name, ours in naming.ours.items()}
    check_stored(path, {name: checkpoint.tensors[name] for name in naming.ours})
    try:
        config = vq.infer_config(shapes_of(tensors), unit_codes=naming.unit_codes)
    except KeyError as error:
        raise _lacks(path, "a VQ tokenizer", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a VQ tokenizer: {error}") from error
    what = f"a VQ tokenizer ({config})"
    others = {name: checkpoint.tensors[name] for name in naming.unknown}
    tensors = checked_tensors(path, tensors, config.tensor_shapes(), what=what, unknown=others)
    return Loaded(config, tensors, checkpoint, vq.VQModel, tuple(naming.ours))


def load_text_encoder(path: Path) -> LoadedTextEncoder:
    """Load the encoder of a T5 1.1 or Flan-T5 from its folder; the decoder is left there.

    Raises:
        CheckpointError: unreadable, another model, or without a tokenizer that belongs to it.
    """
    checkpoint = open_checkpoint(path)
    names, unknown = text_encoder.LAYOUT.rename(checkpoint.tensors)
    tensors = {ours: checkpoint.tensors[name] for name, ours in names.items()}
    check_stored(path, {name: checkpoint.tensors[name] for name in names})
    own = checkpoint.tensors.get(text_encoder.OWN_TABLE)
    if own is not None and not torch.equal(tensors.setdefault("embed_tokens.weight", own), own):
        raise CheckpointError(
            f"{path}: shared.weight and {text_encoder.OWN_TABLE} differ, and a T5 has one table"
        )
    try:
        config = text_encoder.infer_config(shapes_of(tensors), checkpoint.settings)
    except KeyError as error:
        raise _lacks(path, "a T5 encoder", error, checkpoint.tensors) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    others = {name: checkpoint.tensors[name] for name in unknown}
    tensors = checked_tensors(path, tensors, config.tensor_shapes(), what="a T5 encoder", unknown=others)
    tokenizer = TokenizerFile.find(checkpoint, None)
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json beside it")
    tokenizer.check_t5(config.vocab_size)
    return LoadedTextEncoder(config, tensors, checkpoint, TextEncoder, tuple(names), tokenizer)


def _reordered(decoder: LoadedImageDecoder, transformer: LoadedTransformer) -> LoadedImageDecoder:
    """``decoder`` with the row of every image token of ``transformer`` at that token's number."""
    order = list(transformer.code_order or ())
    codebook = decoder.tensors["quantize.embedding.weight"]
    if sorted(order) != list(range(len(codebook))):
        raise CheckpointError(
            f"{transformer.path} has {len(order)} image tokens, for codes up to {max(order, default=-1)}, and {decoder.path} has "
            f"{len(codebook)} codes: they do not belong together"
        )
    return replace(
        decoder, tensors={**decoder.tensors, "quantize.embedding.weight": codebook[torch.tensor(order)]}
    )


def _lacks(path: Path, what: str, error: KeyError, names: Mapping[str, object]) -> CheckpointError:
    return CheckpointError(
        f"{path} is not {what}: it has no tensor {error.args[0]} (it has {listed(names, SHOWN)})"
    )
