"""Quality of drawn images: what metrics say of them, and what a precision costs against float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linert.exporter.bundle_export import export_bundle
from linert.exporter.finite import require_finite
from linert.exporter.intervals import Interval, ScoredImages
from linert.exporter.models import LoadedImageDecoder, LoadedTransformer
from linert.exporter.precision import PrecisionSettings
from linert.exporter.sources import request_like
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.generator import Generator, PixelDecoder
from linert.runtime.drawing.samples import Sample, asked_for
from linert.runtime.errors import BundleError, LinertError, RequestError
from linert.runtime.files.replacement import scratch_folder
from linert.runtime.measuring.metrics import Metric, Rows

METRIC_BATCH = 50

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, units done and units in all."""


@dataclass(frozen=True)
class QualityCost:
    """A metric of the bundle's images, of float32's, and of the one minus the other, with 95 % intervals."""

    metric: str
    higher_is_better: bool
    digits: int
    distance: bool
    bundle: Interval
    float32: Interval
    difference: Interval

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the difference is on the worse side."""
        return self.difference.excludes_zero() and (self.difference.value < 0) is self.higher_is_better

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "worse": self.worse}


def quality_cost(
    bundle: Bundle,
    conditioner: Conditioner,
    transformer: LoadedTransformer,
    image_decoder: LoadedImageDecoder,
    samples: Sequence[Sample],
    sampling: SamplingSettings,
    cache: CacheSettings,
    metrics: Sequence[Metric],
    *,
    options: BackendOptions,
    progress: Progress,
) -> list[QualityCost]:
    """Draw ``samples`` from ``bundle`` and from a float32 bundle like it, which is exported for the purpose.

    Conditions and seeds are the same, so that the intervals of the difference are paired.
    """
    with scratch_folder() as folder:
        progress("exporting float32", 0, 1)
        request = request_like(bundle, transformer, image_decoder, PrecisionSettings())
        wide = export_bundle(request, folder / "float32", report=lambda line: None)
        scored: list[list[ScoredImages]] = []
        on_cpu = BackendOptions(threads=options.threads)
        for name, path, chosen in (("bundle", bundle.path, options), ("float32", wide, on_cpu)):
            opened = open_bundle(path, digests=False)
            generator = Generator(opened, chosen, conditioner)
            tokens = []
            for group in generator.batches(samples):
                progress(f"{name} draws", sum(map(len, tokens)), len(samples))
                tokens.append(generator.draw(group, sampling, cache))
            rows = measure_rows(
                metrics,
                generator.decoder,
                np.concatenate(tokens),
                samples,
                lambda done, total, name=name: progress(f"{name} is measured", done, total),
            )
            scored.append([ScoredImages(metric, rows[metric.name]) for metric in metrics])
    return [
        QualityCost(
            ours.metric.name,
            ours.metric.higher_is_better,
            ours.metric.digits,
            ours.metric.distance,
            ours.interval(),
            float32.interval(),
            ours.minus(float32),
        )
        for ours, float32 in zip(*scored, strict=True)
    ]


def measure_rows(
    metrics: Sequence[Metric],
    decoder: PixelDecoder,
    tokens: NDArray[np.int64],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rows]:
    """Each metric's rows ``[n, k]`` of the images of ``tokens [n, N]``.

    Raises:
        BundleError: a pixel is not finite.
        RequestError: a metric fails, or its rows are not one of finite numbers an image.
    """
    asked = asked_for(samples)
    parts: dict[str, list[Rows]] = {metric.name: [] for metric in metrics}
    for start in range(0, len(tokens), METRIC_BATCH):
        progress(start, len(tokens))
        pixels = decoder(tokens[start : start + METRIC_BATCH])
        require_finite(pixels, f"pixels of images from number {start}", BundleError)
        for metric in metrics:
            parts[metric.name].append(_rows(metric, pixels, asked[start : start + METRIC_BATCH]))
    for name, rows in parts.items():
        if len(widths := {part.shape[1] for part in rows}) > 1:
            raise RequestError(
                f"{name} measured {sorted(widths)} numbers an image: they must be equally many"
            )
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _rows(metric: Metric, pixels: NDArray[np.float32], asked: NDArray[Any]) -> Rows:
    try:
        rows = np.asarray(metric.measure(pixels, asked), np.float64)
    except LinertError:
        raise
    except Exception as error:
        # Whatever a metric of somebody's own raises.
        raise RequestError(f"{metric.name} cannot measure images: {type(error).__name__}: {error}") from error
    if rows.ndim != 2 or len(rows) != len(pixels) or not rows.size:
        raise RequestError(
            f"{metric.name} measured an array {list(rows.shape)} of {len(pixels)} images, not [{len(pixels)}, k]"
        )
    if not np.isfinite(rows).all():
        raise RequestError(f"{metric.name} measured numbers that are not finite: mend its measure()")
    return rows
