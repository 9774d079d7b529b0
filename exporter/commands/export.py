"""``linert export``: turn a checkpoint into a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from linert.exporter.bundle_export import export_bundle
from linert.exporter.bundle_folder import BUNDLE
from linert.exporter.bundle_request import BundleRequest, with_cache
from linert.exporter.cache_wishes import CacheWishes
from linert.exporter.calibration import calibrated
from linert.exporter.commands.announcement import announce, announce_cache
from linert.exporter.commands.export_options import (
    CalibrationRequest,
    ModelFiles,
    PrecisionRequest,
    calibration_options,
    model_options,
    precision_options,
    schedule_options,
    wishes_options,
)
from linert.exporter.models import load_models, load_text_encoder, load_transformer
from linert.exporter.schedule_wishes import ScheduleWishes
from linert.runtime.bundles.bundle import open_bundle, sizes_of
from linert.runtime.commands.output_options import Output, output_options
from linert.runtime.commands.settings_options import SamplingRequest, sampling_options
from linert.runtime.drawing.samples import Prompt
from linert.runtime.errors import RequestError
from linert.runtime.files.replacement import claim_folder
from linert.runtime.files.text_files import is_utf8


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle.")
@model_options()
@wishes_options()
@click.option("--batch", default=1, show_default=True, help="Images drawn at once.")
@schedule_options()
@sampling_options("By default; without it, as the model's authors recommend.", exporting=True)
@precision_options()
@calibration_options()
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
@output_options()
def command(
    checkpoint: Path,
    out: Path,
    model: ModelFiles,
    cache: CacheWishes,
    batch: int,
    schedule: ScheduleWishes,
    sampling: SamplingRequest,
    precision: PrecisionRequest,
    calibration: CalibrationRequest,
    force: bool,
    output: Output,
) -> None:
    """Turn CHECKPOINT, of LlamaGen, LASADGen, Janus, Lumina-mGPT or LPD, and its image decoder into a bundle.

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
    transformer, image_decoder = load_models(checkpoint, model.vq, model.request)
    many = len(model.sizes) > 1
    drawn_by = sampling.settle(transformer.family.usual_sampling(transformer.config))
    guided = drawn_by.guided
    shape, *other_buffers = cache.settle(transformer, guided=guided, one_of_many=many)
    request = BundleRequest(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=shape.policies,
        capacity_lines=shape.capacity_lines,
        cache=shape.cache,
        usual=shape.usual,
        images=batch,
        schedule=schedule.settle(transformer),
        sampling=drawn_by,
        precision=precision.settle(transformer.config.layers),
        text_encoder=load_text_encoder(model.request.text_encoder) if model.request.text_encoder else None,
    )
    if not request.precision.uncalibrated and not calibration.empty:
        raise RequestError(
            f"nothing is calibrated for {request.precision.spec.text}: leave --calibration-images, --calibration-prompts and "
            "--calibration-captions out"
        )
    others = [with_cache(request, transformer, each) for each in other_buffers]
    for size in model.sizes[1:]:
        sized = load_transformer(
            transformer.checkpoint, replace(model.request, size=size), patch=image_decoder.config.patch
        )
        shapes = cache.settle(sized, guided=guided, one_of_many=many)
        others += [with_cache(request, sized, each) for each in shapes]
    conditioner = request.conditioner()
    announced: set[str] = set()
    for each in (request, *others):
        (announce_cache if each.size in announced else announce)(console, each)
        announced.add(each.size)
        if each.transformer.prompts is not None:
            # What stands around prompts must fit at least, and the tokenizer must take usual words as they are.
            each.conditioner().check([Prompt(""), *each.conditioner().usual()])
    images = calibration.settle(conditioner)
    with console.status("exporting") as status:

        def report(line: str) -> None:
            status.update(f"{line} ...")

        request = calibrated(request, images, report, conditioner)
        others = [replace(other, precision=request.precision) for other in others]
        export_bundle(request, out, others=others, force=force, report=report)
    manifest = open_bundle(out, digests=False).manifest
    output.result(
        {
            "bundle": str(out),
            "sha256": manifest.sha256,
            "sizes": sizes_of(out),
            "state_bytes": request.state_bytes,
            "file_bytes": sum(record.bytes for record in manifest.files.values()),
        },
        [f"bundle: {out}"],
    )
