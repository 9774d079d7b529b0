"""Phase onnxruntime: the CUDA backend draws the CPU's tokens; LlamaGen-XL's speed beside LineAR's published figures."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from gpu_phases.outcome import Check, NotRunError, Outcome, Recorder
from gpu_phases.place import Place
from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import ClassLabel, list_samples
from linert.runtime.measuring.bench import Timings, measure
from linert.runtime.measuring.measured import Measured

FOLDER = "bundles"
DEMO_SEED = 7
DEMO_CLASSES = (3, 8)
DEMOS = ("demo_fp32", "demo_fp16", "lasadgen_fp32", "demo_int4", "lpd_fp32")
"""Model and precision of the weights; what is exported in float32 draws the CPU's tokens, others may round differently."""
XL = "xl"

CELLS = [
    (batch, lines)
    for batch, lines in (
        *((64, 4), (256, 4), (256, 6), (64, 24), (256, 24), (1, 4), (8, 4), (64, 6), (1, 24)),
        *((8, 24), (1, 6), (8, 6)),
    )
]
"""Images a batch and lines of 24, what matters most first."""

PUBLISHED = {
    (256, 24): (64.75, 331.52, 0.77),
    (256, 6): (25.51, 63.99, 4.00),
    (256, 4): (20.97, 43.78, 5.85),
}
"""LineAR (arXiv 2512.04857) on LlamaGen-XL at 384 px in bf16, PyTorch: GB, seconds a batch, images a second."""


def bundle_name(batch: int, lines: int) -> str:
    """Of LlamaGen-XL with so many images a batch and lines in the cache."""
    return f"{XL}_{batch}_{lines}"


def checks(place: Place, recorder: Recorder) -> Iterator[tuple[str, Check]]:
    """The demo in two precisions, with graphs and without; then the measurements, each while there is time."""
    scratch = tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"))
    work = Path(scratch.name)
    for name in DEMOS:
        for graphs in (True, False):
            what = "" if graphs else ", operations one by one"
            yield f"{name}{what}", lambda name=name, graphs=graphs: demo(place, work, name, graphs)
    made: dict[str, Path] = {}
    for batch, lines in CELLS:
        text = f"XL 384 px, batch {batch}, {lines} lines"
        yield text, lambda batch=batch, lines=lines: speed(place, work, batch, lines, made)
    yield "what was unpacked is removed", lambda: _remove(scratch)


def options(place: Place, *, cuda_graphs: bool = True) -> BackendOptions:
    """Of the CUDA backend; in a rehearsal the CPU's stands for it.

    Raises:
        NotRunError: this ONNX Runtime has no CUDA.
    """
    if place.rehearsal:
        return BackendOptions(BackendName.CPU, threads=1)
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise NotRunError(f"ONNX Runtime {onnxruntime.__version__} has no CUDA: pip install 'linert[cuda]'")
    return BackendOptions(BackendName.CUDA, cuda_graphs=cuda_graphs)


def unpacked(place: Place, work: Path, name: str) -> Path:
    """The folder of a bundle that was carried.

    Raises:
        NotRunError: it was not prepared.
    """
    target = work / name
    if not target.exists():
        with tarfile.open(place.prepared(f"{FOLDER}/{name}.tar.xz")) as archive:
            archive.extractall(target, filter="data")
    return target / "bundle"


def demo(place: Place, work: Path, name: str, cuda_graphs: bool) -> Outcome:
    """Draw two batches, and compare with the tokens that the CPU drew beforehand."""
    bundle = unpacked(place, work, name)
    wanted = np.load(bundle.parent / "tokens.npy")
    equal: dict[int, float] = {}
    drawn: dict[int, dict[str, float]] = {}
    with Generator(bundle, options(place, cuda_graphs=cuda_graphs)) as generator:
        samples = list_samples([ClassLabel(label) for label in DEMO_CLASSES], len(wanted), DEMO_SEED)
        groups = list(generator.batches(samples))
        for window in generator.manifest.windows:
            # The first time stages are loaded and captured.
            for _ in range(2):
                before, begun = generator.backend.runs.total(), time.perf_counter()
                came = np.concatenate([generator.draw(group, window=window) for group in groups])
                seconds = (time.perf_counter() - begun) / len(groups)
                runs = (generator.backend.runs.total() - before) / len(groups)
            equal[window] = float((came == wanted).mean())
            drawn[window] = {"seconds_a_batch": seconds, "stages_a_batch": runs}
    text = f"of the CPU's tokens in {len(wanted)} images: " + "; ".join(
        f"window {window}: {share:.2%}, {drawn[window]['seconds_a_batch']:.3f} s a batch in {drawn[window]['stages_a_batch']:.0f} stages"
        for window, share in equal.items()
    )
    passed = all(share == 1 for share in equal.values())
    status = "measured" if not name.endswith("fp32") else "passed" if passed else "failed"
    return Outcome("", status, text, {"equal": equal, "drawn": drawn})


def speed(place: Place, work: Path, batch: int, lines: int, made: dict[str, Path]) -> Outcome:
    """A line of decode steps with the buffer full, a line's end, an image's pixels."""
    from random_weights import fill

    chosen = options(place)
    bundle = unpacked(place, work, bundle_name(batch, lines))
    if not (bundle / "weights.bin").exists():
        fill(bundle, made)
    try:
        # ONNX Runtime keeps what tensors took for as long as the process lives.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            timings = process.submit(timed, bundle, chosen, len(os.sched_getaffinity(0))).result()
    finally:
        _forget(bundle, made)
    tokens = timings.line_width**2
    seconds = (
        timings.decode_ms * (tokens - 1)
        + timings.line_end_ms * (timings.line_width - 1)
        + timings.vq_decoder_ms * batch
    ) / 1e3
    figures = {
        **timings.to_json(),
        "expected_seconds_a_batch": seconds,
        "expected_images_per_second": batch / seconds,
    }
    text = (
        f"{timings.decode_ms:.2f} ms a step, {timings.over_limit:.2f} x the limit; a line's end {timings.line_end_ms:.2f} ms; "
        f"{batch / seconds:.2f} images/s expected; state {timings.state_bytes / 1e9:.2f} GB"
    )
    for width, window in timings.windows.items():
        text += f"; a window of {width}: {window.step_ms / timings.decode_ms:.2f} x a step"
    if (batch, lines) in PUBLISHED:
        memory, _, rate = PUBLISHED[batch, lines]
        text += f" (published: {rate:.2f} images/s in {memory:.1f} GB)"
    return Outcome("", "measured", text, figures)


def timed(bundle: Path, chosen: BackendOptions, threads: int) -> Timings:
    """A line of decode steps, a line's end and an image's pixels, in this process."""
    measured = Measured(bundle, None, chosen)
    try:
        [timings] = measure([measured], threads=threads, rounds=1, image_rounds=0)
    finally:
        measured.generator.close()
    return timings


def _forget(bundle: Path, made: dict[str, Path]) -> None:
    """Remove a bundle's folder, but for weights that others are linked to."""
    if bundle not in {path.parent for path in made.values()}:
        shutil.rmtree(bundle.parent)


def _remove(scratch: tempfile.TemporaryDirectory[str]) -> Outcome:
    scratch.cleanup()
    return Outcome("", "passed")
