"""Find the checkpoints that a bundle's manifest names, load them again, and request exports like the bundle's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linert.exporter.bundle_request import BundleRequest
from linert.exporter.checkpoint import digest_of, find_weights, is_averaged
from linert.exporter.models import LoadedImageDecoder, LoadedTransformer, ModelRequest, load_models
from linert.exporter.precision import Method, Precision, PrecisionSettings
from linert.graphs.families import FAMILIES
from linert.graphs.families.llama import MOST_ROPE_BASE
from linert.graphs.families.settings import Settings
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import Model, PrecisionSpec, PromptInput, Source
from linert.runtime.bundles.manifest_file import MOST
from linert.runtime.errors import BundleError, CheckpointError, RequestError

SIZES = frozenset({"dim", "ffn_dim", "heads", "kv_heads", "gate_rank"})
"""Numbers of a configuration that are sides of tensors."""

MOST_SIDE = 1 << 17
"""Largest of :data:`SIZES`: tables are made of some before they are held to the tensors."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint files that a bundle was made of."""

    bundle: Bundle
    transformer: Path
    image_decoder: Path

    @staticmethod
    def find(bundle: Bundle, checkpoint: Path | None = None, vq: Path | None = None) -> Checkpoints:
        """Where they were at the export, unless told otherwise. Reads both files to compare digests.

        Raises:
            CheckpointError: a file is not there, or is not the one that the bundle was made of.
        """
        model, decoder = bundle.manifest.model.source, bundle.manifest.image_decoder.source
        model_path = find_source(bundle, model, checkpoint, "--checkpoint")
        if vq is None and decoder.sha256 == model.sha256:
            return Checkpoints(bundle, model_path, model_path)
        return Checkpoints(bundle, model_path, find_source(bundle, decoder, vq, "--vq"))

    def load(self, grid: int | None = None) -> tuple[LoadedTransformer, LoadedImageDecoder]:
        """Load both.

        Args:
            grid: tokens in a line, if another than the bundle's is wanted.
        """
        manifest = self.bundle.manifest
        config = family_config(self.bundle)
        if grid is not None and grid != manifest.raster.line_width:
            if not hasattr(config, "grid"):
                raise RequestError(
                    f"{manifest.model.family} has no grid to choose; export it with another --size"
                )
            config = replace(config, grid=grid)
        prompts = manifest.condition
        request = ModelRequest(
            tokenizer=self.bundle.file(prompts.tokenizer) if isinstance(prompts, PromptInput) else None,
            template=prompts.template if isinstance(prompts, PromptInput) else None,
            ema=is_averaged(manifest.model.source.weights),
        )
        joined = manifest.image_decoder.source.sha256 == manifest.model.source.sha256
        if not joined:
            request = replace(request, vq_ema=is_averaged(manifest.image_decoder.source.weights))
        return load_models(self.transformer, None if joined else self.image_decoder, request, config=config)


def family_config(bundle: Bundle) -> Any:
    """The configuration that a bundle's model was exported with.

    Raises:
        BundleError: its family is not known here, or has no such configuration.
    """
    model = bundle.manifest.model
    if model.family not in FAMILIES:
        raise BundleError(
            f"{bundle.path} holds a {model.family}, and there are {', '.join(FAMILIES)}: upgrade linert"
        )
    try:
        config = FAMILIES[model.family].config_type(**model.config)
        _check_numbers(model)
        return config
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BundleError(
            f"{bundle.path}: the configuration in its manifest is no {model.family}'s: {error}; export the bundle again"
        ) from error


def _check_numbers(model: Model) -> None:
    """Raise :class:`ValueError` for numbers of a configuration that sizes and tables must not be made of; shapes are held to the tensors."""
    settings = Settings(model.config, "manifest.json, config")
    for name, value in model.config.items():
        if value is None:
            raise ValueError(settings.fault(name, "told"))
    settings.number("rope_base", 1, MOST_ROPE_BASE)
    settings.number("norm_eps", 0, 1)
    for name, value in model.config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            settings.integer(name, int(name in SIZES), MOST_SIDE if name in SIZES else MOST["vocabulary"])
    for name, expected in (("layers", model.layers), ("vocab_size", model.vocab_size)):
        if settings.integer(name, 0, expected) != expected:
            raise ValueError(settings.fault(name, f"{expected}"))


def load_sources(
    bundle: Bundle, checkpoint: Path | None, vq: Path | None
) -> tuple[LoadedTransformer, LoadedImageDecoder]:
    """:meth:`Checkpoints.find` and :meth:`Checkpoints.load`."""
    return Checkpoints.find(bundle, checkpoint, vq).load()


def find_source(bundle: Bundle, source: Source, user_path: Path | None, option: str) -> Path:
    """A checkpoint that the bundle was made of; ``option`` is what a user gives another place with."""
    path = user_path or Path(source.path)
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} is not there; say where it is with {option}")
    if digest_of(find_weights(path).files) != source.sha256:
        raise CheckpointError(
            f"{path} is not the checkpoint that {bundle.path} was exported from (its sha256 differs); "
            f"give that one with {option}, or export the bundle again"
        )
    return path


def precision_settings(spec: PrecisionSpec) -> PrecisionSettings:
    """The settings that a bundle of this precision was exported with, but for what a calibration found.

    Raises:
        BundleError: it names formats that there are not.
    """
    try:
        return PrecisionSettings(
            weights=Precision(spec.weights),
            activations=Precision(spec.activations),
            parts={part: Precision(name) for part, name in spec.parts.items()},
            block=spec.block,
            method=Method.RTN if spec.method == "none" else Method(spec.method),
            image_decoder=Precision(spec.image_decoder),
        )
    except ValueError as error:
        raise BundleError(f"the bundle's manifest tells of a precision that there is not: {error}") from error


def request_like(
    bundle: Bundle,
    transformer: LoadedTransformer,
    image_decoder: LoadedImageDecoder,
    precision: PrecisionSettings,
) -> BundleRequest:
    """A request for the same bundle in another precision."""
    manifest = bundle.manifest
    return BundleRequest(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=tuple(manifest.policies),
        capacity_lines=manifest.capacity_lines,
        cache=manifest.cache,
        images=manifest.images,
        schedule=manifest.schedule,
        sampling=manifest.sampling,
        precision=precision,
    )
