"""Arrays of many steps on disk: one of them in memory, and nothing left behind."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from linert.exporter.step_file import StepFile
from linert.runtime.errors import OutputError


def test_what_was_written_is_read_again_and_again(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    with StepFile(tmp_path) as file:
        for step in steps:
            file.append(step.T)
        for _ in range(2):
            assert np.array_equal(list(file), steps.transpose(0, 2, 1))
        with pytest.raises(ValueError, match="a step of float32"):
            file.append(steps[0])
    assert not list(tmp_path.iterdir())


def test_memory_holds_one_step(tmp_path: Path) -> None:
    step = np.zeros((1 << 18,), np.float32)
    tracemalloc.start()
    try:
        with StepFile(tmp_path) as file:
            for _ in range(40):
                file.append(step)
            assert not list(tmp_path.iterdir()), "the file has no name that a killed process could leave"
            assert sum(array.size for array in file) == 40 * step.size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * step.nbytes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    with StepFile(tmp_path) as file:
        file.file.close()
        file.file = open("/dev/full", "wb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        with pytest.raises(OutputError, match=r"cannot keep log-probabilities.*No space left"):
            file.append(np.zeros(10, np.float32))
    with pytest.raises(OutputError, match="No such file"):
        StepFile(tmp_path / "absent")
