"""A sweep as a picture: decode step and its limit, a bar a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from linert.runtime.errors import RequestError
from linert.runtime.files.atomic_files import atomic_file
from linert.runtime.measuring.bench import Timings


def check_format(path: Path) -> None:
    """Raise :class:`RequestError` if the suffix of ``path`` names no format of pictures."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise RequestError(f"{path}: name a file that ends in one of .{', .'.join(sorted(known))}")


def draw(labels: Sequence[Mapping[str, str]], timings: Sequence[Timings], path: Path) -> None:
    """Write the plot to ``path``, in the format of its suffix."""
    with atomic_file(path) as file:
        figure_of(labels, timings).savefig(file, format=path.suffix.removeprefix(".").lower())


def figure_of(labels: Sequence[Mapping[str, str]], timings: Sequence[Timings]) -> Figure:
    figure = Figure(figsize=(7, 1.5 + 0.35 * len(timings)), layout="constrained")
    axes = figure.add_subplot()
    names = [", ".join(cell.values()) for cell in labels]
    rows = range(len(timings))
    axes.barh(rows, [timing.decode_ms for timing in timings], color="tab:blue", label="decode step")
    axes.barh(rows, [timing.limit.floor_ms for timing in timings], color="black", height=0.25, label="limit")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(" x ".join(labels[0]))
    # Beside the bars, which it would cover.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
