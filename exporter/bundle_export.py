"""Export: a transformer and an image decoder become a bundle, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper

from linert.exporter.bundle_folder import BUNDLE
from linert.exporter.finiteness import check_numbers
from linert.exporter.models import Loaded, LoadedImageDecoder, LoadedTextEncoder, LoadedTransformer
from linert.exporter.onnx_export import export_stage
from linert.exporter.precision import Precision, PrecisionSettings, Weight
from linert.exporter.vocabulary import TokenizerFile
from linert.exporter.weights_file import WeightsFile
from linert.exporter.work import work_of
from linert.graphs import stages
from linert.graphs.families import vq
from linert.graphs.memory import Memory, memory_of
from linert.graphs.policies import POLICIES
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.text_encoder import EncodeText
from linert.graphs.transformer import FamilyConfig, part_of
from linert.runtime.bundles.bundle import file_sha256, manifest_name
from linert.runtime.bundles.cache_settings import FULL, CacheSettings
from linert.runtime.bundles.manifest import (
    CONTRACT_KEY,
    SCHEMA,
    CaptionInput,
    ClassInput,
    FileRecord,
    ImageDecoder,
    Manifest,
    Model,
    PolicySpec,
    PromptInput,
    StageSpec,
    StateSpec,
    TensorSpec,
    Work,
)
from linert.runtime.bundles.manifest_file import check, contract, encode, seal
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.conditions import Conditioner, conditioner_of
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import ExportError, OutputError
from linert.runtime.files.replacement import new_folder

WEIGHTS_NAME = "weights.bin"
TOKENIZER_FILE = "tokenizer/tokenizer.json"
MOST_IMAGES = 4096
"""Images of a batch: a bound of what is taken for meant."""

GRAPH_BYTES = 64 << 20
"""Room to ask for beside the weights: graphs and manifest."""


@dataclass(frozen=True)
class CacheShape:
    """The cache of a variant: the policies that it holds, the settings that it runs with by default, lines of every layer's buffer."""

    policies: tuple[str, ...] = ()
    cache: CacheSettings | None = None
    capacity_lines: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BundleRequest:
    """Everything that decides what a bundle will be. Nothing is written until :func:`export_bundle`.

    ``policies``: those that the bundle holds. ``capacity_lines``: lines of each layer's buffer. ``cache``: the default
    settings of its runs. A model without a cache has none of the three. ``windows``: positions that a decode step may take, 1 among them.
    """

    transformer: LoadedTransformer
    image_decoder: LoadedImageDecoder
    policies: tuple[str, ...]
    capacity_lines: tuple[int, ...]
    cache: CacheSettings | None
    images: int
    sampling: SamplingSettings
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    windows: tuple[int, ...] = (1,)
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
        if 1 not in self.windows or not all(1 <= window <= config.line_width for window in self.windows):
            faults.append(
                f"windows of {', '.join(map(str, self.windows))} positions; must be 1 and others up to a line's {config.line_width}"
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
        return self.sampling.guidance > 1

    @property
    def memory(self) -> Memory:
        """What the layers remember between steps."""
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


def with_cache(request: BundleRequest, transformer: LoadedTransformer, shape: CacheShape) -> BundleRequest:
    """The same with another cache, and the transformer for images of another size."""
    return replace(
        request,
        transformer=transformer,
        policies=shape.policies,
        cache=shape.cache,
        capacity_lines=shape.capacity_lines,
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
        stages.Decode(model, memory),
        stages.Decode(model, memory, filtered=False),
        *(
            stages.WindowDecode(model, memory, window, filtered=filtered)
            for window in request.windows
            if window > 1
            for filtered in (True, False)
        ),
        *memory.line_ends(model, request.policies),
        stages.VQDecoder(
            pixels, images=1, rows=raster.lines, columns=raster.columns, line_width=raster.line_width
        ),
    ]
    if request.text_encoder is not None:
        all_stages.append(EncodeText(request.text_encoder.hollow(), raster.prefix_len))
    return all_stages


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
        images=request.images,
        guided=request.guided,
        capacity_lines=request.capacity_lines,
        windows=request.windows,
        policies={
            policy: PolicySpec(POLICIES[policy]().score_window(request.raster.line_width))
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
