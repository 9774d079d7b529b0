"""A comparison as tables, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from linert.exporter.compare import CellResult
from linert.exporter.compare_plots import plots
from linert.runtime.drawing.generator import picture
from linert.runtime.measuring.metrics import Metric
from linert.runtime.text import size_text

TEMPLATE = Path(__file__).parent / "templates" / "compare.html.j2"
TILE = 64


@dataclass(frozen=True)
class TextTable:
    """Cells as text, a row each; the first column names the policy and may be long, the others are short.

    Titles of columns may have two lines.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_page(
    results: Sequence[CellResult],
    metrics: Sequence[Metric],
    strips: Sequence[NDArray[np.float32]],
    facts: dict[str, str],
) -> str:
    """The page.

    Args:
        results: every cell, the full cache first.
        metrics: quality metrics, in the order of their tables.
        strips: for each cell the pixels ``[n, 3, H, W]`` of the same samples.
        facts: what was compared, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        facts=facts,
        tables=tables(results, metrics),
        distances=[metric.name for metric in metrics if metric.distance],
        plots=plots(results, metrics),
        strips=[
            (result.label, result.lines_text, _data_uri(strip))
            for result, strip in zip(results, strips, strict=True)
        ],
    )


def tables(results: Sequence[CellResult], metrics: Sequence[Metric]) -> list[TextTable]:
    """What each cell costs and how far it is from the full cache; then a table a metric, with 95 % intervals."""
    return [_agreement(results), *(_quality(results, metric) for metric in metrics)]


def _agreement(results: Sequence[CellResult]) -> TextTable:
    columns = ["policy", "lines", "tokens\nas full", "first\nother", "KL,\nnats", "state"]
    timed = results[0].decode_ms is not None
    rows = []
    for result in results:
        row = [
            result.label,
            result.lines_text,
            f"{result.token_agreement:.1%}",
            "-" if result.first_divergence is None else f"{result.first_divergence:.0f}",
            f"{result.kl_mean:.4f}",
            size_text(result.state_bytes),
        ]
        rows.append(row + [f"{ms:.2f}" for ms in (result.decode_ms, result.line_end_ms) if ms is not None])
    return TextTable(
        "agreement with the full cache, and cost", columns + ["step,\nms", "line end,\nms"] * timed, rows
    )


def _quality(results: Sequence[CellResult], metric: Metric) -> TextTable:
    """A metric. Of a distance also what was measured of these images, before its bias was taken off."""
    title = f"{metric.name} ({'higher' if metric.higher_is_better else 'lower'} is better)"
    columns = [
        "policy",
        "lines",
        *(["measured", "without bias"] if metric.distance else ["value"]),
        "minus full",
    ]
    rows = []
    for number, result in enumerate(results):
        own, far = result.metrics[metric.name], result.metrics_minus_full[metric.name]
        rows.append(
            [
                result.label,
                result.lines_text,
                *([f"{own.measured:.{metric.digits}f}"] if metric.distance else []),
                own.text(metric.digits),
                far.text(metric.digits, "+") if number else "",
            ]
        )
    return TextTable(title, columns, rows)


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
