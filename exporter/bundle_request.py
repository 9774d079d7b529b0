"""Everything that decides what a bundle will be, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from linert.exporter.finiteness import check_numbers
from linert.exporter.models import Loaded, LoadedImageDecoder, LoadedTextEncoder, LoadedTransformer
from linert.exporter.precision import Precision, PrecisionSettings, Weight
from linert.exporter.vocabulary import TokenizerFile
from linert.graphs.memory import Memory, memory_of
from linert.graphs.transformer import FamilyConfig, part_of
from linert.runtime.bundles.cache_settings import FULL, CacheSettings
from linert.runtime.bundles.manifest import (
    CaptionInput,
    ClassInput,
    PromptInput,
)
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.schedule import Groups, Lines, Schedule
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.conditions import conditioner_of
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import ExportError

TOKENIZER_FILE = "tokenizer/tokenizer.json"
MOST_IMAGES = 4096
"""Images of a batch: a bound of what is taken for meant."""


@dataclass(frozen=True)
class CacheShape:
    """The cache of a variant: the policies that it holds, the settings that it runs with by default, lines of every layer's buffer.

    ``usual``: settings in which runs under a policy differ from ``cache``, by the policy's name.
    """

    policies: tuple[str, ...] = ()
    cache: CacheSettings | None = None
    capacity_lines: tuple[int, ...] = ()
    usual: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BundleRequest:
    """Everything that decides what a bundle will be. Nothing is written until :func:`export_bundle`.

    ``policies``: those that the bundle holds. ``capacity_lines``: lines of each layer's buffer. ``cache``: the default
    settings of its runs; ``usual``: in what those of its policies differ. A model without a cache has none of the four. ``schedule``: in
    which order tokens are drawn.
    """

    transformer: LoadedTransformer
    image_decoder: LoadedImageDecoder
    policies: tuple[str, ...]
    capacity_lines: tuple[int, ...]
    cache: CacheSettings | None
    usual: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: int
    sampling: SamplingSettings
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    schedule: Schedule = field(default_factory=Lines)
    text_encoder: LoadedTextEncoder | None = None

    def __post_init__(self) -> None:
        config, decoder = self.transformer.config, self.image_decoder.config
        faults = []
        if not 1 <= self.images <= MOST_IMAGES:
            faults.append(f"a batch of {self.images} images; must be 1 to {MOST_IMAGES}")
        if min(config.lines, config.line_width) < 2:
            faults.append(f"{config.lines} lines of {config.line_width} tokens; must be at least 2 of each")
        if config.vocab_size != decoder.codebook_size:
            faults.append(
                f"{self.transformer.path} predicts {config.vocab_size} tokens and "
                f"{self.image_decoder.path} has {decoder.codebook_size} codes: they do not belong together"
            )
        windows = self.schedule.windows if isinstance(self.schedule, Lines) else (1,)
        if 1 not in windows or not all(1 <= window <= config.line_width for window in windows):
            faults.append(
                f"windows of {', '.join(map(str, windows))} positions; must be 1 and others up to a line's {config.line_width}"
            )
        if self.text_encoder is not None:
            made, seen = self.text_encoder.config.dim, self._caption_dim
            if made != seen:
                faults.append(
                    f"{self.text_encoder.path} makes features of {made}, and {self.transformer.path} sees "
                    f"{f'features of {seen}' if seen else 'no features of captions'}: leave --text-encoder out"
                )
        if self.cache is not None:
            faults += self._cache_faults(self.cache)
        faults += self.sampling.faults(guided=True)
        if faults:
            raise ExportError("; ".join(faults))
        if self.cache is not None:
            self.cache.check(self.raster, self.capacity_lines)

    def _cache_faults(self, cache: CacheSettings) -> list[str]:
        faults = []
        if cache.policy not in self.policies:
            faults.append(f"the default policy {cache.policy} is not among {', '.join(self.policies)}")
        lines = self.raster.lines
        if wrong := [capacity for capacity in self.capacity_lines if not 1 <= capacity <= lines]:
            faults.append(f"a buffer of {wrong[0]} lines; must be 1 to {lines}")
        elif FULL in self.policies and min(self.capacity_lines) < lines:
            faults.append(f"the full policy needs a buffer of all {lines} lines: leave --capacity-lines out")
        if cache.share_guidance and not self.guided:
            faults.append("share_guidance needs a guided bundle: give --guidance above 1")
        return faults

    @property
    def raster(self) -> Raster:
        config = self.transformer.config
        return raster_of(config)

    @property
    def condition(self) -> ClassInput | PromptInput | CaptionInput:
        """What the bundle draws."""
        config, prompts = self.transformer.config, self.transformer.prompts
        if prompts is not None:
            return PromptInput(
                TOKENIZER_FILE, prompts.first, prompts.template, prompts.last, prompts.stripped
            )
        if not self._caption_dim:
            return ClassInput(config.num_classes)
        if self.text_encoder is None:
            return CaptionInput(self._caption_dim)
        return CaptionInput(self._caption_dim, TOKENIZER_FILE, self.text_encoder.source)

    @property
    def _caption_dim(self) -> int:
        return self.transformer.family.caption_dim(self.transformer.config)

    @property
    def size(self) -> str:
        """Width and height of the images in pixels, as in ``512x768``."""
        return self.raster.size(self.image_decoder.config.patch)

    @property
    def tokenizer(self) -> TokenizerFile | None:
        """What makes tokens of prompts."""
        return self.text_encoder.tokenizer if self.text_encoder else self.transformer.tokenizer

    def conditioner(self) -> Conditioner:
        """What turns requests into inputs of the prefill stage, before there is a bundle."""
        spec, tokenizer = self.condition, self.transformer.tokenizer

        def open_tokenizer() -> TextTokenizer:
            if tokenizer is None:
                raise ExportError(f"{self.transformer.path} has no tokenizer: give one with --tokenizer")
            return TextTokenizer(tokenizer.path)

        rows = getattr(self.transformer.config, "text_vocab_size", None)
        return conditioner_of(
            spec, self.raster.prefix_len, open_tokenizer, guided=self.guided, vocabulary=rows
        )

    @property
    def guided(self) -> bool:
        return self.sampling.guided

    @property
    def memory(self) -> Memory:
        """What the layers remember between steps."""
        if isinstance(self.schedule, Groups):
            return self._memory([self.schedule.slots] * self.transformer.config.layers)
        return self._memory([self.raster.slots(lines) for lines in self.capacity_lines])

    def _memory(self, capacities: Sequence[int]) -> Memory:
        return memory_of(
            self.transformer.config,
            images=self.images,
            guided=self.guided,
            capacities=capacities,
            cache_dtype=self.precision.activations.dtype,
        )

    @property
    def state_bytes(self) -> int:
        """Exact bytes that persist between decode steps."""
        return sum(spec.nbytes for spec in self.memory.state())

    @property
    def full_state_bytes(self) -> int:
        """The same with a cache that holds the whole image, if there is one."""
        full = self.raster.slots(self.raster.lines)
        memory = self._memory([full] * len(self.capacity_lines))
        return sum(spec.nbytes for spec in memory.state())

    def weights(self) -> dict[str, Weight]:
        """Every parameter by its name in the stages, and what it is to be stored in."""
        precision = self.precision
        weights = {
            f"model.{name}": Weight(name, tensor, precision.of(part_of(name)), precision)
            for name, tensor in self.transformer.tensors.items()
        }
        for name, tensor in self.image_decoder.tensors.items():
            # What is not among the quantised convolutions is stored in halves.
            stored = precision.decoder_precision
            stored = Precision.FP16 if stored.bits else stored
            weights[f"image_decoder.{name}"] = Weight(name, tensor, stored, precision, "image_decoder")
        if self.text_encoder is not None:
            stored = Precision.FP32 if precision.weights is Precision.FP32 else Precision.FP16
            for name, tensor in self.text_encoder.tensors.items():
                weights[f"text_encoder.{name}"] = Weight(name, tensor, stored, precision, "text_encoder")
        return weights

    def check_numbers(self) -> None:
        """:func:`linert.exporter.finiteness.check_numbers` of all models; images of other sizes have the same."""
        weights = self.weights()
        models: dict[str, Loaded[Any, Any]] = {"model": self.transformer, "image_decoder": self.image_decoder}
        if self.text_encoder is not None:
            models["text_encoder"] = self.text_encoder
        for prefix, model in models.items():
            computed = self.precision.activations.dtype if prefix == "model" else torch.float32
            part_weights = {name: weights[f"{prefix}.{name}"] for name in model.tensors}
            check_numbers(model, part_weights, computed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, to within the scales of quantised ones."""
        return sum(
            weight.tensor.numel() * (weight.precision.bits or 8 * weight.precision.dtype.itemsize) // 8
            for weight in self.weights().values()
        )


def raster_of(config: FamilyConfig) -> Raster:
    """The image of a family's configuration."""
    newlines = int(config.newline_token is not None)
    return Raster(config.prefix_len, config.line_width, config.lines, newlines)


def with_cache(request: BundleRequest, transformer: LoadedTransformer, shape: CacheShape) -> BundleRequest:
    """The same with another cache, and the transformer for images of another size."""
    return replace(
        request,
        transformer=transformer,
        policies=shape.policies,
        cache=shape.cache,
        capacity_lines=shape.capacity_lines,
        usual=shape.usual,
    )


def variant_names(requests: Sequence[BundleRequest]) -> list[str]:
    """Names of variants, by the image size where it is not the first request's, and by the lines of the buffers where the first of
    that size has others; see :class:`linert.runtime.bundles.bundle.Bundle`."""
    first = requests[0]
    usual = {request.size: request.capacity_lines for request in reversed(requests)}
    names = []
    for request in requests:
        size = [request.size] if request.size != first.size else []
        lines = (
            [f"{max(request.capacity_lines)}lines"] if request.capacity_lines != usual[request.size] else []
        )
        names.append(".".join([*size, *lines]))
    return names
