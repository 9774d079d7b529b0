"""Compare every stage on two backends with Polygraphy, each fed the same state from the middle of an image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.drawing.loop import Batch, begin, run_group, run_step

Feed = dict[str, NDArray[Any]]

TOLERANCE = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 1.5e-1, "int8": 1e-1, "int4": 1e-1}
"""Largest error of a real number, times the largest in its output where that is above 1. Products with integer weights differ
most: on the CPU ONNX Runtime rounds what they multiply to 8 bits as well."""


@dataclass(frozen=True)
class StageDifference:
    """How far one output of a stage is off: its largest absolute error, what it may be, and whether it is judged."""

    stage: str
    output: str
    max_abs: float
    bound: float
    judged: bool

    @property
    def share(self) -> float:
        """The error as a share of what it may be."""
        if self.max_abs == 0 or not self.judged:
            return 0.0
        return self.max_abs / self.bound if self.bound else math.inf

    @property
    def passed(self) -> bool:
        return self.share <= 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class BackendRunner(BaseRunner):
    """A stage on one of linert's backends, as Polygraphy runs models.

    Args:
        name: of the backend.
        backend: holds the stage.
        stage: what to run.
    """

    def __init__(self, name: str, backend: Backend, stage: str) -> None:
        super().__init__(name=name)
        self.backend, self.stage = backend, stage

    def activate_impl(self) -> None:
        self.backend.load(self.stage)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for tensor in self.backend.stages[self.stage].inputs:
            metadata.add(tensor.name, np.dtype(tensor.dtype), tensor.shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> Feed:
        spec = self.backend.stages[self.stage]
        for name, values in feed_dict.items():
            self.backend.write(name, values)
        begun = time.perf_counter()
        self.backend.run(self.stage)
        self.backend.synchronize()
        self.inference_time = time.perf_counter() - begun
        return {
            tensor.name: self.backend.read(spec.updates.get(tensor.name, tensor.name))
            for tensor in spec.outputs
        }


def compare_stages(
    reference: Backend,
    other: Backend,
    batch: Batch,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[StageDifference]:
    """Run every stage of a bundle on two backends.

    Args:
        reference, other: hold all of its stages.
        batch: what is drawn on the reference to have a state to feed.
        progress: called with the name of each stage.

    Raises:
        BundleError: a backend cannot run a stage.
    """
    feeds = feeds_of(reference, batch)
    differences = []
    with _quiet():
        for stage in reference.stages:
            progress(stage)
            runners = [BackendRunner("reference", reference, stage), BackendRunner("other", other, stage)]
            # The second time on a GPU is the captured graph.
            results = Comparator.run(runners, data_loader=[feeds[stage], feeds[stage]])
            compared = Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=np.inf))
            [result] = compared
            [iterations] = result.values()
            largest = {
                name: max(1.0, float(np.abs(values).max()) if values.size else 0.0)
                for name, values in results["reference"][-1].items()
                if values.dtype.kind == "f"
            }
            for name in iterations[0]:
                far = max(iteration[name].max_absdiff for iteration in iterations)
                differences.append(
                    _difference(reference.bundle.manifest, stage, name, far, largest.get(name))
                )
    return differences


def feeds_of(backend: Backend, batch: Batch) -> dict[str, Feed]:
    """Inputs of every stage, from the middle of a line in the middle of an image, by drawing ``batch``; or of groups, from the last step that
    a stage has in it."""
    manifest = backend.bundle.manifest
    feeds: dict[str, Feed] = {}

    def keep(kind: str) -> None:
        for stage, spec in backend.stages.items():
            if stage == kind or stage.startswith(f"{kind}."):
                feeds[stage] = {tensor.name: backend.read(tensor.name) for tensor in spec.inputs}

    def admit() -> None:
        # Every other image begins anew.
        backend.write("admitted", (np.arange(manifest.images) + 1) % 2)
        keep("admit")

    begin(backend, batch)
    keep("prefill")
    if batch.groups:
        _draw_groups(backend, batch, keep, admit)
    else:
        _draw_lines(backend, batch, keep, admit)
    tokens = backend.read("tokens")[: backend.specs["grid_tokens"].shape[0]]
    backend.write("grid_tokens", tokens)
    keep("vq_decoder")
    if "text_encoder" in backend.stages:
        tokens = backend.specs["text_tokens"]
        backend.write("text_tokens", np.arange(tokens.shape[1], dtype=np.int64)[None])
        backend.write("text_lengths", np.array([tokens.shape[1] // 2]))
        keep("text_encoder")
    return feeds


def _draw_groups(
    backend: Backend, batch: Batch, keep: Callable[[str], None], admit: Callable[[], None]
) -> None:
    """Draw in groups; every stage is kept before the last step of its width, and one that draws none of them from the middle."""
    by_width = {step.width: step for step in batch.groups}
    for number, step in enumerate(batch.groups):
        backend.write("group_size", np.full(backend.bundle.manifest.images, step.drawn))
        if number == len(batch.groups) // 2:
            groups = backend.bundle.manifest.groups
            for width in groups.widths if groups else ():
                if width not in by_width:
                    keep(width.stage(filtered=True))
            admit()
        if by_width[step.width] is step:
            keep(step.width.stage(filtered=True))
        run_group(backend, batch, step)


def _draw_lines(
    backend: Backend, batch: Batch, keep: Callable[[str], None], admit: Callable[[], None]
) -> None:
    """Draw line by line; stages are kept in the middle."""
    raster = backend.bundle.manifest.raster
    middle = raster.lines // 2
    for step in raster.schedule():
        if (step.stage, step.line) == ("line_end", middle):
            if "replay_slots" in backend.specs:
                backend.write("replay_slots", backend.read("write_slots"))
            keep("line_end")
        run_step(backend, batch, step)
        if (step.stage, step.line, step.column) == ("decode", middle, raster.line_width // 2):
            keep("decode")
            admit()


def _difference(
    manifest: Manifest, stage: str, output: str, max_abs: float, largest: float | None
) -> StageDifference:
    precision = manifest.precision
    names = {precision.weights, precision.activations, *precision.parts.values()}
    if stage == "vq_decoder":
        names = {precision.image_decoder}
    if stage.startswith(("line_end", "prefill", "admit")):
        names = {"fp32"}
    if largest is not None:
        bound = max(TOLERANCE[name] for name in names) * largest
        return StageDifference(stage, output, max_abs, bound, judged=True)
    # A token that is drawn from rounded logits may rightly be another.
    drawn = output.startswith("token") and names != {"fp32"}
    return StageDifference(stage, output, max_abs, 0.0, judged=not drawn)


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy reports at length, and divides by zeros; here its largest differences are enough."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        yield
