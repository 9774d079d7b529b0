"""Compare cache policies and budgets on one bundle: quality, agreement with the full cache, memory, speed.

Every cell draws the same images (conditions and seeds) as the full cache. Tokens and measurements are kept in the
comparison's folder as they come, so that an interrupted comparison goes on where it stopped. In memory are the images'
tokens and measurements of two cells at most, the full cache's and another's, and log-probabilities of one step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from linert.exporter.compare_grid import Cell, labels_of
from linert.exporter.finite import require_finite
from linert.exporter.intervals import Interval, ScoredImages
from linert.exporter.quality import measure_rows
from linert.exporter.step_file import StepFile
from linert.exporter.timing import ResizedBackend, step_times
from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Record
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.generator import Generator, make_batch
from linert.runtime.drawing.loop import Batch, begin, run_step
from linert.runtime.drawing.output import read_tokens
from linert.runtime.drawing.run_folder import TOKENS_NAME, RunRequest, run_folder
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import BundleError, RequestError
from linert.runtime.files.array_files import read_arrays, write_arrays
from linert.runtime.files.atomic_files import make_folder
from linert.runtime.measuring.measured import milliseconds
from linert.runtime.measuring.metrics import Metric

CELLS = "cells"
CODE = "metrics_sha256"
TIMING_ROUNDS = 3


class CompareRequest(Record, frozen=True):
    """What a comparison's folder holds. ``metrics_sha256``: of the metrics' code, as of :func:`linert.runtime.files.source_digest.source_digest`."""

    bundle_sha256: str
    caches: tuple[CacheSettings, ...]
    samples: tuple[Sample, ...]
    sampling: SamplingSettings
    metrics: str
    metrics_sha256: str
    forced_images: int


@dataclass(kw_only=True)
class CellResult:
    """What was measured of a cell.

    ``first_divergence``: median, over the images that differ from the full cache's, of the first token that does.
    ``kl_mean``, ``kl_by_line``: of the cell's next-token distributions from the full cache's, nats a token.
    ``top1_agreement``: share of tokens for which both have the same most likely one.
    """

    label: str
    budget: str
    cache: CacheSettings
    state_bytes: int
    metrics: dict[str, Interval]
    metrics_minus_full: dict[str, Interval]
    token_agreement: float
    first_divergence: float | None
    kl_mean: float
    kl_by_line: list[float]
    top1_agreement: float
    decode_ms: float | None = None
    line_end_ms: float | None = None

    @property
    def mean_lines(self) -> float:
        """Of the layers."""
        return sum(self.cache.budget_lines) / len(self.cache.budget_lines)

    @property
    def lines_text(self) -> str:
        """Lines, and how they were asked for where that is something else."""
        shown = f"{self.mean_lines:.3g}"
        return shown if self.budget in (shown, "1") else f"{shown} ({self.budget})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": msgspec.to_builtins(self.cache)}


class Comparison:
    """One comparison in its folder.

    Args:
        generator: draws from the bundle's variant with the largest buffers.
        cells: the full cache first.
        request: what is compared; the folder belongs to it.
        metrics: quality metrics.
        folder: where everything is kept.
        resume: go on with what the folder holds.
        progress: called with a phase's name, units done and units in all.

    Attributes:
        cautions: what is to be said of the intervals, once it has run.
    """

    def __init__(
        self,
        generator: Generator,
        cells: Sequence[Cell],
        request: CompareRequest,
        metrics: Sequence[Metric],
        folder: Path,
        *,
        resume: bool,
        progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        self.generator, self.cells, self.request = generator, cells, request
        self.manifest = generator.manifest
        self.metrics, self.folder, self.resume, self.progress = metrics, folder, resume, progress
        self.cautions: list[str] = []
        make_folder(folder / CELLS)

    def run(self, *, timing: bool) -> list[CellResult]:
        """Draw, measure and time every cell."""
        for number, cell in enumerate(self.cells):
            self._tokens(cell, number)
        full = self._drawn(self.cells[0])
        forced = self._forced(full)
        reference = self._scored(self.cells[0], full)
        self.cautions = [images.caution for images in reference if images.caution]
        results = []
        for number, (cell, label) in enumerate(zip(self.cells, labels_of(self.cells), strict=True)):
            tokens = self._drawn(cell) if number else full
            scored = self._scored(cell, tokens) if number else reference
            self.progress("intervals", number, len(self.cells))
            results.append(self._result(cell, label, tokens != full, scored, reference, forced[cell.key]))
        if timing:
            decode_ms, line_end_ms = self._timings()
            for cell, result in zip(self.cells, results, strict=True):
                result.decode_ms = decode_ms[cell.cache.budget_lines]
                result.line_end_ms = line_end_ms[cell.cache.policy]
        return results

    def pictures(self, cell: Cell, count: int) -> NDArray[np.float32]:
        """Pixels of the first ``count`` images of ``cell``."""
        return self.generator.decoder(self._drawn(cell)[:count])

    def _drawn(self, cell: Cell) -> NDArray[np.int64]:
        """The tokens ``[n, N]`` of a cell that is drawn."""
        return read_tokens(self.folder / CELLS / cell.key / TOKENS_NAME)["tokens"].astype(np.int64)

    def _tokens(self, cell: Cell, number: int) -> None:
        """Draw what the cell's folder does not hold yet."""
        path = self.folder / CELLS / cell.key
        request = self.request
        run = RunRequest(request.samples, request.sampling, cell.cache, request.bundle_sha256)
        groups = list(self.generator.batches(request.samples))
        firsts = itertools.accumulate(map(len, groups), initial=0)
        with run_folder(path, run, resume=self.resume and path.exists(), force=False) as store:
            missing = [
                (index, first, group)
                for index, (first, group) in enumerate(zip(firsts, groups, strict=False))
                if any(image not in store.done for image in range(first, first + len(group)))
            ]
            if not missing:
                return
            with self._fitting(cell) as generator:
                for index, first, group in missing:
                    self.progress("drawing", number * len(groups) + index, len(self.cells) * len(groups))
                    tokens = generator.draw(group, request.sampling, cell.cache)
                    store.record({first + offset: row for offset, row in enumerate(tokens)})

    @contextmanager
    def _fitting(self, cell: Cell) -> Iterator[Generator]:
        """One of the bundle's variant with the smallest buffers that hold the cell's budget; it draws the same, and reads less."""
        widest = self.generator
        fitting = widest.bundle.fitting(cell.cache)
        if fitting.variant == widest.bundle.variant:
            yield widest
            return
        with Generator(fitting, widest.options, widest.conditioner) as generator:
            yield generator

    def _scored(self, cell: Cell, tokens: NDArray[np.int64]) -> list[ScoredImages]:
        """The cell's images under each metric."""
        rows = self._metric_rows(cell, tokens)
        return [ScoredImages(metric, rows[metric.name]) for metric in self.metrics]

    def _metric_rows(self, cell: Cell, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Each metric's rows ``[n, k]``."""
        if not self.metrics:
            return {}
        path = self.folder / CELLS / cell.key / "metrics.npz"
        code = np.frombuffer(self.request.metrics_sha256.encode(), np.uint8)
        kept = self._kept(path, [CODE, *(metric.name for metric in self.metrics)])
        if np.array_equal(kept.get(CODE, ()), code):
            return {metric.name: kept[metric.name].astype(np.float64) for metric in self.metrics}
        rows = measure_rows(
            self.metrics,
            self.generator.decoder,
            tokens,
            self.request.samples,
            lambda done, total: self.progress(f"measuring {cell.cache.policy}", done, total),
        )
        write_arrays(path, {**rows, CODE: code})
        return rows

    def _kept(self, path: Path, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """The arrays of a file of an earlier start; none if it lacks one of ``names``, was damaged, or is to be made anew."""
        try:
            arrays = read_arrays(path) if self.resume else {}
        except RequestError:
            return {}
        return arrays if all(name in arrays for name in names) else {}

    def _forced(self, tokens: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.float64]]]:
        """KL and top-1 agreement of every cell's logits with the full cache's, both fed the full cache's ``tokens``.

        ``kl`` and ``top1`` are ``[N]``, the mean over images and branches.
        """
        samples = self.request.samples[: self.request.forced_images]
        groups = list(self.generator.batches(samples))
        parts: dict[str, list[dict[str, NDArray[np.float64]]]] = {cell.key: [] for cell in self.cells}
        for index, group in enumerate(groups):
            first = index * self.manifest.images
            fed = tokens[first : first + len(group)]
            files = [self.folder / CELLS / cell.key / f"forced_{index:04d}.npz" for cell in self.cells]
            kept = [self._kept(file, ("kl", "top1")) for file in files]
            # On disk: of 50 guided images of 24 x 24 tokens out of 16,384 they are 3.8 GB.
            with StepFile(self.folder) as reference:
                if not all(kept):
                    for log_probs in self._log_probs(self.cells[0], group, fed):
                        reference.append(log_probs)
                for number, (cell, file) in enumerate(zip(self.cells, files, strict=True)):
                    done = index * len(files) + number
                    self.progress("feeding all the same tokens", done, len(groups) * len(files))
                    if not kept[number]:
                        write_arrays(file, distances(reference, self._log_probs(cell, group, fed)))
                    parts[cell.key].append(kept[number] or read_arrays(file))  # type: ignore[arg-type]
        weights = [len(group) for group in groups]
        return {
            key: {
                name: np.average([part[name] for part in of_batches], axis=0, weights=weights)
                for name in ("kl", "top1")
            }
            for key, of_batches in parts.items()
        }

    def _log_probs(
        self, cell: Cell, group: Sequence[Sample], fed: NDArray[np.int64]
    ) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities ``[branches * n, V]`` before each of the tokens ``fed [n, N]``."""
        manifest = self.manifest
        batch = self._batch(group, cell)
        rows = [b * manifest.images + i for b in range(manifest.branches) for i in range(len(group))]
        for index, logits in enumerate(forced_logits(self.generator.backend, batch, fed)):
            require_finite(logits[rows], f"logits of {cell.cache.policy} before token {index}", BundleError)
            yield log_softmax(logits[rows])

    def _result(
        self,
        cell: Cell,
        label: str,
        differs: NDArray[np.bool_],
        scored: Sequence[ScoredImages],
        reference: Sequence[ScoredImages],
        forced: dict[str, NDArray[np.float64]],
    ) -> CellResult:
        """``differs [n, N]``: which tokens are not the full cache's. ``reference``: the full cache's images."""
        diverging = differs.any(1)
        first = float(np.median(differs[diverging].argmax(1))) if diverging.any() else None
        by_line = forced["kl"].reshape(self.manifest.raster.lines, -1).mean(1)
        itself = cell is self.cells[0]
        return CellResult(
            label=label,
            budget=cell.budget,
            cache=cell.cache,
            state_bytes=self.manifest.state_bytes_at(cell.cache.budget_lines),
            metrics={images.metric.name: images.interval() for images in scored},
            metrics_minus_full={
                images.metric.name: Interval(0.0, 0.0, 0.0, 0.0) if itself else images.minus(full)
                for images, full in zip(scored, reference, strict=True)
            },
            token_agreement=float(1 - differs.mean()),
            first_divergence=first,
            kl_mean=float(forced["kl"].mean()),
            kl_by_line=by_line.tolist(),
            top1_agreement=float(forced["top1"].mean()),
        )

    def _timings(self) -> tuple[dict[tuple[int, ...], float], dict[str, float]]:
        """Median milliseconds of a decode step by buffer, in rounds that take turns, and of each policy's line end.

        A budget is timed on the bundle's own decode graph with a buffer of that size, which is what a bundle
        exported at that budget runs.
        """
        stage = self._any_batch(self.cells[0]).stages["decode"]
        budgets = list(dict.fromkeys(cell.cache.budget_lines for cell in self.cells))
        decode: dict[tuple[int, ...], list[float]] = {budget: [] for budget in budgets}
        turns = list(itertools.product(range(TIMING_ROUNDS), budgets))
        for number, (_, budget) in enumerate(turns):
            self.progress("timing decode", number, len(turns))
            decode[budget] += self._step_times(stage, budget)
        line_ends = {}
        for cell in self.cells:
            policy = cell.cache.policy
            if policy not in line_ends:
                begin(self.generator.backend, self._any_batch(cell))
                name = f"line_end.{policy}"
                times = [milliseconds(lambda name=name: self.generator.backend.run(name)) for _ in range(12)]
                line_ends[policy] = statistics.median(times[2:])
        return {budget: statistics.median(times) for budget, times in decode.items()}, line_ends

    def _step_times(self, stage: str, budget: tuple[int, ...]) -> list[float]:
        """Of one backend at a time, which is gone when the next one comes."""
        backend = ResizedBackend(self.generator.bundle, stage, budget, self.generator.options.threads)
        return step_times(backend, stage, self.manifest)

    def _any_batch(self, cell: Cell) -> Batch:
        return self._batch(self.request.samples[:1], cell)

    def _batch(self, samples: Sequence[Sample], cell: Cell) -> Batch:
        return make_batch(
            self.manifest, self.generator.conditioner, samples, self.request.sampling, cell.cache
        )


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Over the last axis, summed in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def distances(
    reference: Iterable[NDArray[np.float32]], other: Iterable[NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """Step by step ``kl`` (nats) of ``other`` from ``reference`` and share of equal arg-maxima ``top1``: ``[N]`` each."""
    kl, top1 = [], []
    for wanted, other_logits in zip(reference, other, strict=True):
        kl.append((np.exp(wanted) * (wanted - other_logits)).sum(-1, dtype=np.float64).mean())
        top1.append((wanted.argmax(-1) == other_logits.argmax(-1)).mean())
    return {"kl": np.array(kl), "top1": np.array(top1)}


def forced_logits(backend: Backend, batch: Batch, tokens: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The logits ``[B, V]`` before each token of an image, when ``tokens [n, N]`` are fed whatever is drawn."""
    missing = backend.bundle.manifest.images - len(tokens)
    fed = np.pad(tokens, ((0, missing), (0, 0)), mode="edge")
    begin(backend, batch)
    yield backend.read("logits")
    for step in backend.bundle.manifest.raster.schedule():
        if step.stage == "decode":
            index = step.line * backend.bundle.manifest.raster.line_width + step.column
            backend.write("token", fed[:, index])
        run_step(backend, batch, step)
        if step.stage == "decode":
            yield backend.read("logits")
