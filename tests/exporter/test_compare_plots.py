"""Drawings of a comparison and of a sweep: nothing covers a curve, and everything drawn has a name."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from linert.exporter import sweep_plot
from linert.exporter.compare import CellResult
from linert.exporter.compare_plots import figures, svg
from linert.exporter.intervals import Interval
from linert.exporter.report import tables
from linert.graphs.policies import POLICIES as REGISTERED
from linert.runtime.bundles.cache_settings import FULL
from linert.runtime.measuring.bench import Limit, Timings
from linert.runtime.measuring.measured import Start
from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance, Metric
from tests.conftest import cache_settings

POLICIES = tuple(name for name in REGISTERED if name != FULL)
METRICS: list[Metric] = [
    ClassAccuracy(lambda pixels: pixels),
    FrechetDistance(lambda pixels: pixels, np.random.default_rng(0).normal(size=(9, 2))),
]


def cell(label: str, lines: int, number: int) -> CellResult:
    metrics = {
        "class accuracy": Interval(0.9, 0.8, 0.95, 0.9),
        "Fréchet distance": Interval(4.0 + number, 3.0, 60.0, 6.0 + number),
    }
    far = {name: Interval(0.01, None, None, 0.01) for name in metrics}
    return CellResult(
        label=label,
        budget=str(lines),
        cache=cache_settings(policy=label.split(",")[0], budget_lines=(lines, lines)),
        state_bytes=lines * 2**20,
        metrics=metrics,
        metrics_minus_full=far,
        token_agreement=0.5,
        first_divergence=10.0,
        kl_mean=0.1 * number,
        kl_by_line=[0.1 * number] * 16,
        top1_agreement=0.5,
        decode_ms=1.0 + lines,
        line_end_ms=2.0,
    )


@pytest.fixture(scope="module")
def results() -> list[CellResult]:
    """Forty cells beside the full cache, which is more than there are colours in all styles of lines."""
    kinds = itertools.product((2, 4, 8), POLICIES, ("lazy", "strict"))
    evicting = [
        cell(f"{policy}, {mode}", lines, number + 1) for number, (lines, policy, mode) in enumerate(kinds)
    ]
    return [cell("full", 16, 0), *evicting]


@pytest.fixture(scope="module")
def drawn(results: list[CellResult]) -> list[Figure]:
    made = figures(results, METRICS)
    for figure in made:
        FigureCanvasAgg(figure).draw()
    return made


def test_legends_are_beside_the_axes_and_name_everything(drawn: list[Figure]) -> None:
    assert len(drawn) == 5
    for figure in drawn:
        [axes], [legend] = figure.axes, figure.legends
        assert axes.get_legend() is None
        own = legend.get_window_extent()
        # The axes with what is written at them, and the picture as a whole.
        assert not own.overlaps(axes.get_tightbbox())
        assert own.x1 <= figure.bbox.x1
        assert own.y0 >= figure.bbox.y0
        names = [" ".join(text.get_text().split()) for text in legend.get_texts()]
        assert len(names) == len(set(names))
        curves = [line for line in axes.lines if len(line.get_xdata()) and line.get_label()[0] != "_"]
        assert {line.get_label() for line in curves} <= set(names)
        looks = {(line.get_color(), line.get_linestyle()) for line in curves}
        assert len(looks) == len(curves)


def test_the_axes_keep_their_room(drawn: list[Figure]) -> None:
    """However many curves the legend names."""
    for figure in drawn:
        height = figure.axes[0].get_window_extent().height / figure.dpi
        assert height > 2


def test_every_point_of_state_and_time_is_named(results: list[CellResult], drawn: list[Figure]) -> None:
    axes = drawn[-1].axes[0]
    assert axes.get_xlabel() == "state, MiB"
    named = {(note.xy[0], note.xy[1]): note.get_text() for note in axes.texts}
    points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines}
    assert points == {(result.state_bytes / 2**20, result.decode_ms) for result in results}
    assert named == {(lines, 1.0 + lines): f"{lines} lines" for lines in (2, 4, 8, 16)}
    legend = " ".join(text.get_text() for text in drawn[-1].legends[0].get_texts())
    assert all(policy in legend for policy in ("full", *POLICIES))


def test_drawings_are_svg_elements(drawn: list[Figure]) -> None:
    text = svg(drawn[0])
    assert text.startswith("<svg")
    assert re.search(r"<text[^>]*>full, 95 %</text>", text)


def test_the_legend_of_a_sweep_covers_no_bar(tmp_path: Path) -> None:
    limit = Limit(weight_bytes=10**8, state_bytes=0, macs=0, read_bandwidth=1e10, mac_rate=None)
    timings = [
        Timings(
            limit=limit,
            start=Start(0, 0),
            decode_ms=ms,
            line_end_ms=1,
            vq_decoder_ms=1,
            windows={},
            groups={},
            tokens_a_step=1.0,
            image=None,
            images=1,
            line_width=4,
            resident_bytes=None,
            file_bytes=1,
            state_bytes=1,
        )
        for ms in (20, 30, 40)
    ]
    figure = sweep_plot.figure_of([{"batch": "1"}, {"batch": "8"}, {"batch": "16"}], timings)
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_legend() is None
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_tightbbox())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["decode step", "limit"]
    sweep_plot.draw([{"batch": "1"}, {"batch": "8"}, {"batch": "16"}], timings, tmp_path / "sweep.SVG")
    assert "<svg" in (tmp_path / "sweep.SVG").read_text()


def test_tables_are_narrow_and_say_what_bias_is(results: list[CellResult]) -> None:
    agreement, accuracy, distance = tables(results, METRICS)
    assert all(len(table.rows) == len(results) for table in (agreement, accuracy, distance))
    assert accuracy.rows[0] == ["full", "16", "0.900 [0.800, 0.950]", ""]
    assert accuracy.rows[1][3] == "+0.010"
    assert distance.columns == ["policy", "lines", "measured", "without bias", "minus full"]
    assert distance.rows[0][2:4] == ["6.00", "4.00 [3.00, 60.00]"]
