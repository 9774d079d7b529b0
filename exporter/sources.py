"""The checkpoints that a bundle was made of, and plans for bundles like it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
        manifest = bundle.manifest
        return Checkpoints(
            bundle,
            find_source(bundle, manifest.model.source, checkpoint, "--checkpoint"),
            find_source(bundle, manifest.image_decoder.source, vq, "--vq"),
        )

    def load(self, grid: int | None = None) -> tuple[LoadedTransformer, LoadedImageDecoder]:
        """Load both.

        Args:
            grid: tokens in an image row, if another than the bundle's is wanted.
        """
        manifest = self.bundle.manifest
        config = {**manifest.model.config, "grid": grid or manifest.model.config["grid"]}
        transformer = load_transformer(
            self.transformer,
            patch=manifest.image_decoder.patch,
            grid=config["grid"],
            heads=config["heads"],
            ema=manifest.model.source.weights == "ema",
        )
        _same_config(transformer, config)
        return transformer, load_image_decoder(self.image_decoder)


def load_sources(
    bundle: Bundle, checkpoint: Path | None, vq: Path | None
) -> tuple[LoadedTransformer, LoadedImageDecoder]:
    """:meth:`Checkpoints.find` and :meth:`Checkpoints.load`."""
    return Checkpoints.find(bundle, checkpoint, vq).load()


def find_source(bundle: Bundle, source: Source, given: Path | None, option: str) -> Path:
    """A checkpoint file that the bundle was made of; ``option`` is what a user gives another place with."""
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
