"""Precisions: which format each weight is stored in, and how it gets there.

Halves and integers are formats of *weights*; a graph computes in its activations' type. Integers are symmetric, with
one scale an output channel (int8) or one a block of inputs (int4), so that ``DequantizeLinear`` with no zero point
says everything and ONNX Runtime and TensorRT read the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from linert.runtime.bundles.manifest import PrecisionSpec
from linert.runtime.errors import ExportError

DEFAULT_BLOCK = 128
LEAST_BLOCK = 16
MOST_BLOCK = 1 << 16
CLIPPING_STEPS = 20
CLIPPING_STEP = 0.02
"""Scales are tried from the one that fits a group's largest weight downwards, by this share of it."""

SEARCHED_TOGETHER = 1 << 18
"""Weights whose scales are searched at a time: what is computed of them fits the processor's cache, which is ten times faster."""

Q_MAX = {8: 127, 4: 7}


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of an integer format; 0 for the others."""
        return {Precision.INT8: 8, Precision.INT4: 4}.get(self, 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of a floating-point format."""
        return FLOATS[self]


FLOATS = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


class Method(StrEnum):
    """How integers are found: each weight rounded to the nearest (``rtn``), or ``gptq`` (:mod:`linert.exporter.calibration`)."""

    RTN = "rtn"
    GPTQ = "gptq"


@dataclass(frozen=True)
class Quantized:
    """Integers and scales of a weight ``[N, K]`` (N output channels of K inputs).

    ``values [N, K]`` int8. ``scales [N]`` float32, or ``[N, K / block]`` where ``block`` is not 0. A weight is its value
    times its scale.
    """

    values: Tensor
    scales: Tensor
    bits: int
    block: int = 0

    def dequantized(self) -> Tensor:
        """``[N, K]`` float32."""
        scales = self.scales.repeat_interleave(self.block, 1) if self.block else self.scales[:, None]
        return self.values * scales


@dataclass(frozen=True)
class Range:
    """What an activation spans, as unsigned 8-bit integers: ``value = (integer - zero) * scale``."""

    scale: float
    zero: int

    @staticmethod
    def of(least: float, most: float) -> Range:
        """The range from ``least`` to ``most``, and zero."""
        least, most = min(least, 0.0), max(most, 0.0)
        scale = max((most - least) / 255, 1e-8)
        return Range(scale, round(-least / scale))


@dataclass(frozen=True)
class QuantizedConvolution:
    """A convolution of 8-bit integers.

    ``weight``: ``values [O, I * k * k]`` with a scale an output channel. ``bias [O]``: float32.
    """

    weight: Quantized
    bias: Tensor
    input: Range
    output: Range


@dataclass(frozen=True)
class PrecisionSettings:
    """What a bundle's weights are stored in.

    Args:
        weights: of the transformer's products and embedding tables.
        activations: what the transformer computes and caches in.
        parts: exceptions: precision by part (``embedding``, ``output``, or a layer's number). With integers the embedding
            tables are in fp16 unless they are named here: a step reads a row of them, and TensorRT looks up no integers.
        block: inputs that share a scale in int4; a power of two of at least 16. Weights whose inputs it does not
            divide get the half, or the quarter, ...
        method: how integers are found.
        image_decoder: of its convolutions; int8 computes in integers, the others store their weights so and compute in
            float32. None: int8 with integers, else the weights'.
        quantized: weights that a calibration has quantised already, by parameter name.
        convolutions: the image decoder's, likewise, by the name of their weight.

    Raises:
        ExportError: integers as activations, a block that is no power of two.
    """

    weights: Precision = Precision.FP32
    activations: Precision = Precision.FP32
    parts: Mapping[str, Precision] = field(default_factory=dict)
    block: int = DEFAULT_BLOCK
    method: Method = Method.RTN
    image_decoder: Precision | None = None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    convolutions: Mapping[str, QuantizedConvolution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activations.bits:
            raise ExportError(f"activations in {self.activations}: only fp32, fp16 and bf16 are computed in")
        if self.image_decoder is Precision.INT4:
            raise ExportError("an image decoder in int4: convolutions come in fp32, fp16, bf16 and int8")
        if not LEAST_BLOCK <= self.block <= MOST_BLOCK or self.block & (self.block - 1):
            raise ExportError(
                f"a block of {self.block} weights; must be a power of two from {LEAST_BLOCK} to {MOST_BLOCK}"
            )

    @property
    def spec(self) -> PrecisionSpec:
        """For the manifest."""
        parts = {part: str(precision) for part, precision in self.parts.items()}
        if self.weights.bits:
            parts.setdefault("embedding", str(self.of("embedding")))
        method = str(self.method) if self.integers else "none"
        return PrecisionSpec(
            str(self.weights), str(self.activations), parts, self.block, method, str(self.decoder_precision)
        )

    @property
    def integers(self) -> bool:
        """Whether any part is stored in integers."""
        return any(precision.bits for precision in (self.weights, *self.parts.values()))

    @property
    def uncalibrated(self) -> list[str]:
        """What this asks for and has not been given: a calibration's work (:func:`linert.exporter.calibration.calibrated`)."""
        missing = []
        if self.integers and self.method is Method.GPTQ and not self.quantized:
            missing.append("weights quantised by gptq")
        if self.decoder_precision is Precision.INT8 and not self.convolutions:
            missing.append("an image decoder in int8")
        return missing

    def of(self, part: str) -> Precision:
        """Precision of a part's weights."""
        usual = Precision.FP16 if part == "embedding" and self.weights.bits else self.weights
        return self.parts.get(part, usual)

    @property
    def decoder_precision(self) -> Precision:
        """Of the image decoder's convolutions."""
        return self.image_decoder or (Precision.INT8 if self.weights.bits else self.weights)

    def integer_format(self, inputs: int, precision: Precision) -> tuple[int, int]:
        """Bits and block of an integer weight with so many ``inputs``.

        An int4 weight whose inputs no block divides gets int8.
        """
        if precision is Precision.INT4:
            block = self.block
            while block >= LEAST_BLOCK:
                if inputs % block == 0:
                    return 4, block
                block //= 2
        return 8, 0

    def quantize(self, name: str, weight: Tensor, precision: Precision) -> Quantized:
        """The integers of parameter ``name``, whose float values are ``weight [N, K]``."""
        if name in self.quantized:
            return self.quantized[name]
        return round_to_nearest(weight, *self.integer_format(weight.shape[1], precision))


def round_to_nearest(
    weight: Tensor, bits: int, block: int = 0, least_scales: Tensor | None = None
) -> Quantized:
    """Quantise ``weight [N, K]`` group by group, each with the scale that leaves the least squared error.

    Args:
        bits: 8 or 4.
        block: inputs that share a scale; 0 for all of an output channel.
        least_scales: ``[N]``, below which no scale of an output channel may be.
    """
    groups = weight.float().reshape(len(weight), -1, block or weight.shape[1])
    scales = best_scales(groups, bits)
    if least_scales is not None:
        scales = torch.maximum(scales, least_scales[:, None])
    values = to_integers(groups, scales, bits).reshape(weight.shape)
    return Quantized(values.to(torch.int8), scales if block else scales[:, 0], bits, block)


def best_scales(groups: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Scales ``[N, J]`` of ``groups [N, J, b]`` with the least squared rounding error.

    Clipping a group's largest weights gives the others a finer grid, which pays in 4 bits and hardly in 8.

    Args:
        importance: weights of the squared errors, broadcastable to ``groups``.
    """
    rows = max(1, SEARCHED_TOGETHER // groups[0].numel())
    weights = torch.ones(1) if importance is None else importance
    parts = zip(groups.split(rows), weights.expand_as(groups).split(rows), strict=True)
    return torch.cat([_best_scales(part, bits, weight) for part, weight in parts])


def _best_scales(groups: Tensor, bits: int, importance: Tensor) -> Tensor:
    largest = groups.abs().amax(-1)
    full = (largest / Q_MAX[bits]).clamp(min=torch.finfo(torch.float32).tiny)
    best, least = full, torch.full_like(full, torch.inf)
    for step in range(CLIPPING_STEPS if bits < 8 else 1):
        scales = full * (1 - CLIPPING_STEP * step)
        error = (to_integers(groups, scales, bits) * scales[..., None] - groups).square()
        total = (error * importance).sum(-1)
        best, least = torch.where(total < least, scales, best), torch.minimum(total, least)
    return best


def to_integers(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Nearest integers (as floats) of ``groups [..., b]`` over ``scales [...]``, within the symmetric range of ``bits``."""
    limit = Q_MAX[bits]
    return (groups / scales[..., None]).round().clamp(-limit, limit)


def largest_of(tensor: Tensor) -> float | None:
    """The largest absolute value of a tensor; None if a value is not finite."""
    # Floats of 8 bits have no operators of their own.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    # One pass over the memory; where a value is no number, both bounds are none.
    least, most = (float(bound) for bound in torch.aminmax(values))
    largest = max(-least, most)
    return largest if math.isfinite(least) and math.isfinite(most) else None


def pack_int4(values: Tensor) -> Tensor:
    """Two's-complement nibbles of ``values`` int8 in memory order, two a byte, the first in the low half: uint8 ``[n / 2]``."""
    flat = values.contiguous().flatten().view(torch.uint8) & 0xF
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | flat[1::2] << 4


@dataclass(frozen=True)
class Weight:
    """A parameter on its way into a bundle: ``name`` is its model's, ``precision`` what its matrix is stored in.

    ``model``: the module of the stages that it is in: ``model`` (the transformer), ``image_decoder`` or ``text_encoder``.
    """

    name: str
    tensor: Tensor
    precision: Precision
    settings: PrecisionSettings
    model: str = "model"

    @property
    def integer_format(self) -> tuple[int, int]:
        """Bits and block that it is quantised to."""
        return self.settings.integer_format(self.tensor.shape[1], self.precision)

    def stored_as(self, computed: torch.dtype) -> torch.dtype:
        """What it is stored in where it is stored in floats: vectors in what is ``computed`` in. Scales of integers are, too."""
        return computed if self.tensor.ndim < 2 or self.precision.bits else self.precision.dtype

    def quantized(self) -> Quantized:
        return self.settings.quantize(self.name, self.tensor, self.precision)


def join(parts: Sequence[Quantized]) -> Quantized:
    """Weights of the same inputs as one weight of all their output channels."""
    first = parts[0]
    if any((part.bits, part.block) != (first.bits, first.block) for part in parts):
        raise ValueError("weights of different formats cannot be joined")
    values = torch.cat([part.values for part in parts])
    return Quantized(values, torch.cat([part.scales for part in parts]), first.bits, first.block)
