"""``linert compare``: the grid, what it measures, its report, and resumption."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.files.replacement import working_folder
from tests.conftest import ROOT, TINY, Result

Linert = Callable[..., Result]
METRICS = """
import numpy as np
from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance

def metrics():
    real = np.random.default_rng(0).normal(size=(50, 3))
    return [
        ClassAccuracy(lambda pixels: (pixels.mean((1, 2, 3)) > 0).astype(int)),
        FrechetDistance(lambda pixels: pixels.mean((2, 3)), real),
    ]
"""


@pytest.fixture(scope="module")
def metric_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metrics") / "tiny_metrics.py"
    path.write_text(METRICS)
    return path


@pytest.fixture(scope="module")
def request_options(metric_file: Path) -> tuple[object, ...]:
    policies = ("--policies", "linear,streaming,rkv", "--budgets", "1/2,1/3,1", "--samples", 7)
    return (*policies, "--mode", "strict,lazy", "--metrics", metric_file, "--forced-images", 3)


@pytest.fixture(scope="module")
def compared(
    linert: Linert,
    many_bundle: Path,
    request_options: tuple[object, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compared") / "out"
    result = linert("compare", many_bundle, "--out", out, *request_options)
    assert result.code == 0, result.err
    return out, result.out


def cells_of(out: Path) -> list[dict]:  # type: ignore[type-arg]
    return json.loads((out / "compare.json").read_text())["cells"]


def test_every_cell_is_measured(compared: tuple[Path, str], many_bundle: Path) -> None:
    out, printed = compared
    cells = cells_of(out)
    # Half and a third of 6 lines; "1" is one line, which holds neither anchors nor a recent line but itself.
    assert len(cells) == 1 + 3 * 3 * 2
    manifest = open_bundle(many_bundle).manifest
    for cell in cells:
        assert cell["state_bytes"] == manifest.state_bytes_at(cell["cache"]["budget_lines"])
        assert set(cell["metrics"]) == {"class accuracy", "Fréchet distance"}
        for kind in ("metrics", "metrics_minus_full"):
            for interval in cell[kind].values():
                assert interval["low"] <= interval["value"] <= interval["high"]
        assert cell["decode_ms"] > 0
        assert cell["line_end_ms"] > 0
        assert len(cell["kl_by_line"]) == TINY.lines
        assert cell["label"].split(",")[0] in printed
    full, *evicting = cells
    assert full["token_agreement"] == full["top1_agreement"] == 1
    assert full["kl_mean"] == 0
    assert full["first_divergence"] is None
    for cell in evicting:
        assert cell["kl_mean"] > 0.001
        # Nothing is evicted before the buffer is full.
        budget = cell["cache"]["budget_lines"][0]
        assert max(cell["kl_by_line"][: budget - 1 or 1]) < 1e-9 or budget == 1
        assert cell["first_divergence"] >= (budget - 1) * TINY.line_width


def test_the_tables_fit_a_terminal(compared: tuple[Path, str]) -> None:
    out, printed = compared
    lines = printed.splitlines()
    tables = [line for line in lines if not line.startswith(("caution", "report"))]
    assert max(map(len, tables)) <= 100
    # Seven images of three features.
    assert "caution: Fréchet distance: 7 images are few for 3 features" in printed
    for title in ("agreement with the full cache", "class accuracy (higher", "Fréchet distance (lower"):
        assert title in printed
    for cell in cells_of(out):
        # Numbers are not folded, and state whole intervals.
        far = cell["metrics_minus_full"]["Fréchet distance"]
        assert (
            cell["label"] == "full"
            or f"{far['value']:+.2f} [{far['low']:+.2f}, {far['high']:+.2f}]" in printed
        )
        assert f"{cell['kl_mean']:.4f}" in printed


def test_the_full_cache_is_measured_beside_itself(compared: tuple[Path, str]) -> None:
    full = cells_of(compared[0])[0]
    assert {*full["metrics_minus_full"]["class accuracy"].values()} == {0.0}
    assert full["metrics"]["Fréchet distance"]["measured"] >= full["metrics"]["Fréchet distance"]["value"]


class Page(HTMLParser):
    """Collects what a page refers to and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_beside_it(compared: tuple[Path, str]) -> None:
    out, _ = compared
    text = (out / "compare.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    cells = len(cells_of(out))
    assert page.tags.count("img") == cells
    # A table of costs and one a metric.
    assert page.tags.count("tr") == 3 * (cells + 1)
    # Two metrics, KL by budget and by line, time by state.
    assert page.tags.count("svg") == 5


SLOW = """
import signal, sys, time
# A shell may have started the tests with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from linert.exporter.compare import Comparison
original = getattr(Comparison, {phase!r})
def slow(self, *arguments):
    time.sleep(0.5)
    return original(self, *arguments)
setattr(Comparison, {phase!r}, slow)
from linert.runtime.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(("phase", "pattern"), [("_tokens", "tokens.npz"), ("_log_probs", "forced_*.npz")])
def test_an_interrupted_comparison_goes_on(
    phase: str,
    pattern: str,
    compared: tuple[Path, str],
    request_options: tuple[object, ...],
    linert: Linert,
    many_bundle: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", str(many_bundle), "--out", str(out), *map(str, request_options)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(phase=phase), *arguments], cwd=ROOT, stderr=subprocess.PIPE
    )
    while len(list(out.glob(f"cells/*/{pattern}"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not (out / "compare.json").exists()
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    written = sorted((os.stat(path).st_mtime_ns, path) for path in out.glob(f"cells/*/{pattern}"))
    # The last cell may have been under way.
    before = {path: moment for moment, path in written[:-1]}
    assert before

    assert linert(*arguments).code == 2
    result = linert(*arguments, "--resume", "--no-timing")
    assert result.code == 0, result.err
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    timed = ("decode_ms", "line_end_ms")
    resumed, wanted = (
        [{name: value for name, value in cell.items() if name not in timed} for cell in cells_of(folder)]
        for folder in (out, compared[0])
    )
    assert resumed == wanted


def test_metrics_whose_code_changed_are_measured_again(
    linert: Linert, many_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a module of a package, whose function is in another."""
    package = tmp_path / "code" / "judges"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "brightness.py").write_text(
        "from linert.runtime.measuring.metrics import Metric\n"
        "class Brightness(Metric):\n"
        "    name, higher_is_better = 'brightness', True\n"
        "    def measure(self, pixels, asked):\n"
        "        from judges.scale import scaled\n"
        "        return scaled(pixels.mean((1, 2, 3), dtype='float64')[:, None])\n"
        "    def score(self, rows):\n"
        "        return float(rows.mean())\n"
        "def metrics():\n"
        "    return [Brightness()]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    # Python takes compiled code of the same second and size for that of the changed file.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = tmp_path / "out"
    request = (
        "compare",
        many_bundle,
        "--out",
        out,
        "--policies",
        "linear",
        "--budgets",
        "1/2",
        "--samples",
        2,
    )
    measured = []
    for scale in (1, 1, 3):
        (package / "scale.py").write_text(f"def scaled(rows):\n    return {scale}.0 * rows\n")
        for name in [name for name in sys.modules if name.partition(".")[0] == "judges"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        result = linert(
            *request, "--metrics", "judges.brightness", "--no-timing", *["--resume"] * out.exists()
        )
        assert result.code == 0, result.err
        rows = sorted(out.glob("cells/*/metrics.npz"))
        value = cells_of(out)[0]["metrics"]["brightness"]["value"]
        measured.append((value, [path.stat().st_mtime_ns for path in rows]))
    first, again, changed = measured
    assert again == first
    assert changed[0] == pytest.approx(3 * first[0], rel=1e-12)
    assert all(later > before for later, before in zip(changed[1], first[1], strict=True))


def test_damaged_measurements_are_made_again(
    compared: tuple[Path, str],
    request_options: tuple[object, ...],
    linert: Linert,
    many_bundle: Path,
    tmp_path: Path,
) -> None:
    out = Path(shutil.copytree(compared[0], tmp_path / "out"))
    for pattern in ("metrics.npz", "forced_0001.npz", "tokens.npz"):
        path = sorted(out.glob(f"cells/*/{pattern}"))[-1]
        path.write_bytes(path.read_bytes()[:100])
    (out / "cells" / ".x.0123456789abcdef.partial").touch()
    result = linert("compare", many_bundle, "--out", out, *request_options, "--resume", "--no-timing")
    assert result.code == 0, result.err
    timed = ("decode_ms", "line_end_ms")
    repaired, wanted = (
        [{name: value for name, value in cell.items() if name not in timed} for cell in cells_of(folder)]
        for folder in (out, compared[0])
    )
    assert repaired == wanted


def test_a_comparison_begins_in_an_empty_folder_and_in_no_other(
    linert: Linert, many_bundle: Path, tmp_path: Path
) -> None:
    request = (
        "compare",
        many_bundle,
        "--policies",
        "linear",
        "--budgets",
        "1/2",
        "--samples",
        1,
        "--no-timing",
    )
    for name, options in (("a", ()), ("b", ("--resume",))):
        (tmp_path / name).mkdir()
        result = linert(*request, "--out", tmp_path / name, *options)
        assert result.code == 0, result.err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.jpg").touch()
    for options in ((), ("--resume",)):
        assert linert(*request, "--out", mine, *options).code == 2
    assert [path.name for path in mine.iterdir()] == ["holiday.jpg"]
    with working_folder(tmp_path / "a"):
        result = linert(*request, "--out", tmp_path / "a", "--resume")
    assert result.code == 2
    assert "another linert is writing" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", 8, "--resume"), "other samples"),
        (("--budgets", "1/4", "--resume"), "other caches"),
        ((), "--resume to continue"),
    ],
)
def test_another_request_is_refused(
    options: tuple[object, ...],
    message: str,
    compared: tuple[Path, str],
    request_options: tuple[object, ...],
    linert: Linert,
    many_bundle: Path,
) -> None:
    result = linert("compare", many_bundle, "--out", compared[0], *request_options, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "nonsense"), "holds no policy nonsense"),
        (("--budgets", "0"), "budget '0'"),
        (("--budgets", "3/2"), "budget '3/2'"),
        (("--budgets", "many"), "budget 'many'"),
        (("--budgets", "7"), "no cell of the grid fits"),
        (("--mode", "eager"), "give some of strict, lazy"),
        (("--metrics", "missing.py"), "no file missing.py"),
        (("--metrics", ""), "cannot import"),
        (("--budgets", ""), "has an empty value"),
        (("--policies", "linear,"), "has an empty value"),
        (("--recent-lines", "-inf"), "--recent-lines -inf: give a number of lines"),
        (("--forced-images", 0), "at least 1"),
        (("--samples", 0), "0 images asked for"),
        (("--samples", 1, "--metrics", "{metrics}"), "Fréchet distance needs at least 2 images"),
    ],
)
def test_bad_grids_are_refused_and_write_nothing(
    options: tuple[object, ...],
    message: str,
    linert: Linert,
    many_bundle: Path,
    metric_file: Path,
    tmp_path: Path,
) -> None:
    arguments = [str(option).format(metrics=metric_file) for option in options]
    result = linert("compare", many_bundle, "--out", tmp_path / "out", *arguments)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()
