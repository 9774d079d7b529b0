"""The checkpoints that a bundle was made of, and plans for bundles like it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from exporter.bundle_export import ExportPlan
from exporter.models import (
    Loaded,
    LoadedImageDecoder,
    LoadedTransformer,
    load_image_decoder,
    load_transformer,
)
from exporter.precision import Method, Precision, PrecisionPlan
from runtime.bundle import Bundle, file_sha256
from runtime.errors import CheckpointError
from runtime.manifest import PrecisionSpec, Source


def load_sources(
    bundle: Bundle, checkpoint: Path | None, vq: Path | None, *, grid: int | None = None
) -> tuple[LoadedTransformer, LoadedImageDecoder]:
    """Load the checkpoints of ``bundle``, from where they were at its export unless told otherwise.

    Args:
        grid: tokens in an image row, if another than the bundle's is wanted.

    Raises:
        CheckpointError: a file is not there, or is not the one that the bundle was made of.
    """
    manifest = bundle.manifest
    image_decoder = load_image_decoder(find_source(bundle, manifest.image_decoder.source, vq, "--vq"))
    source, config = manifest.model.source, manifest.model.config
    transformer = load_transformer(
        find_source(bundle, source, checkpoint, "--checkpoint"),
        patch=manifest.image_decoder.patch,
        grid=grid or config["grid"],
        heads=config["heads"],
        ema=source.weights == "ema",
    )
    _same_config(transformer, {**config, "grid": grid or config["grid"]})
    return transformer, image_decoder


def find_source(bundle: Bundle, source: Source, given: Path | None, option: str) -> Path:
    """The checkpoint file that the bundle was made of."""
    path = given or Path(source.path)
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {path} is not there; say where it is with {option}")
    if file_sha256(path) != source.sha256:
        raise CheckpointError(
            f"{path} is not the checkpoint that {bundle.path} was exported from (its sha256 differs); "
            f"give that one with {option}, or export the bundle again"
        )
    return path


def precision_plan(spec: PrecisionSpec) -> PrecisionPlan:
    """The plan that a bundle of this precision was exported with, but for what a calibration found."""
    parts = {part: Precision(name) for part, name in spec.parts.items()}
    method = Method.RTN if spec.method == "none" else Method(spec.method)
    return PrecisionPlan(
        Precision(spec.weights),
        Precision(spec.activations),
        parts,
        spec.block,
        method,
        Precision(spec.image_decoder),
    )


def plan_like(
    bundle: Bundle,
    transformer: LoadedTransformer,
    image_decoder: LoadedImageDecoder,
    precision: PrecisionPlan,
) -> ExportPlan:
    """A plan for the same bundle in another precision."""
    manifest = bundle.manifest
    return ExportPlan(
        transformer,
        image_decoder,
        tuple(manifest.policies),
        manifest.capacity_lines,
        manifest.cache,
        manifest.images,
        manifest.sampling,
        precision,
    )


def _same_config(loaded: Loaded, config: dict[str, object]) -> None:  # type: ignore[type-arg]
    if asdict(loaded.config) != config:
        raise CheckpointError(f"{loaded.path} is another model than the bundle's")
