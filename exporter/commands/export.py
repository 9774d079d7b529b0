"""``linert export``: turn a checkpoint into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from linert.exporter.bundle_export import ExportPlan, export_bundle
from linert.exporter.bundle_folder import BUNDLE
from linert.exporter.cache_wishes import DEFAULT_POLICY, CacheWishes
from linert.exporter.calibration import Calibration, calibrated
from linert.exporter.commands.announcement import announce
from linert.exporter.model_options import help_text
from linert.exporter.models import (
    ModelRequest,
    load_models,
    load_text_encoder,
    load_transformer,
)
from linert.exporter.precision import DEFAULT_BLOCK, FLOATS, Method, Precision, PrecisionPlan
from linert.graphs.families.given import ModelOption
from linert.graphs.policies import POLICIES
from linert.runtime.bundles.bundle import open_bundle, sizes_of
from linert.runtime.bundles.manifest import MOST_COUNT, SamplingSettings
from linert.runtime.commands.bundle_argument import parse_size
from linert.runtime.commands.cache_options import cache_options
from linert.runtime.commands.condition_options import ConditionRequest
from linert.runtime.commands.output_options import Output, output_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.samples import Prompt, shortened
from linert.runtime.errors import RequestError
from linert.runtime.files.replacement import claim_folder
from linert.runtime.files.text_files import is_utf8

MOST_CALIBRATION_IMAGES = 4096


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--vq",
    type=click.Path(path_type=Path),
    help="VQ tokenizer checkpoint, where CHECKPOINT does not hold one.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle.")
@click.option(
    "--grid",
    type=int,
    help=help_text(
        ModelOption.GRID,
        "tokens in an image row. Default: what the files tell, or a _256, _384 or _512 in the name.",
    ),
)
@click.option(
    "--size",
    "sizes",
    callback=lambda c, p, text: (None,) if text is None else parse_sizes(text),
    metavar="WIDTHxHEIGHT,...",
    help=help_text(
        ModelOption.SIZE,
        "pixels of the images, of one size or of many, which share the weights. Default: a square, from a name with 512, 768 or 1024.",
    ),
)
@click.option(
    "--prompt-tokens",
    type=int,
    help=help_text(
        ModelOption.PROMPT_TOKENS,
        "longest prompt, special tokens included; every layer keeps a slot for each. Default: 128.",
    ),
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help=help_text(
        ModelOption.TOKENIZER, "tokenizer.json, or a folder with it. Default: the one beside CHECKPOINT."
    ),
)
@click.option(
    "--text-encoder",
    type=click.Path(path_type=Path),
    help=help_text(
        ModelOption.TEXT_ENCODER,
        "folder of the Flan-T5 whose features a model of captions sees: the bundle then reads prompts.",
    ),
)
@click.option(
    "--prompt-template",
    help=help_text(
        ModelOption.TEMPLATE,
        "what stands around a prompt, with {prompt} in its place. Default: what the model was trained with.",
    ),
)
@click.option(
    "--heads",
    type=int,
    help=help_text(ModelOption.HEADS, "attention heads, for sizes that are not published ones."),
)
@click.option("--ema", is_flag=True, help="Export the moving average that a training file holds.")
@click.option(
    "--vq-ema/--no-vq-ema",
    default=None,
    help="Take the moving average that the file of --vq holds, or its weights. Default: its weights; to be said with --ema where that "
    "file holds both.",
)
@click.option(
    "--policy",
    "policies",
    callback=lambda c, p, text: () if text is None else parse_policies(text),
    help=f"Cache policies that the bundle holds, the default first, or all: {', '.join(POLICIES)}. Default: {DEFAULT_POLICY}.",
)
@cache_options(policy=False)
@click.option(
    "--capacity-lines",
    type=int,
    help="Lines that the buffer has, for runs with larger budgets than the default. Default: the budget; all "
    "lines if the bundle holds full.",
)
@click.option("--batch", default=1, show_default=True, help="Images drawn at once.")
@click.option(
    "--guidance",
    type=float,
    help="Default scale of classifier-free guidance; above 1 doubles the rows. Default: what the model's authors recommend, like "
    "--top-k.",
)
@click.option(
    "--guidance-interval",
    type=click.IntRange(max=MOST_COUNT),
    default=-1,
    show_default=True,
    help="Default last guided decode step; -1 guides all.",
)
@click.option("--temperature", default=1.0, show_default=True, help="Default temperature.")
@click.option("--top-k", type=click.IntRange(max=MOST_COUNT), help="Default top-k; 0 keeps all tokens.")
@click.option("--top-p", default=1.0, show_default=True, help="Default top-p; 1 keeps all tokens.")
@click.option(
    "--precision",
    type=click.Choice([str(p) for p in Precision]),
    default="fp32",
    show_default=True,
    help="Format of the transformer's weights.",
)
@click.option(
    "--activations",
    type=click.Choice([str(p) for p in FLOATS]),
    default="fp32",
    show_default=True,
    help="What the transformer computes and caches in. The CPU computes in fp32; halves are for GPUs.",
)
@click.option(
    "--image-decoder-precision",
    type=click.Choice([str(p) for p in Precision if p is not Precision.INT4]),
    help="Of the image decoder's convolutions. Default: int8 with int8 and int4 weights, else as the weights.",
)
@click.option(
    "--keep",
    "kept",
    multiple=True,
    metavar="PART=PRECISION",
    help="An exception: embedding, output, first, last or a layer's number, as in output=int8. Repeatable.",
)
@click.option(
    "--block-size", default=DEFAULT_BLOCK, show_default=True, help="Weights that share a scale in int4."
)
@click.option(
    "--quantization",
    type=click.Choice([str(m) for m in Method]),
    help="How integers are found: rounding to the nearest, or GPTQ on images that the model draws. "
    "Default: gptq for int4, rtn otherwise.",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(1, MOST_CALIBRATION_IMAGES),
    help=f"Default: {Calibration.images}. Images drawn for GPTQ and for the ranges of the image decoder.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    help="What those images show, one prompt a line. Default: prompts of our own.",
)
@click.option(
    "--calibration-captions",
    type=click.Path(path_type=Path),
    help="The same as features in a .npy file, for models that see those.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
@output_options()
def command(
    checkpoint: Path,
    vq: Path | None,
    out: Path,
    grid: int | None,
    sizes: tuple[tuple[int, int] | None, ...],
    prompt_tokens: int | None,
    tokenizer: Path | None,
    text_encoder: Path | None,
    prompt_template: str | None,
    heads: int | None,
    ema: bool,
    vq_ema: bool | None,
    policies: tuple[str, ...],
    cache: CacheRequest,
    capacity_lines: int | None,
    batch: int,
    guidance: float | None,
    guidance_interval: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    precision: str,
    activations: str,
    image_decoder_precision: str | None,
    kept: tuple[str, ...],
    block_size: int,
    quantization: str | None,
    calibration_images: int | None,
    calibration_prompts: Path | None,
    calibration_captions: Path | None,
    force: bool,
    output: Output,
) -> None:
    """Turn CHECKPOINT, of LlamaGen, LASADGen, Janus or Lumina-mGPT, and its image decoder into a bundle.

    CHECKPOINT is a file or a folder. Published .pt/.pth/.bin containers, training files and safetensors, in one file or in
    shards, load as they are; no code in them is run.
    """
    console = output.notes()
    if not is_utf8(str(out)):
        raise RequestError(
            f"--out {out} is not in UTF-8, and no bundle can be opened there: give another name"
        )
    # Held from now on, so that nobody else begins to work on it.
    click.get_current_context().with_resource(claim_folder(out, BUNDLE, force=force))
    if prompt_tokens is not None and prompt_tokens < 1:
        raise RequestError("--prompt-tokens must be at least 1")
    request = ModelRequest(
        grid=grid,
        heads=heads,
        prompt_tokens=prompt_tokens,
        size=sizes[0],
        tokenizer=tokenizer,
        template=prompt_template,
        ema=ema,
        vq_ema=vq_ema,
        text_encoder=text_encoder,
    )
    transformer, image_decoder = load_models(checkpoint, vq, request)
    config = transformer.config
    usual = transformer.family.usual_sampling(config)
    guidance = usual.guidance if guidance is None else guidance
    top_k = usual.top_k if top_k is None else top_k
    wanted = CacheWishes(policies, cache, capacity_lines)
    held, settled, capacities = wanted.plan(transformer)
    plan = ExportPlan(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=held,
        capacity_lines=capacities,
        cache=settled,
        images=batch,
        sampling=SamplingSettings(
            guidance=guidance,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        ),
        precision=PrecisionPlan(
            weights=Precision(precision),
            activations=Precision(activations),
            parts=parse_parts(kept, config.layers),
            block=block_size,
            method=Method(quantization or ("gptq" if precision == "int4" else "rtn")),
            image_decoder=Precision(image_decoder_precision) if image_decoder_precision else None,
        ),
        text_encoder=load_text_encoder(text_encoder) if text_encoder else None,
    )
    asked = (calibration_images, calibration_prompts, calibration_captions)
    if not plan.precision.uncalibrated and any(value is not None for value in asked):
        raise RequestError(
            f"nothing is calibrated for {plan.precision.spec.text}: leave --calibration-images, --calibration-prompts and "
            "--calibration-captions out"
        )
    others = []
    for size in sizes[1:]:
        sized = load_transformer(
            transformer.checkpoint, replace(request, size=size), patch=image_decoder.config.patch
        )
        _, settled, capacities = wanted.plan(sized)
        others.append(replace(plan, transformer=sized, cache=settled, capacity_lines=capacities))
    conditioner = plan.conditioner()
    for each in (plan, *others):
        announce(console, each)
        if each.transformer.prompts is not None:
            # What stands around prompts must fit at least, and the tokenizer must take usual words as they are.
            each.conditioner().check([Prompt(""), *each.conditioner().usual()])
    shown = ConditionRequest(prompt_file=calibration_prompts, captions=calibration_captions).settle(
        conditioner
    )
    calibration = Calibration(
        images=Calibration.images if calibration_images is None else calibration_images,
        conditions=shown or None,
    )
    with console.status("exporting") as status:

        def report(line: str) -> None:
            status.update(f"{line} ...")

        plan = calibrated(plan, calibration, report, conditioner)
        others = [replace(other, precision=plan.precision) for other in others]
        export_bundle(plan, out, others=others, force=force, report=report)
    manifest = open_bundle(out, digests=False).manifest
    output.result(
        {
            "bundle": str(out),
            "sha256": manifest.sha256,
            "sizes": sizes_of(out),
            "state_bytes": plan.state_bytes,
            "file_bytes": sum(record.bytes for record in manifest.files.values()),
        },
        [f"bundle: {out}"],
    )


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """``768x768,512x1024``: widths and heights."""
    found = [parse_size(part.strip()).split("x") for part in text.split(",")]
    return tuple(dict.fromkeys((int(width), int(height)) for width, height in found))


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
