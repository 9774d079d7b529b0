"""A comparison as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from exporter.compare import CellResult
from runtime.generator import picture
from runtime.metrics import Metric
from runtime.text import size_text

TEMPLATE = Path(__file__).parent / "templates" / "compare.html.j2"
TILE = 64
SHEET_HEIGHT = 72


def render_page(
    results: Sequence[CellResult],
    metrics: Sequence[Metric],
    strips: Sequence[NDArray[np.float32]],
    facts: dict[str, str],
) -> str:
    """The page.

    Args:
        results: every cell, the full cache first.
        metrics: quality metrics, in the order of their columns.
        strips: for each cell the pixels ``[n, 3, H, W]`` of the same samples.
        facts: what was compared, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        facts=facts,
        header=header(metrics, results),
        rows=[row_of(result, metrics) for result in results],
        plots=plots(results, metrics),
        strips=[
            (result.label, result.budget, _data_uri(strip))
            for result, strip in zip(results, strips, strict=True)
        ],
    )


def header(metrics: Sequence[Metric], results: Sequence[CellResult]) -> list[str]:
    """Column titles of :func:`row_of`."""
    columns = ["policy", "lines"]
    for metric in metrics:
        columns += [f"{metric.name} {'↑' if metric.higher_is_better else '↓'}", "minus full"]
    columns += ["tokens as full", "first other token", "KL", "state"]
    return columns + ["step, ms", "line end, ms"] * (results[0].decode_ms is not None)


def row_of(result: CellResult, metrics: Sequence[Metric]) -> list[str]:
    """One cell as text, with 95 % intervals."""
    lines = result.cache.budget_lines
    shown = f"{sum(lines) / len(lines):.3g}"
    row = [result.label, shown if result.budget == shown else f"{shown} ({result.budget})"]
    for metric in metrics:
        for kind, sign in ((result.metrics, ""), (result.metrics_minus_full, "+")):
            interval = kind[metric.name]
            digits = f"{sign}.{metric.digits}f"
            row.append(f"{interval.value:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]")
    row += [
        f"{result.token_agreement:.1%}",
        "-" if result.first_divergence is None else f"{result.first_divergence:.0f}",
        f"{result.kl_mean:.4f}",
        size_text(result.state_bytes),
    ]
    if result.decode_ms is not None and result.line_end_ms is not None:
        row += [f"{result.decode_ms:.2f}", f"{result.line_end_ms:.2f}"]
    return row


def plots(results: Sequence[CellResult], metrics: Sequence[Metric]) -> list[str]:
    """SVG drawings: each metric and the KL by budget, the KL by line, and step time by state."""
    full, evicting = results[0], results[1:]
    drawn = []
    for metric in metrics:

        def by_budget(axes: Axes, name: str = metric.name) -> None:
            interval = full.metrics[name]
            axes.axhspan(interval.low, interval.high, color="0.85")
            axes.axhline(interval.value, color="0.4", label="full")
            for number, (label, cells) in enumerate(_series(evicting).items()):
                values = [cell.metrics[name] for cell in cells]
                x = np.array([_mean_lines(cell) for cell in cells]) * (1 + 0.01 * number)
                y = np.array([value.value for value in values])
                errors = [y - [v.low for v in values], [v.high for v in values] - y]
                axes.errorbar(x, y, yerr=np.clip(errors, 0, None), marker="o", capsize=2, label=label)
            axes.set(xlabel="lines in the cache", ylabel=name)

        drawn.append(_svg(by_budget))

    def kl_by_budget(axes: Axes) -> None:
        for label, cells in _series(evicting).items():
            axes.plot([_mean_lines(c) for c in cells], [c.kl_mean for c in cells], marker="o", label=label)
        axes.set(xlabel="lines in the cache", ylabel="KL from the full cache, nats", yscale="log")

    def kl_by_line(axes: Axes) -> None:
        for result in evicting:
            lines = range(1, 1 + len(result.kl_by_line))
            axes.plot(lines, result.kl_by_line, label=f"{result.label}, {_mean_lines(result):.3g} lines")
        axes.set(xlabel="line being drawn", ylabel="KL from the full cache, nats")

    drawn += [_svg(kl_by_budget), _svg(kl_by_line)] if evicting else []
    if full.decode_ms is not None:

        def time_by_state(axes: Axes) -> None:
            axes.plot(
                [result.state_bytes / 2**20 for result in results],
                [r.decode_ms for r in results],
                "o",
                color="C0",
            )
            axes.set(xlabel="state, MiB", ylabel="decode step, ms", ylim=(0, None))

        drawn.append(_svg(time_by_state))
    return drawn


def _series(results: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    series = defaultdict(list)
    for result in sorted(results, key=_mean_lines):
        series[result.label].append(result)
    return series


def _mean_lines(result: CellResult) -> float:
    return sum(result.cache.budget_lines) / len(result.cache.budget_lines)


def _svg(draw: Callable[[Axes], Any]) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "linert"}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1] and len(axes.get_legend_handles_labels()[1]) <= 24:
            axes.legend(fontsize=7)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _data_uri(pixels: NDArray[np.float32]) -> str:
    """A row of pictures as a PNG in a URI."""
    images = [picture(image) for image in pixels]
    scale = max(1, round(TILE / images[0].height))
    width, height = images[0].width * scale, images[0].height * scale
    strip = PIL.Image.new("RGB", (len(images) * (width + 2), height), "white")
    for number, image in enumerate(images):
        strip.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), (number * (width + 2), 0))
    file = io.BytesIO()
    strip.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
