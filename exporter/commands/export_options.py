"""The options of an export, in groups: what the model is, what its cache keeps, what weights are stored in, what is calibrated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from linert.exporter.cache_wishes import DEFAULT_POLICY, CacheWishes
from linert.exporter.calibration import Calibration
from linert.exporter.group_tables import MOST_PADDING, MOST_WIDTHS, USUAL_REPULSION, USUAL_STEPS
from linert.exporter.model_options import help_text
from linert.exporter.models import ModelRequest
from linert.exporter.precision import DEFAULT_BLOCK, FLOATS, Method, Precision, PrecisionSettings
from linert.exporter.schedule_wishes import ScheduleWishes
from linert.graphs.families import FAMILIES
from linert.graphs.families.model_facts import ModelOption
from linert.graphs.policies import POLICIES
from linert.runtime.commands.bundle_argument import parse_size
from linert.runtime.commands.condition_options import ConditionRequest
from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.commands.settings_options import cache_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.samples import shortened
from linert.runtime.errors import RequestError

MOST_CALIBRATION_IMAGES = 4096


@dataclass(frozen=True)
class ModelFiles:
    """What a user says of a checkpoint. ``sizes``: width and height in pixels of each size, None for the model's own."""

    vq: Path | None
    sizes: tuple[tuple[int, int] | None, ...]
    request: ModelRequest


def model_options() -> Decorator:
    """Give a command what tells it how to read a checkpoint; it gets a ``model``, a :class:`ModelFiles`."""
    listed = [
        click.option(
            "--vq",
            type=click.Path(path_type=Path),
            help="VQ tokenizer checkpoint, where CHECKPOINT does not hold one.",
        ),
        click.option(
            "--grid",
            type=int,
            help=help_text(
                ModelOption.GRID,
                "tokens in an image row. Default: what the files tell, or a _256, _384 or _512 in the name.",
            ),
        ),
        click.option(
            "--size",
            "sizes",
            callback=lambda c, p, text: (None,) if text is None else parse_sizes(text),
            metavar="WIDTHxHEIGHT,...",
            help=help_text(
                ModelOption.SIZE,
                "pixels of the images, of one size or of many, which share the weights. Default: a square, from a name with 512, 768 or 1024.",
            ),
        ),
        click.option(
            "--prompt-tokens",
            type=int,
            help=help_text(
                ModelOption.PROMPT_TOKENS,
                "longest prompt, special tokens included; every layer keeps a slot for each. Default: 128.",
            ),
        ),
        click.option(
            "--tokenizer",
            type=click.Path(path_type=Path),
            help=help_text(
                ModelOption.TOKENIZER,
                "tokenizer.json, or a folder with it. Default: the one beside CHECKPOINT.",
            ),
        ),
        click.option(
            "--text-encoder",
            type=click.Path(path_type=Path),
            help=help_text(
                ModelOption.TEXT_ENCODER,
                "folder of the Flan-T5 whose features a model of captions sees: the bundle then reads prompts.",
            ),
        ),
        click.option(
            "--prompt-template",
            help=help_text(
                ModelOption.TEMPLATE,
                "what stands around a prompt, with {prompt} in its place. Default: what the model was trained with.",
            ),
        ),
        click.option(
            "--heads",
            type=int,
            help=help_text(ModelOption.HEADS, "attention heads, for sizes that are not published ones."),
        ),
        click.option("--ema", is_flag=True, help="Export the moving average that a training file holds."),
        click.option(
            "--vq-ema/--no-vq-ema",
            default=None,
            help="Take the moving average that the file of --vq holds, or its weights. Default: its weights; to be said with --ema where that "
            "file holds both.",
        ),
    ]
    names = (
        "vq",
        "grid",
        "sizes",
        "prompt_tokens",
        "tokenizer",
        "text_encoder",
        "prompt_template",
        "heads",
        "ema",
        "vq_ema",
    )
    return option_group("model", listed, names, _model_files)


def _model_files(
    *,
    vq: Path | None,
    sizes: tuple[tuple[int, int] | None, ...],
    prompt_template: str | None,
    prompt_tokens: int | None,
    **said: Any,
) -> ModelFiles:
    if prompt_tokens is not None and prompt_tokens < 1:
        raise RequestError("--prompt-tokens must be at least 1")
    request = ModelRequest(size=sizes[0], template=prompt_template, prompt_tokens=prompt_tokens, **said)
    return ModelFiles(vq, sizes, request)


def wishes_options() -> Decorator:
    """Give a command what tells it which cache a bundle is to have; it gets a ``cache``, a :class:`CacheWishes`."""
    listed = [
        click.option(
            "--policy",
            "policies",
            callback=lambda c, p, text: () if text is None else parse_policies(text),
            help=f"Cache policies that the bundle holds, the default first, or all: {', '.join(POLICIES)}. Default: {DEFAULT_POLICY}.",
        ),
        click.option(
            "--capacity-lines",
            "capacities",
            metavar="4,24",
            default="",
            callback=lambda c, p, text: parse_capacities(text),
            help="Lines that the buffer has, for runs with larger budgets than the default; of a list, a run takes the smallest that "
            "its budget fits. More lines than one of several sizes has are all of its lines. Default: the budget; all lines if the bundle "
            "holds full.",
        ),
    ]
    group = option_group("cache", listed, ("policies", "cache", "capacities"), _wishes)
    settings = cache_options(policy=False)
    return lambda function: settings(group(function))


def schedule_options() -> Decorator:
    """Give a command what tells it in which order tokens are drawn; it gets a ``schedule``, a :class:`ScheduleWishes`."""
    listed = [
        click.option(
            "--window",
            "windows",
            default="1",
            show_default=True,
            callback=lambda c, p, text: parse_windows(text),
            help="Positions of every image that a decode step may take, a list like 1,4,8: longer windows need fewer steps for the same images.",
        ),
        click.option(
            "--steps",
            metavar="20,32",
            default="",
            callback=lambda c, p, text: parse_counts(text, "steps like 20,32"),
            help=f"{grouped_families()}: decode steps of an image, of the published tables; of a list, runs choose, and the first is the usual. "
            f"Default: {', '.join(f'{steps} for {grid} x {grid} tokens' for grid, steps in USUAL_STEPS.items())}.",
        ),
        click.option(
            "--group-sizes",
            metavar="1,3,5,...",
            multiple=True,
            callback=lambda c, p, texts: tuple(parse_counts(text, "sizes like 1,3,5") for text in texts),
            help=f"{grouped_families()}: tokens that each decode step draws, where no table is to be taken. Repeatable.",
        ),
        click.option(
            "--group-stages",
            type=click.IntRange(1, MOST_WIDTHS),
            help=f"{grouped_families()}: widths of the decode stages at the most. Fewer take less memory and compute more. Default: as many as "
            f"leave {MOST_PADDING:.0%} of what is computed to be filled up.",
        ),
        click.option(
            "--repulsion",
            type=float,
            help=f"{grouped_families()}: tokens of a group that lie no farther apart are avoided where orders are made. Default: "
            f"{', '.join(f'{repulsion:g} for {grid} x {grid} tokens' for grid, repulsion in USUAL_REPULSION.items())}.",
        ),
    ]
    names = [field.name for field in fields(ScheduleWishes)]
    return option_group("schedule", listed, names, ScheduleWishes)


def grouped_families() -> str:
    """The families that draw in groups, for people."""
    return ", ".join(family.title for family in FAMILIES.values() if family.grouped)


def parse_counts(text: str, example: str) -> tuple[int, ...]:
    """``1,3,5``: whole numbers; none of an empty text. ``example``: what they are and look like, for people."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("-?[0-9]{1,6}", part) for part in parts):
        raise click.BadParameter(f"{shortened(text, 60)!r} is no list of {example}")
    return tuple(map(int, parts))


def parse_capacities(text: str) -> tuple[int, ...]:
    """``4,24``: numbers of lines, each once; empty for none."""
    return tuple(dict.fromkeys(parse_counts(text, "lines like 4,24")))


def _wishes(policies: tuple[str, ...], cache: CacheRequest, capacities: tuple[int, ...]) -> CacheWishes:
    return CacheWishes(policies, cache, capacities)


@dataclass(frozen=True, kw_only=True)
class PrecisionRequest:
    """What weights are to be stored in, as asked for."""

    precision: str
    activations: str
    image_decoder_precision: str | None
    kept: tuple[str, ...]
    block_size: int
    quantization: str | None

    def settle(self, layers: int) -> PrecisionSettings:
        """The settings for a transformer of so many layers."""
        return PrecisionSettings(
            weights=Precision(self.precision),
            activations=Precision(self.activations),
            parts=parse_parts(self.kept, layers),
            block=self.block_size,
            method=Method(self.quantization or ("gptq" if self.precision == "int4" else "rtn")),
            image_decoder=Precision(self.image_decoder_precision) if self.image_decoder_precision else None,
        )


def precision_options() -> Decorator:
    """Give a command what tells it what weights are stored in; it gets a ``precision``, a :class:`PrecisionRequest`."""
    listed = [
        click.option(
            "--precision",
            type=click.Choice([str(p) for p in Precision]),
            default="fp32",
            show_default=True,
            help="Format of the transformer's weights.",
        ),
        click.option(
            "--activations",
            type=click.Choice([str(p) for p in FLOATS]),
            default="fp32",
            show_default=True,
            help="What the transformer computes and caches in. The CPU computes in fp32; halves are for GPUs.",
        ),
        click.option(
            "--image-decoder-precision",
            type=click.Choice([str(p) for p in Precision if p is not Precision.INT4]),
            help="Of the image decoder's convolutions. Default: int8 with int8 and int4 weights, else as the weights.",
        ),
        click.option(
            "--keep",
            "kept",
            multiple=True,
            metavar="PART=PRECISION",
            help="An exception: embedding, output, first, last or a layer's number, as in output=int8. Repeatable.",
        ),
        click.option(
            "--block-size",
            default=DEFAULT_BLOCK,
            show_default=True,
            help="Weights that share a scale in int4.",
        ),
        click.option(
            "--quantization",
            type=click.Choice([str(m) for m in Method]),
            help="How integers are found: rounding to the nearest, or GPTQ on images that the model draws. "
            "Default: gptq for int4, rtn otherwise.",
        ),
    ]
    names = [field.name for field in fields(PrecisionRequest)]
    return option_group("precision", listed, names, PrecisionRequest)


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What images are to calibrate with, as asked for; None was not given."""

    calibration_images: int | None
    calibration_prompts: Path | None
    calibration_captions: Path | None

    @property
    def empty(self) -> bool:
        return all(getattr(self, field.name) is None for field in fields(self))

    def settle(self, conditioner: Conditioner) -> Calibration:
        """How many images, and what they show.

        Raises:
            RequestError: what the model cannot draw, or a file that cannot be read.
        """
        shown = ConditionRequest(prompt_file=self.calibration_prompts, captions=self.calibration_captions)
        images = Calibration.images if self.calibration_images is None else self.calibration_images
        return Calibration(images=images, conditions=shown.settle(conditioner) or None)


def calibration_options() -> Decorator:
    """Give a command what tells it what to calibrate with; it gets a ``calibration``, a :class:`CalibrationRequest`."""
    listed = [
        click.option(
            "--calibration-images",
            type=click.IntRange(1, MOST_CALIBRATION_IMAGES),
            help=f"Default: {Calibration.images}. Images drawn for GPTQ and for the ranges of the image decoder.",
        ),
        click.option(
            "--calibration-prompts",
            type=click.Path(path_type=Path),
            help="What those images show, one prompt a line. Default: prompts of our own.",
        ),
        click.option(
            "--calibration-captions",
            type=click.Path(path_type=Path),
            help="The same as features in a .npy file, for models that see those.",
        ),
    ]
    names = [field.name for field in fields(CalibrationRequest)]
    return option_group("calibration", listed, names, CalibrationRequest)


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """``768x768,512x1024``: widths and heights."""
    pairs = [parse_size(part.strip()).split("x") for part in text.split(",")]
    return tuple(dict.fromkeys((int(width), int(height)) for width, height in pairs))


def parse_policies(text: str) -> tuple[str, ...]:
    """``linear,full``, or ``all``."""
    if text == "all":
        return tuple(POLICIES)
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in POLICIES]:
        raise click.BadParameter(f"no policy {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    return names


def parse_parts(kept: Sequence[str], layers: int) -> dict[str, Precision]:
    """``output=int8``, ``first=fp16``, ``3=int8``: parts of a model of so many ``layers`` and what they are stored in."""
    named = {"embedding": "embedding", "output": "output", "first": "0", "last": str(layers - 1)}
    named |= {str(layer): str(layer) for layer in range(layers)}
    parts = {}
    for text in kept:
        part, _, precision = text.partition("=")
        if part not in named or precision not in list(Precision):
            raise click.BadParameter(
                f"{shortened(text, 60)!r}: say PART=PRECISION with a part among embedding, output, first, last and 0 to "
                f"{layers - 1}, and a precision among {', '.join(Precision)}"
            )
        parts[named[part]] = Precision(precision)
    return parts


def parse_windows(text: str) -> tuple[int, ...]:
    """``1,4,8``: widths of windows; 1 is always among them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,6}", part) and int(part) for part in parts):
        raise click.BadParameter(f"{shortened(text, 60)!r} is no list of widths from 1 like 1,4,8")
    return tuple(sorted({1, *map(int, parts)}))
