"""Phase tests: what CI runs interpreted, compiled by the Triton at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from gpu_phases.outcome import Check, NotRunError, Outcome, Recorder
from gpu_phases.place import ROOT, Place

FILES = (
    "test_line_attention_kernels.py",
    "test_line_evict_kernels.py",
    "test_line_window_kernels.py",
    "test_spatial_decay_kernels.py",
)

WORKERS = 12
"""Processes at most: each holds a context on the GPU."""


def checks(place: Place, recorder: Recorder) -> Iterator[tuple[str, Check]]:
    """A process of pytest for each file."""
    for file in FILES:
        yield file, lambda file=file: run_file(place, file, recorder.remaining)


def run_file(place: Place, file: str, seconds: float) -> Outcome:
    """Run the tests of one file; in a rehearsal only those of what is refused, as CI runs all."""
    workers = len(os.sched_getaffinity(0))
    chosen = ["-k", "refused"] if place.rehearsal else ["-n", str(min(workers, WORKERS))]
    if not place.rehearsal:
        try:
            import torch
        except ImportError as error:
            raise NotRunError("PyTorch is not installed") from error
        if not torch.cuda.is_available():
            raise NotRunError(f"PyTorch {torch.__version__} sees no CUDA device")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = place.out / f"{file}.log"
    try:
        # What a run that is cut has said stays.
        with log.open("w") as output:
            done = subprocess.run(
                [*command, str(ROOT / "tests" / "exporter" / file)],
                **{"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT, "check": False},
                timeout=seconds,
                env=environment,
            )
    except subprocess.TimeoutExpired as error:
        raise NotRunError(f"took longer than the {seconds:.0f} seconds that were left") from error
    last = (log.read_text().strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise AssertionError(last)
    return Outcome("", "passed", last)
