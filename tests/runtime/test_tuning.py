"""The table of layouts that were measured on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from linert.runtime.errors import ExportError
from linert.runtime.plugins import tuning
from linert.runtime.plugins.base import TensorKind
from linert.runtime.plugins.contracts import FLOAT_TYPE, LINE_ATTENTION
from linert.runtime.plugins.line_attention import LineAttention, LineAttentionLaunch
from linert.runtime.plugins.tuning import Tuning, read_tunings, tuning_of, write_tunings

HALVES = Tuning(90, 64, "float16", 2, 512)
OLDER = Tuning(80, 64, "float16", 4, 1024)
WIDER = Tuning(90, 128, "float16", 8, 256)


def test_what_is_measured_again_replaces_what_was(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    write_tunings([HALVES, OLDER], file)
    write_tunings([WIDER, Tuning(90, 64, "float16", 1, 256)], file)
    assert read_tunings(file) == (OLDER, Tuning(90, 64, "float16", 1, 256), WIDER)
    assert list(tmp_path.iterdir()) == [file]


def test_the_newest_gpu_that_was_measured_decides(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    write_tunings([HALVES, OLDER, WIDER], file)
    assert tuning_of((80, 90, 120), 64, "float16", file) == HALVES
    assert tuning_of((80, 89), 64, "float16", file) == OLDER
    unknown = tuning_of((89,), 64, "float16", file)
    assert (unknown.warps, unknown.tile) == (1, 1024)
    assert tuning_of((90,), 64, "float32", file).tile == 512


def test_the_table_that_is_delivered_can_be_read() -> None:
    read_tunings()


@pytest.mark.parametrize("content", ["{}", '[{"capability": 90}]', "["])
def test_a_file_that_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(content)
    with pytest.raises(ExportError, match=r"tuning\.json, cannot be read .*; it is a list of"):
        tuning_of((90,), 64, "float16", file)


def test_launches_are_laid_out_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "read_tunings", lambda path: (HALVES,))
    sizes = {"R": 8, "G": 1, "C": 97, "D": 64}
    kinds = [
        TensorKind("float16" if operand.dtype == FLOAT_TYPE else operand.dtype, operand.shape(sizes))
        for operand in LINE_ATTENTION.inputs.values()
    ]
    measured = LineAttentionLaunch(8, 1, 97, 64, "float16", HALVES.warps, HALVES.tile)
    assert LineAttention().launch(kinds, (80, 90)) == measured
    assert LineAttention().launch(kinds).warps == 1
    # A whole key of sixteen query heads is read by four warps and no less.
    assert LineAttentionLaunch.tuned(8, 16, 97, 256, "float16", (90,)).warps == 4


@pytest.mark.parametrize(
    ("warps", "tile", "words"),
    [
        (3, 1024, "3 warps; can be a power of two from 1 to 16"),
        (32, 1024, "32 warps"),
        (1, 0, "a tile of 0"),
    ],
)
def test_layouts_that_kernels_cannot_have_are_refused(warps: int, tile: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LineAttentionLaunch(8, 1, 97, 64, "float16", warps, tile)
    with pytest.raises(ValueError, match="2 warps; can be a power of two from 4 to 16"):
        LineAttentionLaunch(8, 16, 97, 256, "float16", 2, 1024)
