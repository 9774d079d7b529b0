"""Export: a transformer and an image decoder become a bundle, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import onnx
from onnx import helper

from linert.exporter.bundle_folder import BUNDLE
from linert.exporter.bundle_request import TOKENIZER_FILE, BundleRequest, variant_names
from linert.exporter.onnx_export import export_stage
from linert.exporter.weights_file import WeightsFile
from linert.exporter.work import work_of
from linert.graphs import stages
from linert.graphs.families import vq
from linert.graphs.group_memory import GroupMemory
from linert.graphs.group_stages import GroupDecode
from linert.graphs.group_transformer import GroupTransformer
from linert.graphs.memory import Memory, RasterMemory
from linert.graphs.policies import POLICIES
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.text_encoder import EncodeText
from linert.graphs.transformer import RasterTransformer, Transformer
from linert.runtime.bundles.bundle import file_sha256, manifest_name
from linert.runtime.bundles.manifest import (
    CONTRACT_KEY,
    SCHEMA,
    FileRecord,
    ImageDecoder,
    Manifest,
    Model,
    PolicySpec,
    StageSpec,
    StateSpec,
    TensorSpec,
    Work,
)
from linert.runtime.bundles.manifest_file import check, contract, encode, seal
from linert.runtime.bundles.schedule import Groups, Lines
from linert.runtime.errors import ExportError, OutputError
from linert.runtime.files.replacement import new_folder

WEIGHTS_NAME = "weights.bin"
GRAPH_BYTES = 64 << 20
"""Room to ask for beside the weights: graphs and manifest."""


def export_bundle(
    request: BundleRequest,
    out: Path,
    *,
    others: Sequence[BundleRequest] = (),
    force: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Write the bundle of ``request`` to folder ``out``.

    It is written to a temporary neighbour that takes the name when it is complete and on the disk: on any failure,
    interruption or power cut ``out`` is what it was before.

    Args:
        others: the same model for images of other sizes or with other buffers, which share its weights.
        force: replace ``out`` if it is a bundle and nothing else.
        report: called with a line before each piece of work.

    Raises:
        OutputError: ``out`` exists, cannot be written, or the disk is full.
        ExportError: a stage cannot be traced, the precision needs a calibration that it has not had, or does not hold the
            numbers of a weight.
        CheckpointError: a weight is not finite.
    """
    if missing := request.precision.uncalibrated:
        raise ExportError(f"{' and '.join(missing)} must be calibrated before the export")
    report("reading the weights")
    request.check_numbers()
    with new_folder(out, BUNDLE, force=force) as folder:
        free = shutil.disk_usage(folder).free
        needed = request.weight_bytes + GRAPH_BYTES
        if free < needed:
            raise OutputError(
                f"{out.parent.resolve()} has {free >> 20} MiB free and the bundle needs about {needed >> 20} MiB"
            )
        _write(request, others, folder, report)
    return out


@dataclass
class _Variant:
    """A bundle's stages for one size of images and one of buffers, while it is written. ``suffix``: of its files' names."""

    request: BundleRequest
    suffix: str
    stages: list[stages.Stage]
    work: dict[str, Work] = field(default_factory=dict)

    def file(self, stage: stages.Stage) -> str:
        return f"{stage.name}{self.suffix}.onnx"


def _write(
    request: BundleRequest, others: Sequence[BundleRequest], folder: Path, report: Callable[[str], None]
) -> None:
    names = variant_names([request, *others])
    variants = [
        _Variant(each, f".{name}" if name else "", _stages(each))
        for name, each in zip(names, [request, *others], strict=True)
    ]
    tensors = request.weights()
    state_names = {spec.name for spec in request.memory.state()}
    with WeightsFile(folder / WEIGHTS_NAME) as weights:
        for variant in variants:
            bound_to = contract(_manifest(variant, {}))
            for stage in variant.stages:
                report(f"tracing {stage.name}{variant.suffix}")
                try:
                    proto = export_stage(stage, weights, tensors, variant.suffix)
                except RuntimeError as error:
                    raise ExportError(f"cannot trace the {stage.name} stage: {error}") from error
                variant.work[stage.name] = work_of(proto, state_names)
                helper.set_model_props(proto, {CONTRACT_KEY: bound_to})
                onnx.save(proto, folder / variant.file(stage))
    shared = {WEIGHTS_NAME: FileRecord(weights.digest, weights.nbytes)}
    if request.tokenizer is not None:
        path = folder / TOKENIZER_FILE
        path.parent.mkdir()
        shutil.copyfile(request.tokenizer.path, path)
        shared[TOKENIZER_FILE] = FileRecord(file_sha256(path), path.stat().st_size)
    report("checking the graphs and reading the checkpoints' digests")
    for variant in variants:
        files = dict(shared)
        for stage in variant.stages:
            path = folder / variant.file(stage)
            onnx.checker.check_model(str(path))
            files[path.name] = FileRecord(file_sha256(path), path.stat().st_size)
        manifest = seal(_manifest(variant, files))
        check(manifest)
        (folder / manifest_name(variant.suffix.removeprefix("."))).write_bytes(encode(manifest))


def _stages(request: BundleRequest) -> list[stages.Stage]:
    raster, memory = request.raster, request.memory
    model = request.transformer.hollow(request.precision.activations.dtype)
    pixels = request.image_decoder.hollow()
    for module in pixels.modules():
        if isinstance(module, vq.Upsample):
            # Convolutions in integers keep the taps that were quantised.
            module.by_phase = not request.precision.convolutions
    all_stages: list[stages.Stage] = [
        stages.Prefill(model, memory),
        stages.Admit(model, memory),
        *_drawing_stages(request, model, memory),
        stages.VQDecoder(
            pixels, images=1, rows=raster.lines, columns=raster.columns, line_width=raster.line_width
        ),
    ]
    if request.text_encoder is not None:
        all_stages.append(EncodeText(request.text_encoder.hollow(), raster.prefix_len))
    return all_stages


def _drawing_stages(request: BundleRequest, model: Transformer, memory: Memory) -> Iterator[stages.Stage]:
    """The stages that decode, with and without filters, and that end lines."""
    if isinstance(memory, GroupMemory) and isinstance(model, GroupTransformer):
        widths = request.schedule.widths if isinstance(request.schedule, Groups) else ()
        for width in widths:
            for filtered in (True, False):
                yield GroupDecode(model, memory, width, filtered=filtered)
        return
    if not isinstance(memory, RasterMemory) or not isinstance(model, RasterTransformer):
        raise TypeError(f"{type(model).__name__} has no stages that draw")
    windows = request.schedule.windows if isinstance(request.schedule, Lines) else (1,)
    for window in windows:
        for filtered in (True, False):
            if window == 1:
                yield stages.Decode(model, memory, filtered=filtered)
            else:
                yield stages.WindowDecode(model, memory, window, filtered=filtered)
    yield from memory.line_ends(model, request.policies)


def _manifest(variant: _Variant, files: dict[str, FileRecord]) -> Manifest:
    request = variant.request
    transformer, decoder = request.transformer, request.image_decoder
    config = transformer.config
    return Manifest(
        schema=SCHEMA,
        producer={name: version(name) for name in ("linert", "torch", "onnx", "onnxscript")},
        precision=request.precision.spec,
        model=Model(
            family=transformer.family.name,
            config=asdict(config),
            parameters=sum(tensor.numel() for tensor in transformer.tensors.values()),
            vocab_size=config.vocab_size,
            layers=config.layers,
            source=transformer.source,
        ),
        condition=request.condition,
        image_decoder=ImageDecoder(
            config=asdict(decoder.config),
            patch=decoder.config.patch,
            codebook_size=decoder.config.codebook_size,
            source=decoder.source,
        ),
        raster=request.raster,
        schedule=request.schedule,
        images=request.images,
        guided=request.guided,
        capacity_lines=request.capacity_lines,
        policies={
            policy: PolicySpec(
                POLICIES[policy]().score_window(request.raster.line_width),
                dict(request.usual.get(policy, {})),
            )
            for policy in request.policies
        },
        cache=request.cache,
        sampling=request.sampling,
        state=tuple(
            StateSpec(
                spec.name, _dtype_name(spec), spec.shape, kind=spec.kind, layer=spec.layer, axes=spec.axes
            )
            for spec in request.memory.state()
        ),
        stages={
            stage.name: _stage_spec(stage, variant.file(stage), variant.work.get(stage.name, Work(0, 0, 0)))
            for stage in variant.stages
        },
        files=files,
    )


def _stage_spec(stage: stages.Stage, file: str, work: Work) -> StageSpec:
    return StageSpec(
        file=file,
        inputs=tuple(_spec(spec) for spec in stage.inputs),
        outputs=tuple(_spec(spec) for spec in stage.outputs),
        updates=stage.updates(),
        in_place=tuple(sorted(stage.in_place)),
        work=work,
    )


def _spec(spec: StageTensor) -> TensorSpec:
    return TensorSpec(spec.name, _dtype_name(spec), spec.shape)


def _dtype_name(spec: StageTensor) -> str:
    return str(spec.dtype).removeprefix("torch.")
