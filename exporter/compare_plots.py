"""Drawings of a comparison: quality and divergence by budget, divergence by line, and what a step costs."""

from __future__ import annotations

import io
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from linert.exporter.compare import CellResult
from linert.runtime.measuring.metrics import Metric

WIDTH, HEIGHT = 5.6, 3.2
"""Of the axes with their labels, in inches; the legend comes below."""

LEGEND_LINE = 0.17
LONG_LABEL = 30
"""Labels of more letters stand one below the other."""

LABEL_LETTERS = 70
"""What fits the width; longer labels have more lines."""

_STYLES = cycler(linestyle=["-", "--", ":", "-."])
_COLORS = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
# Ten colours, and their lighter shades once all styles of those are taken.
CURVES = (_STYLES * cycler(color=_COLORS[::2])).concat(_STYLES * cycler(color=_COLORS[1::2]))
"""Eighty curves that can be told apart."""


def plots(results: Sequence[CellResult], metrics: Sequence[Metric]) -> list[str]:
    """SVG drawings of a comparison, the full cache first."""
    return [svg(figure) for figure in figures(results, metrics)]


def figures(results: Sequence[CellResult], metrics: Sequence[Metric]) -> list[Figure]:
    """Each metric and the KL by budget, the KL by line, and step time by state, as far as they were measured."""
    drawn = [
        figure(lambda axes, metric=metric: metric_by_budget(axes, results, metric)) for metric in metrics
    ]
    if len(results) > 1:
        drawn += [
            figure(lambda axes: kl_by_budget(axes, results)),
            figure(lambda axes: kl_by_line(axes, results)),
        ]
    if results[0].decode_ms is not None:
        drawn.append(figure(lambda axes: time_by_state(axes, results)))
    return drawn


def metric_by_budget(axes: Axes, results: Sequence[CellResult], metric: Metric) -> None:
    """A metric with its intervals against lines; the full cache is a band."""
    full = results[0].metrics[metric.name]
    if full.low is not None and full.high is not None:
        axes.axhspan(full.low, full.high, color="0.88", label="full, 95 %")
    axes.axhline(full.value, color="0.4", label="full")
    series = _series(results)
    for number, (label, cells) in enumerate(series.items()):
        estimates = [cell.metrics[metric.name] for cell in cells]
        # Side by side where policies have the same budgets.
        x = np.array([cell.mean_lines for cell in cells]) * (1 + 0.015 * (number - (len(series) - 1) / 2))
        y = np.array([estimate.value for estimate in estimates])
        below = [estimate.value - _or(estimate.low, estimate.value) for estimate in estimates]
        above = [_or(estimate.high, estimate.value) - estimate.value for estimate in estimates]
        axes.errorbar(x, y, yerr=[below, above], marker="o", markersize=4, capsize=2, label=label)
    named = f"{metric.name}, without its bias" if metric.distance else metric.name
    axes.set(xlabel="lines in the cache", ylabel=named)


def kl_by_budget(axes: Axes, results: Sequence[CellResult]) -> None:
    for label, cells in _series(results).items():
        axes.plot(
            [cell.mean_lines for cell in cells],
            [cell.kl_mean for cell in cells],
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(xlabel="lines in the cache", ylabel="KL from the full cache, nats", yscale="log")


def kl_by_line(axes: Axes, results: Sequence[CellResult]) -> None:
    for result in results[1:]:
        lines = range(1, 1 + len(result.kl_by_line))
        axes.plot(lines, result.kl_by_line, label=f"{result.label}, {result.mean_lines:.3g} lines")
    axes.set(xlabel="line being drawn", ylabel="KL from the full cache, nats")


def time_by_state(axes: Axes, results: Sequence[CellResult]) -> None:
    """A point for every size of the buffer, named by it; the legend says which policies were tried there."""
    points: defaultdict[tuple[float, int, float], list[str]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.state_bytes):
        point = (result.mean_lines, result.state_bytes, _or(result.decode_ms, np.nan))
        points[point] += [result.label] * (result.label not in points[point])
    for number, ((lines, state, ms), labels) in enumerate(points.items()):
        name = f"{lines:.3g} lines"
        axes.plot(state / 2**20, ms, "o", label=f"{name}: {'; '.join(labels)}")
        # Neighbours are named on different sides.
        above = number % 2 == 0
        axes.annotate(
            name,
            (state / 2**20, ms),
            xytext=(0, 7 if above else -7),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
        )
    axes.set(xlabel="state, MiB", ylabel="decode step, ms")
    axes.set_ylim(0, 1.15 * max(_or(result.decode_ms, 0.0) for result in results))
    axes.margins(x=0.12)


def figure(draw: Callable[[Axes], Any]) -> Figure:
    """What ``draw`` draws, with a legend of all of it below the axes."""
    with mpl.rc_context({"font.size": 9, "axes.prop_cycle": CURVES}):
        made = Figure(layout="constrained")
        axes = made.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        columns = 1 if max(map(len, labels), default=0) > LONG_LABEL else 2
        wrapped = [textwrap.fill(label, LABEL_LETTERS, subsequent_indent="    ") for label in labels]
        lines = sum(label.count("\n") + 1 for label in wrapped)
        made.set_size_inches(WIDTH, HEIGHT + LEGEND_LINE * (math.ceil(lines / columns) + 1))
        made.legend(handles, wrapped, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return made


def svg(drawn: Figure) -> str:
    """A figure as an ``svg`` element."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "linert"}):
        file = io.StringIO()
        drawn.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _series(results: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """The cells that evict, by label and in the order of their budgets."""
    series = defaultdict(list)
    for result in sorted(results[1:], key=lambda result: result.mean_lines):
        series[result.label].append(result)
    return series


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
