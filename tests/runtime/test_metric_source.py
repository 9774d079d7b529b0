"""Metrics of somebody's own: from a file or a module, and never in the place of another module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import linert.runtime.measuring.metrics
from linert.runtime.errors import RequestError
from linert.runtime.measuring.metric_source import load_metrics
from tests.conftest import ROOT

METRICS = """
import numpy as np
from helper import SHIFT
from linert.runtime.measuring.metrics import Metric

class Brightness(Metric):
    name, higher_is_better = "brightness", True
    def measure(self, pixels, classes):
        return pixels.mean((1, 2, 3), dtype=np.float64)[:, None] + SHIFT
    def score(self, rows):
        return float(rows.mean())

class Nameless(Metric):
    measure, score = Brightness.measure, Brightness.score

def metrics():
    return [Brightness()]

def nothing():
    return []

def nameless():
    return [Nameless()]

def twice():
    return metrics() * 2

def failing():
    return {}["real features"]
"""


@pytest.fixture
def metric_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a process that has loaded none before."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("helper", "some_metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = tmp_path / "some_metrics.py"
    path.write_text(METRICS)
    (tmp_path / "helper.py").write_text("SHIFT = 1.0")
    return path


def test_metrics_come_from_a_file_or_a_module(metric_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (metric,) = load_metrics(str(metric_file))
    assert metric.measure(np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.int64)).tolist() == [[1], [1]]
    monkeypatch.setattr(sys, "path", [str(metric_file.parent), *sys.path])
    assert load_metrics("some_metrics:metrics")[0].name == "brightness"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}:nothing", "returned no"),
        ("{}:absent", "has no function absent"),
        ("{}:nameless", "Nameless does not say its name and higher_is_better"),
        ("{}:twice", "two metrics of one name: brightness"),
        ("{}:failing", "makes no metrics: KeyError: 'real features'"),
        ("missing.py", "no file missing.py"),
        ("missing.module", "cannot import missing.module"),
        ("..relative", "cannot import ..relative"),
        ("", "cannot import"),
    ],
)
def test_metrics_that_are_none_are_refused(source: str, message: str, metric_file: Path) -> None:
    with pytest.raises(RequestError, match=message):
        load_metrics(source.format(metric_file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def metrics(:", "SyntaxError"),
        ("import absent_package", "No module named 'absent_package'"),
        ("raise ValueError('no features here')", "ValueError: no features here"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(RequestError, match=f"cannot load .*broken.py.*{message}"):
        load_metrics(str(path))


@pytest.mark.parametrize("name", ["runtime", "metrics", "json", "numpy", "colorsys"])
def test_a_file_takes_no_modules_place(name: str, metric_file: Path) -> None:
    """Named like one of ours, the standard library's or another's, whether that is loaded yet or not."""
    path = metric_file.rename(metric_file.with_name(f"{name}.py"))
    script = (
        "import json, sys\n"
        "from linert.runtime.measuring.metric_source import load_metrics\n"
        "[metric] = load_metrics(sys.argv[1])\n"
        "import colorsys, json, numpy, runtime, linert.runtime.measuring.metrics\n"
        "places = [module.__file__ for module in (colorsys, json, numpy, runtime, linert.runtime.measuring.metrics)]\n"
        "print(json.dumps([metric.name, places]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    metric, places = json.loads(done.stdout)
    assert metric == "brightness"
    assert not [place for place in places if place.startswith(str(path.parent))]
    assert linert.runtime.measuring.metrics.__file__ in places


@pytest.mark.parametrize(
    "imported", ["import colorsys", "def metrics():\n    from colorsys import rgb_to_hsv"]
)
@pytest.mark.parametrize("beside", ["some_metrics.py", "helper.py"])
def test_a_neighbour_that_could_not_be_imported_is_named(
    imported: str, beside: str, metric_file: Path
) -> None:
    """The file, or a neighbour that it imports, would get the standard library's module and not know."""
    (metric_file.parent / "colorsys.py").write_text("SHIFT = 2.0")
    path = metric_file.parent / beside
    path.write_text(path.read_text() + f"\n{imported}\n")
    with pytest.raises(
        RequestError, match=r"imports colorsys, which stands beside it.*taken by .*colorsys.py"
    ):
        load_metrics(str(metric_file))


def test_two_neighbours_of_one_name_are_told_apart(metric_file: Path, tmp_path: Path) -> None:
    """Python knows one module of a name: the second file would get the neighbour of the first."""
    load_metrics(str(metric_file))
    other = tmp_path / "other" / "metrics.py"
    other.parent.mkdir()
    other.write_text(METRICS)
    (other.parent / "helper.py").write_text("SHIFT = 1.0")
    assert load_metrics(str(other))
    (other.parent / "helper.py").write_text("SHIFT = 7.0")
    with pytest.raises(RequestError, match=r"imports helper.* taken by .*helper.py"):
        load_metrics(str(other))


def test_a_file_that_was_changed_is_loaded_again(metric_file: Path) -> None:
    before = load_metrics(str(metric_file))
    metric_file.write_text(METRICS.replace('"brightness"', '"light"'))
    assert [metric.name for metric in (*before, *load_metrics(str(metric_file)))] == ["brightness", "light"]
