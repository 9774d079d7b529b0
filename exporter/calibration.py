"""Calibrated quantisation: GPTQ (arXiv 2210.17323) on images that the model draws itself.

Rounding one weight is made good by the weights of the same output that are not rounded yet, as far as the inputs that
the layer really sees allow. Layers are quantised in order, each on what the quantised ones before it put out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from linert.exporter.bundle_request import BundleRequest
from linert.exporter.models import LoadedImageDecoder
from linert.exporter.precision import (
    Method,
    Precision,
    PrecisionSettings,
    Quantized,
    QuantizedConvolution,
    Range,
    best_scales,
    round_to_nearest,
    to_integers,
)
from linert.exporter.reference_loop import draw_groups, draw_tokens, sampler
from linert.exporter.sampling_params import sampling_params
from linert.graphs.group_history import GroupHistory
from linert.graphs.group_transformer import GroupTransformer, group_visibility
from linert.graphs.history import full_history
from linert.graphs.memory import memory_of
from linert.graphs.sampling import noise_size
from linert.graphs.transformer import Condition, RasterTransformer, Transformer, part_of
from linert.runtime.bundles.manifest import CaptionInput
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.schedule import Groups
from linert.runtime.drawing import samples
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.noise import noise_table
from linert.runtime.drawing.orders import order_of
from linert.runtime.errors import ExportError
from linert.runtime.machine import available_bytes
from linert.runtime.text import size_text

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""

MOST_BIAS = 2.0**30
"""Largest bias as an integer of 32 bits, with room for what it is added to."""

COLUMNS = 128
"""Inputs between two updates of all the weights that are left."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What the layers are to see: ``images`` images of as many ``conditions``, spread over all, drawn from ``seed`` on.

    ``conditions`` None are those that the model's conditioner has for such purposes.
    """

    images: int = 8
    seed: int = 1_000_000
    conditions: Sequence[samples.Condition] | None = None

    def chosen(self, conditions: Sequence[samples.Condition]) -> list[samples.Condition]:
        """``images`` of the ``conditions``, spread over all."""
        return [conditions[k * len(conditions) // self.images % len(conditions)] for k in range(self.images)]


def calibrated(
    request: BundleRequest,
    calibration: Calibration,
    report: Report = print,
    conditioner: Conditioner | None = None,
) -> BundleRequest:
    """``request`` with the integers that it asks for; itself if they need no calibration.

    Args:
        conditioner: knows the features of the conditions, if they are captions; the request's own if None.

    Raises:
        ExportError: conditions must be given and are not, there is too little memory, a weight is larger than its precision holds,
            or what the model computes is not finite.
        CheckpointError: a weight is not finite.
    """
    precision, transformer = request.precision, request.transformer
    if not precision.uncalibrated:
        return request
    if calibration.conditions is None and isinstance(request.condition, CaptionInput):
        raise ExportError(
            "calibration draws images of captions: give features with --calibration-captions FILE.npy, or --quantization rtn and "
            "--image-decoder-precision fp16"
        )
    needed = 4 * sum(tensor.numel() for tensor in transformer.tensors.values())
    if (free := available_bytes()) is not None and needed > free:
        raise ExportError(
            f"calibration draws images in PyTorch, with float32 weights of {size_text(needed)}, and {size_text(free)} of memory are "
            "available: give --quantization rtn and --image-decoder-precision fp16, which need none"
        )
    request.check_numbers()
    conditioner = conditioner or request.conditioner()
    model = transformer.eager()
    inputs = conditioner.inputs(calibration.chosen(calibration.conditions or conditioner.usual()))
    specs = model.condition_inputs(calibration.images, guided=request.guided)
    condition = [torch.from_numpy(inputs[spec.name]) for spec in specs]
    seeds = range(calibration.seed, calibration.seed + calibration.images)
    if isinstance(request.schedule, Groups) and isinstance(model, GroupTransformer):
        in_groups = InGroups.of(request.schedule, seeds, request.raster.line_width)
        tokens = draw_in_groups(model, condition, request.sampling, in_groups, seeds, report)
    elif isinstance(model, RasterTransformer):
        in_groups = None
        tokens = draw_images(model, condition, request.sampling, seeds, report)
    else:
        raise TypeError(f"{type(model).__name__} draws in no order that is known")
    report("quantising the image decoder")
    precision = with_integer_decoder(precision, request.image_decoder, tokens, request.raster)
    if precision.method is Method.GPTQ and precision.integers:
        integers = gptq_weights(
            model, precision, condition, tokens, guided=request.guided, in_groups=in_groups, report=report
        )
        precision = replace(precision, quantized=integers)
    return replace(request, precision=precision)


def with_integer_decoder(
    precision: PrecisionSettings, decoder: LoadedImageDecoder, tokens: Tensor, raster: Raster
) -> PrecisionSettings:
    """``precision`` with the image decoder's large convolutions in integers, if that is what it asks for.

    Args:
        tokens: ``[I, N]``, images whose decoding shows what the activations span.
    """
    if precision.decoder_precision is not Precision.INT8:
        return precision
    model = decoder.eager()
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and ".conv_blocks." in name
    }
    spans: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        now = [(float(part.min()), float(part.max())) for part in (args[0], output)]
        if not all(math.isfinite(bound) for span in now for bound in span):
            raise ExportError(
                f"the image decoder computes numbers that are not finite at {name}: give --image-decoder-precision fp32, and look at "
                "what linert validate says of its images"
            )
        known = spans.get(name, now)
        spans[name] = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(known, now, strict=True)]

    hooks = [layer.register_forward_hook(functools.partial(note, name)) for name, layer in layers.items()]
    for row in tokens:
        model.decode(row.reshape(1, raster.lines, raster.line_width)[:, :, : raster.columns])
    for hook in hooks:
        hook.remove()
    convolutions = {}
    for name, layer in layers.items():
        if layer.bias is None:
            raise TypeError(f"{name}: a convolution without bias")
        read, written = (Range.of(*span) for span in spans[name])
        # A bias is added as an integer of both scales, which must hold it where a channel's weights are next to nothing.
        least = layer.bias.abs() / (read.scale * MOST_BIAS)
        weight = round_to_nearest(layer.weight.flatten(1), 8, least_scales=least)
        convolutions[name] = QuantizedConvolution(weight, layer.bias, read, written)
    return replace(precision, convolutions=convolutions)


@dataclass(frozen=True)
class InGroups:
    """How I images are drawn in groups: ``orders [I, N]`` int64, the cell of the token of every rank, and ``sizes`` of the groups."""

    orders: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(groups: Groups, seeds: Sequence[int], grid: int) -> InGroups:
        """As a bundle draws the images with these ``seeds``, of ``grid`` x ``grid`` tokens."""
        sizes = groups.sizes[0]
        orders = [order_of(seed, grid, sizes, groups.repulsion) for seed in seeds]
        return InGroups(torch.from_numpy(np.stack(orders)), sizes)


def gptq_weights(
    model: Transformer,
    settings: PrecisionSettings,
    condition: Sequence[Tensor],
    tokens: Tensor,
    *,
    guided: bool,
    in_groups: InGroups | None = None,
    report: Report = print,
) -> dict[str, Quantized]:
    """Quantise every product of ``model`` whose part ``settings`` have in integers; the model becomes the quantised one.

    Args:
        condition, tokens: of I images that the layers are to see: the prefill stage's inputs, and ``[I, N]``.
        guided: let them see the unconditional rows as well.
        in_groups: how the images were drawn, of a model that draws in groups.
        report: called with a line before each piece of work.

    Returns:
        The integers by parameter name, for :attr:`PrecisionSettings.quantized`.
    """
    embedded = model.condition(condition, guided=guided)
    fed = tokens.repeat(2 if guided else 1, 1)
    names = {
        module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    quantized: dict[str, Quantized] = {}

    def quantize(group: Sequence[nn.Linear], hessian: Tensor) -> None:
        for module in group:
            name = names[module]
            precision = settings.of(part_of(name))
            if precision.bits:
                bits, block = settings.integer_format(module.in_features, precision)
                try:
                    quantized[name] = gptq(module.weight, hessian, bits, block)
                except torch.linalg.LinAlgError as error:
                    raise ExportError(
                        f"GPTQ finds no integers for {name}: what the layer sees of the images that the model draws is not finite, or all "
                        "the same; give --quantization rtn"
                    ) from error
                module.weight = nn.Parameter(quantized[name].dequantized(), requires_grad=False)

    x, ropes, visible = _whole_pass(model, embedded, fed, in_groups)
    blocks = list(model.blocks())
    with torch.no_grad():
        for number, block in enumerate(blocks):
            report(f"quantising layer {number + 1} of {len(blocks)}")
            runs = [
                functools.partial(model.block, block, rows, rope, seen)
                for rows, rope, seen in zip(x.split(1), ropes, visible, strict=True)
            ]
            _quantize_in_order(_linears(cast("nn.Module", block)), runs, quantize)
            x = torch.cat([run() for run in runs])
        report("quantising the output")
        outputs = [linear for linear, name in names.items() if part_of(name) == "output"]
        if in_groups is not None:
            # Tokens are drawn of queries alone.
            x = x[:, -tokens.shape[1] :]
        _quantize_in_order(outputs, [functools.partial(model.logits, rows) for rows in x.split(1)], quantize)
    return quantized


def _whole_pass(
    model: Transformer, condition: Condition, tokens: Tensor, in_groups: InGroups | None
) -> tuple[Tensor, list[Any], list[Tensor]]:
    """What layers see of whole images in one pass: ``x [B, S, dim]``, and row by row what encodes positions and what is visible."""
    if isinstance(model, GroupTransformer) and in_groups is not None:
        orders = in_groups.orders.repeat(len(tokens) // len(in_groups.orders), 1)
        x = model.rows(condition, tokens, orders, in_groups.sizes)
        return x, [None] * len(x), [group_visibility(in_groups.sizes)[None]] * len(x)
    if not isinstance(model, RasterTransformer):
        raise TypeError(f"{type(model).__name__} draws in no order that is known")
    x = torch.cat([condition.embeddings, model.embed(tokens[:, :-1])], dim=1)
    alone = [Condition(*(part[row : row + 1] for part in condition)) for row in range(len(x))]
    ropes = [model.rope(torch.arange(x.shape[1])[None], one.starts) for one in alone]
    return x, ropes, [one.visible(x.shape[1]) for one in alone]


def require_finite_logits(logits: Tensor, index: int) -> None:
    """Raise :class:`ExportError` where a model that is to be calibrated computes no numbers, first for token ``index``."""
    if not logits.isfinite().all():
        raise ExportError(
            f"the model computes numbers that are not finite, first at token {index} of the images that it draws to be calibrated: "
            "its checkpoint is damaged, or belongs to another model"
        )


def draw_in_groups(
    model: GroupTransformer,
    condition: Sequence[Tensor],
    sampling: SamplingSettings,
    in_groups: InGroups,
    seeds: Sequence[int],
    report: Report,
) -> Tensor:
    """Tokens ``[I, N]`` int64 that ``model`` draws in groups, one image a seed."""
    config = model.config
    noise = torch.from_numpy(noise_table(seeds, config.image_tokens, noise_size(config.vocab_size)))
    history = GroupHistory(model, guided=sampling.guided)
    tokens = torch.zeros_like(in_groups.orders)
    groups = draw_groups(history, condition, in_groups.orders, in_groups.sizes, sampling, noise)
    for number, group in enumerate(groups):
        report(f"drawing calibration images: step {number + 1} of {len(in_groups.sizes)}")
        require_finite_logits(group.logits, group.rank)
        tokens.scatter_(1, group.cells, group.tokens)
    return tokens


def draw_images(
    model: RasterTransformer,
    condition: Sequence[Tensor],
    sampling: SamplingSettings,
    seeds: Sequence[int],
    report: Report,
) -> Tensor:
    """Tokens ``[I, N]`` int64 that ``model`` draws with the full cache, one image a seed."""
    config, images = model.config, len(condition[0])
    slots = (config.prefix_len + config.image_tokens,) * config.layers
    memory = memory_of(config, images=images, guided=sampling.guided, capacities=slots)
    history = full_history(model, memory)
    noise = torch.from_numpy(noise_table(seeds, config.image_tokens, noise_size(config.vocab_size)))
    draw = sampler(sampling_params(sampling), noise, guided=memory.geometry.guided)

    def choose(logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        require_finite_logits(logits, index)
        return draw(logits, index)

    tokens = []
    for index, _, token in draw_tokens(history, condition, choose, lambda line: history.end_line()):
        line, column = divmod(index, config.line_width)
        if column == 0:
            report(f"drawing calibration images: line {line + 1} of {config.lines}")
        tokens.append(token)
    return torch.stack(tokens, dim=1)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _quantize_in_order(
    linears: Sequence[nn.Linear],
    runs: Sequence[Callable[[], Tensor]],
    quantize: Callable[[Sequence[nn.Linear], Tensor], None],
) -> None:
    """Quantise the products of ``linears`` in the order in which ``runs``, one a sequence, come to them.

    Products of the same input share its Hessian.
    """
    groups: list[list[nn.Linear]] = []
    inputs: list[Tensor] = []

    def note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        if inputs and inputs[-1] is args[0]:
            groups[-1].append(linear)  # type: ignore[arg-type]
        else:
            inputs.append(args[0])
            groups.append([linear])  # type: ignore[list-item]

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    runs[0]()
    for hook in hooks:
        hook.remove()
    for group in groups:
        width = group[0].in_features
        hessian = torch.zeros(width, width, dtype=torch.float64)

        def gather(linear: nn.Module, args: tuple[Tensor, ...], hessian: Tensor = hessian) -> None:
            seen = args[0].flatten(0, -2)
            hessian += (seen.T @ seen).double()

        hook = group[0].register_forward_pre_hook(gather)
        for run in runs:
            run()
        hook.remove()
        quantize(group, hessian)


def gptq(weight: Tensor, hessian: Tensor, bits: int, block: int = 0) -> Quantized:
    """Quantise ``weight [N, K]`` so that its outputs, rather than its entries, change least.

    Scales come from the weights as they are, so that inputs can be rounded in the order of their importance.

    Args:
        hessian: ``[K, K]``, sum over the samples of ``x x^T``.
        bits, block: as in :func:`linert.exporter.precision.round_to_nearest`.
    """
    outputs, width = weight.shape
    size = block or width
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    # An input that is always zero: its weights do not matter.
    diagonal[diagonal == 0] = 1.0
    importance = diagonal.float().reshape(1, -1, size)
    scales = best_scales(weight.float().reshape(outputs, -1, size), bits, importance)
    diagonal += DAMPING * diagonal.mean()
    order = diagonal.argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float()[:, order].clone()
    column_scales = scales.repeat_interleave(size, 1)[:, order]
    rounded = torch.zeros_like(left)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.zeros(outputs, stop - start)
        for column in range(start, stop):
            now, scale = left[:, column], column_scales[:, column]
            rounded[:, column] = to_integers(now[:, None], scale, bits)[:, 0]
            error = (now - rounded[:, column] * scale) / spread[column, column]
            left[:, column:stop] -= error[:, None] * spread[None, column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    values = torch.empty_like(rounded)
    values[:, order] = rounded
    return Quantized(values.to(torch.int8), scales if block else scales[:, 0], bits, block)
