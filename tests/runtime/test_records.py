"""Records are read within bounds, and what is wrong with one is said in a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.engines import engines_folder, read_engines
from linert.runtime.drawing.output import read_recipe
from linert.runtime.drawing.trace import read_trace
from linert.runtime.errors import BundleError, RequestError
from linert.runtime.files.records import MOST_BYTES, RecordError, read_record
from linert.runtime.plugins import tuning
from linert.runtime.text import brief
from tests.conftest import Result

Linert = Callable[..., Result]

DAMAGED = {
    "cut": b'{"schema": ',
    "no text": b'{"schema": "\xff\xfe"}',
    "nested": b"[" * 200_000,
    "long": b'{"schema": "' + b"a" * 9000 + b'"}',
    "empty": b"",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_records_are_one_line(kind: str, tmp_path: Path, tiny_bundle: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(RecordError) as error:
        read_record(path, dict[str, int])
    assert len(str(error.value)) < 400
    assert tuning.FILE.exists()
    bundle = open_bundle(tiny_bundle)
    folder = engines_folder(bundle, "rtx")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "engine.json").write_bytes(DAMAGED[kind])
        with pytest.raises(BundleError, match="cannot be read"):
            read_engines(bundle, "rtx")
    finally:
        (folder / "engine.json").unlink()
        folder.rmdir()
        folder.parent.rmdir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_what_is_no_file_of_a_records_size_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, message in (
        ("pipe", "no regular file"),
        ("huge", "longer than 256 MiB"),
        (".", "no regular file"),
    ):
        with pytest.raises(RecordError, match=message):
            read_record(tmp_path / name, dict[str, int])
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none", dict[str, int])


def test_the_middle_of_long_messages_goes() -> None:
    assert brief("short") == "short"
    assert brief("a" * 500 + "the end") == "a" * 150 + " … " + "a" * 143 + "the end"


@pytest.fixture(scope="module")
def trace(linert: Linert, many_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    request = ("run", many_bundle, "--classes", "1,2", "--policy", "linear")
    result = linert(*request, "--record-trace", folder / "trace.npz", "--out", folder / "out")
    assert result.code == 0, result.err
    return folder / "trace.npz"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("samples", 0, "seed"), 2**64),
        (("samples", 0, "seed"), 2**63),
        (("samples", 1, "seed"), -1),
        (("samples",), []),
        (("sampling", "guidance_interval"), 2**63),
        (("sampling", "guidance_interval"), -2),
        (("sampling", "top_k"), 2**40),
        (("sampling", "temperature"), -1),
        (("cache", "aggregation"), "a" * 9000),
        (("cache", "anchor_tokens"), 2**63),
        (("cache", "budget_lines"), [2**63, 1]),
    ],
)
def test_a_trace_with_numbers_that_no_run_has_is_refused(
    place: tuple[str | int, ...],
    value: object,
    trace: Path,
    linert: Linert,
    many_bundle: Path,
    tmp_path: Path,
) -> None:
    with np.load(trace) as stored:
        arrays = dict(stored)
    header = msgspec.json.decode(arrays["header"].tobytes())
    at = header
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    arrays["header"] = np.frombuffer(msgspec.json.encode(header), np.uint8)
    np.savez(tmp_path / "trace.npz", **arrays)
    result = linert("run", many_bundle, "--replay-trace", tmp_path / "trace.npz", "--out", tmp_path / "out")
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 1500
    assert not (tmp_path / "out").exists()


def test_nothing_larger_than_the_headers_images_is_read(
    trace: Path, many_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(many_bundle).manifest
    assert len(read_trace(trace, manifest).tokens) == 2
    with np.load(trace) as stored:
        arrays = dict(stored)
    arrays["write_slots"] = np.zeros((2000, *arrays["write_slots"].shape[1:]), np.int32)
    np.savez_compressed(tmp_path / "trace.npz", **arrays)
    with pytest.raises(RequestError, match="far more than what it should hold"):
        read_trace(tmp_path / "trace.npz", manifest)


def test_a_picture_without_a_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="holds no linert recipe"):
        read_recipe(tmp_path / "a.png")
