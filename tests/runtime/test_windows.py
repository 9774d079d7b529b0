"""Windows in a bundle: the images, traces and maps are those of single steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from linert import ClassLabel, Generator, Sample
from linert.runtime.drawing.eviction_map import Residency
from linert.runtime.drawing.generator import Replay
from linert.runtime.drawing.loop import LineEnds
from linert.runtime.drawing.trace import SlotRecorder, read_trace
from linert.runtime.drawing.window_choice import WindowChoice
from linert.runtime.errors import RequestError
from tests.conftest import Result

Linert = Callable[..., Result]
Files = tuple[Path, Path]
TINY_OPTIONS = ("--grid", 6, "--heads", 4)
SAMPLES = [Sample(ClassLabel(1), 7), Sample(ClassLabel(3), 8)]


@pytest.fixture(scope="module")
def generator(windowed_bundle: Path) -> Generator:
    return Generator(windowed_bundle)


@pytest.mark.parametrize("window", [2, 4])
def test_an_image_is_the_same_in_fewer_steps(window: int, generator: Generator) -> None:
    manifest = generator.manifest
    assert manifest.windows == (1, 2, 4)
    single, wide = SlotRecorder(manifest), SlotRecorder(manifest)
    maps, wide_maps = Residency(manifest), Residency(manifest)

    def watch(backend: object, ends: LineEnds, watchers: tuple[object, ...]) -> None:
        for watcher in watchers:
            watcher(backend, ends)  # type: ignore[operator]

    tokens = generator.draw(SAMPLES, watcher=lambda *event: watch(*event, (single, maps)))
    lines: list[int] = []
    wide_tokens = generator.draw(
        SAMPLES, window=window, on_line=lines.append, watcher=lambda *event: watch(*event, (wide, wide_maps))
    )
    assert (tokens == wide_tokens).all()
    assert (single.slots == wide.slots).all()
    assert (maps.shares == wide_maps.shares).all()
    assert lines == sorted(set(lines))
    assert lines[-1] == manifest.raster.lines


def test_traces_are_recorded_and_replayed_with_windows(
    linert: Linert, windowed_bundle: Path, generator: Generator, tmp_path: Path
) -> None:
    options = ("--classes", "1,3", "--seed", 7, "--window")
    single, wide = tmp_path / "single.npz", tmp_path / "wide.npz"
    for width, path in ((1, single), (4, wide)):
        done = linert(
            "run", windowed_bundle, *options, width, "--out", tmp_path / f"{width}", "--record-trace", path
        )
        assert done.code == 0, done.err
    first, second = (read_trace(path, generator.manifest) for path in (single, wide))
    assert (first.write_slots == second.write_slots).all()
    for picture in (tmp_path / "1").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "4" / picture.name).read_bytes()
    # The evictions of the second image imposed on the first.
    for width in (1, 4):
        recorder = SlotRecorder(generator.manifest)
        generator.draw(
            first.header.samples,
            cache=first.header.cache,
            replay=Replay(first, [1, 0]),
            window=width,
            watcher=recorder,
        )
        assert (recorder.by_image() == first.write_slots[[1, 0]]).all()


def test_a_window_that_the_bundle_lacks_is_refused(
    linert: Linert, windowed_bundle: Path, generator: Generator, tmp_path: Path
) -> None:
    for width in (3, 0, -1, 7):
        done = linert("run", windowed_bundle, "--classes", 1, "--window", width, "--out", tmp_path / "out")
        assert done.code == 2
        assert f"has no window of {width} positions, only 1, 2, 4: export it with --window" in done.err
    with pytest.raises(RequestError, match="no window of 5"):
        generator.draw(SAMPLES, window=5)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ("0", "no list of widths"),
        ("-2", "no list of widths"),
        ("4,x", "no list of widths"),
        ("7", "up to a line's 6"),
    ],
)
def test_a_window_that_no_bundle_can_have_is_refused(
    windows: str, message: str, linert: Linert, tiny_files: Files, tmp_path: Path
) -> None:
    done = linert(
        "export",
        tiny_files[0],
        "--vq",
        tiny_files[1],
        *TINY_OPTIONS,
        "--window",
        windows,
        "--out",
        tmp_path / "b",
    )
    assert done.code == 2
    assert message in done.err


def test_tokens_that_are_not_drawn_yet_can_be_looked_at(generator: Generator) -> None:
    seen: list[np.ndarray] = []
    generator.draw(SAMPLES, window=4, on_line=lambda lines: seen.append(generator.tokens(2)))
    assert all(tokens.min() >= 0 and tokens.max() < 64 for tokens in seen)


def test_the_quickest_window_is_kept(generator: Generator) -> None:
    choice = WindowChoice((1, 2, 4))
    assert choice.best == 1
    cost = {1: 1.0, 2: 1.5, 4: 4.0}
    taken = []
    for _ in range(12):
        width = choice.next()
        taken.append(width)
        # The first time of each does not count.
        first = taken.count(width) == 1
        choice.note(width, tokens=10 * width, seconds=100.0 if first else 10 * cost[width])
    assert taken == [1, 2, 4] * 3 + [2, 2, 2]
    assert choice.text == "2 (milliseconds a token: 1: 1000.00, 2: 750.00, 4: 1000.00)"


def test_an_image_is_the_same_while_windows_are_tried(
    linert: Linert, windowed_bundle: Path, generator: Generator, tmp_path: Path
) -> None:
    tokens = generator.draw(SAMPLES)
    assert (generator.draw(SAMPLES, window=WindowChoice((1, 2, 4))) == tokens).all()
    done = linert("run", windowed_bundle, "--classes", "1,3", "--window", "auto", "--out", tmp_path / "out")
    assert done.code == 0
    assert "window: " in done.err
    assert "milliseconds a token: 1: " in done.err
    done = linert("run", windowed_bundle, "--classes", "1,3", "--window", "wide", "--out", tmp_path / "other")
    assert done.code == 2
    assert "neither a width nor auto" in done.err
