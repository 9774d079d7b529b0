"""What a server tells Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from linert.runtime.serving.handle import Admitted, Done, Handle, PartDrawn
from linert.runtime.serving.models import Model, Models

LABELS = ("model", "size")
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Seconds."""

COUNTERS = {
    "done": ("linert_images", "Images drawn and decoded."),
    "tokens": ("linert_tokens", "Image tokens drawn."),
    "steps": ("linert_decode_steps", "Decode steps of the whole batch."),
    "line_ends": ("linert_line_ends", "Line ends of the whole batch."),
    "admissions": ("linert_admissions", "Runs of the stage that lets images begin."),
    "refused": ("linert_refused", "Images refused because as many as may were waiting."),
    "cancelled": ("linert_cancelled", "Images cancelled."),
    "failed": ("linert_failed", "Images that failed."),
}
"""Counts of an engine, their metrics and what these say."""


class EngineCollector(Collector):
    """Reads the engines when it is asked."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        counters = {
            name: CounterMetricFamily(metric, text, labels=LABELS)
            for name, (metric, text) in COUNTERS.items()
        }
        gauges = {
            "queued": GaugeMetricFamily("linert_queued", "Images that wait for a row.", labels=LABELS),
            "busy": GaugeMetricFamily("linert_rows_busy", "Rows that an image has.", labels=LABELS),
            "rows": GaugeMetricFamily("linert_rows", "Rows of the batch.", labels=LABELS),
            "state": GaugeMetricFamily("linert_state_bytes", "Bytes of the state.", labels=LABELS),
            "accepted": GaugeMetricFamily(
                "linert_tokens_per_step",
                "Tokens drawn a decode step, on average since the start.",
                labels=LABELS,
            ),
        }
        for model, size, engine in self.models.engines():
            labels, counts = (model.name, size), engine.counts
            for name, counter in counters.items():
                counter.add_metric(labels, getattr(counts, name))
            gauges["queued"].add_metric(labels, engine.queued)
            gauges["busy"].add_metric(labels, engine.busy)
            gauges["rows"].add_metric(labels, engine.manifest.images)
            gauges["state"].add_metric(labels, sum(spec.nbytes for spec in engine.manifest.state))
            gauges["accepted"].add_metric(labels, counts.tokens / max(1, counts.steps))
        yield from counters.values()
        yield from gauges.values()


class Metrics:
    """Counts of the engines, and how long requests take."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(models))
        times = {
            "waiting": "Seconds until an image has a row.",
            "first_line": "Seconds until its first line is drawn.",
            "image": "Seconds until it is drawn and decoded.",
        }
        self.seconds = {
            name: Histogram(f"linert_{name}_seconds", text, LABELS, buckets=BUCKETS, registry=self.registry)
            for name, text in times.items()
        }
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, model: Model, size: str, handle: Handle) -> None:
        """Note the times of an image's events, in the running event loop."""

        async def note() -> None:
            drawn = False
            async for event in handle:
                if isinstance(event, Admitted):
                    self.seconds["waiting"].labels(model.name, size).observe(event.seconds)
                elif isinstance(event, PartDrawn) and not drawn:
                    drawn = True
                    self.seconds["first_line"].labels(model.name, size).observe(event.seconds)
                elif isinstance(event, Done):
                    self.seconds["image"].labels(model.name, size).observe(event.seconds)

        task = asyncio.get_running_loop().create_task(note())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def families(self) -> list[Metric]:
        """What there is to tell now."""
        return list(self.registry.collect())


@dataclass(frozen=True)
class Families(Collector):
    """Metrics that were collected already."""

    metrics: Sequence[Metric]

    def collect(self) -> Iterator[Metric]:
        yield from self.metrics


def rendered(metrics: Sequence[Metric]) -> tuple[bytes, str]:
    """The text that Prometheus reads, and its media type."""
    return generate_latest(Families(metrics)), CONTENT_TYPE_LATEST


def by_replica(told: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """The metrics of several replicas as one list, with the label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, metrics in sorted(told.items()):
        for metric in metrics:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            for sample in metric.samples:
                family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    return list(families.values())
