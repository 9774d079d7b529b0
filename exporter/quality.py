"""Quality of drawn images: what metrics say of them, and what a precision costs against float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.bundle_export import export_bundle
from exporter.models import LoadedImageDecoder, LoadedTransformer
from exporter.precision import PrecisionPlan
from exporter.sources import plan_like
from runtime.backends import BackendOptions
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import Conditioner
from runtime.generator import Generator, PixelDecoder
from runtime.geometry import CacheSettings
from runtime.manifest import SamplingSettings
from runtime.metrics import Bootstrap, Interval, Metric, Rows
from runtime.replacement import scratch_folder
from runtime.samples import Sample, asked_for

METRIC_BATCH = 50

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, units done and units in all."""


@dataclass(frozen=True)
class QualityCost:
    """A metric of the bundle's images, of float32's, and of the one minus the other, with 95 % intervals."""

    metric: str
    higher_is_better: bool
    bundle: Interval
    float32: Interval
    difference: Interval

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the difference is on the worse side."""
        return self.difference.high < 0 if self.higher_is_better else self.difference.low > 0

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
        plan = plan_like(bundle, transformer, image_decoder, PrecisionPlan())
        wide = export_bundle(plan, folder / "float32", report=lambda line: None)
        found = []
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
            found.append({metric.name: Bootstrap.of(metric.score, rows[metric.name]) for metric in metrics})
    ours, theirs = found
    return [
        QualityCost(
            metric.name,
            metric.higher_is_better,
            ours[metric.name].interval(),
            theirs[metric.name].interval(),
            (ours[metric.name] - theirs[metric.name]).interval(),
        )
        for metric in metrics
    ]


def measure_rows(
    metrics: Sequence[Metric],
    decoder: PixelDecoder,
    tokens: NDArray[np.int64],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rows]:
    """Each metric's rows ``[n, k]`` of the images of ``tokens [n, N]``."""
    asked = asked_for(samples)
    parts: dict[str, list[Rows]] = {metric.name: [] for metric in metrics}
    for start in range(0, len(tokens), METRIC_BATCH):
        progress(start, len(tokens))
        pixels = decoder(tokens[start : start + METRIC_BATCH])
        for metric in metrics:
            parts[metric.name].append(metric.measure(pixels, asked[start : start + METRIC_BATCH]))
    return {name: np.concatenate(values) for name, values in parts.items()}
