"""The cells of ``linert compare``: which there are, what they are called, and how one is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from linert import Generator
from linert.exporter.compare import forced_logits
from linert.exporter.compare_grid import Grid, budget_lines, labels_of
from linert.exporter.quality import measure_rows
from linert.exporter.timing import ResizedBackend, step_times
from linert.graphs.families.llamagen import LlamaGen
from linert.graphs.families.vq import VQModel
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.drawing.generator import PixelDecoder, make_batch
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.errors import RequestError
from linert.runtime.measuring.metrics import Metric
from tests.conftest import TINY, TINY_VQ, Result, random_state

Linert = Callable[..., Result]


def test_a_bundle_without_the_full_cache_is_refused(
    linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    result = linert("compare", tiny_bundle, "--out", tmp_path / "out")
    assert result.code == 2
    assert "--policy leverage,full" in result.err


@pytest.mark.parametrize(
    ("text", "lines", "wanted"),
    [
        ("1/4", 16, 4),
        ("1/6", 16, 3),
        ("1/8", 6, 1),
        ("1/4", 6, 2),
        ("5", 16, 5),
        ("0.5", 24, 12),
        ("1/99", 4, 1),
    ],
)
def test_budgets_are_whole_lines(text: str, lines: int, wanted: int) -> None:
    assert budget_lines(text, lines) == wanted


def test_cells_that_do_not_fit_are_left_out(many_bundle: Path) -> None:
    manifest = open_bundle(many_bundle).manifest
    cells, refused = Grid(("linear", "full"), ("3", "2"), {"recent_lines": (1, 2)}).cells(manifest)
    assert [(cell.cache.policy, cell.cache.budget_lines[0]) for cell in cells] == [
        ("full", 6),
        ("linear", 3),
        ("linear", 3),
        ("linear", 2),
    ]
    assert len(refused) == 1
    with pytest.raises(RequestError, match="holds no policy"):
        Grid(("absent",), ("3",)).cells(manifest)


def test_a_resized_decode_graph_is_that_of_a_smaller_bundle(
    export: Callable[..., Path], tiny_files: tuple[Path, Path], many_bundle: Path
) -> None:
    options = ("--grid", 6, "--heads", 4, "--batch", 2, "--layer-budgets", "3,2", "--anchor-tokens", 0)
    small = Generator(export(*tiny_files, *options))
    backend = small.backend
    samples = [Sample(ClassLabel(1), 2), Sample(ClassLabel(3), 4)]
    batch = make_batch(
        small.manifest, small.conditioner, samples, small.manifest.sampling, small.manifest.cache
    )
    tokens = small.draw(samples)
    for _ in zip(range(20), forced_logits(backend, batch, tokens), strict=False):
        pass
    resized = ResizedBackend(open_bundle(many_bundle), "decode.unfiltered", (3, 2), 1)
    for name in resized.specs:
        if not name.startswith("logits"):
            resized.write(name, backend.read(name))
    resized.run("decode.unfiltered")
    backend.run("decode.unfiltered")
    for name in resized.specs:
        np.testing.assert_allclose(resized.read(name), backend.read(name), atol=1e-5, rtol=0, err_msg=name)


def test_timing_reads_weights_where_they_are(many_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is linked or copied: there may be no room for it."""
    monkeypatch.setattr(tempfile, "tempdir", str(many_bundle / "no such folder"))
    before = {path: path.stat().st_nlink for path in many_bundle.iterdir()}
    bundle = open_bundle(many_bundle)
    backend = ResizedBackend(bundle, "decode.unfiltered", (2, 1), 1)
    assert len(step_times(backend, "decode.unfiltered", bundle.manifest)) == TINY.line_width
    assert {path: path.stat().st_nlink for path in many_bundle.iterdir()} == before


def test_logits_that_are_not_finite_are_reported(
    linert: Linert, export: Callable[..., Path], tmp_path: Path
) -> None:
    """Finite weights whose products no float32 holds."""
    state = random_state(LlamaGen(TINY))
    state["output.weight"] *= 1e38
    torch.save({"model": state}, tmp_path / "model.pt")
    torch.save({"model": random_state(VQModel(TINY_VQ))}, tmp_path / "vq.pt")
    options = ("--grid", 6, "--heads", 4, "--batch", 2, "--policy", "linear,full")
    bundle = export(tmp_path / "model.pt", tmp_path / "vq.pt", *options)
    result = linert("compare", bundle, "--samples", 2, "--budgets", 3, "--out", tmp_path / "out")
    assert result.code == 2
    assert "finite" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (lambda images: np.zeros(images), r"an array \[2\] of 2 images"),
        (lambda images: np.zeros((images + 1, 1)), r"an array \[3, 1\] of 2 images"),
        (lambda images: np.full((images, 1), np.nan), "not finite"),
        (lambda images: "nothing", "cannot measure images: ValueError"),
        (lambda images: {}["features"], "cannot measure images: KeyError"),
    ],
)
def test_metrics_that_measure_wrongly_are_named(
    measured: Callable[[int], object], message: str, many_bundle: Path
) -> None:
    class Faulty(Metric):
        name, higher_is_better = "faulty", True

        def measure(self, pixels: np.ndarray, asked: np.ndarray) -> np.ndarray:
            return measured(len(pixels))  # type: ignore[return-value]

        def score(self, rows: np.ndarray) -> float:
            return float(rows.mean())

    decoder = PixelDecoder(open_bundle(many_bundle))
    samples = [Sample(ClassLabel(1), 2), Sample(ClassLabel(3), 4)]
    with pytest.raises(RequestError, match=f"faulty.*{message}"):
        measure_rows([Faulty()], decoder, np.zeros((2, TINY.image_tokens), np.int64), samples)


def test_labels_say_what_differs(many_bundle: Path) -> None:

    manifest = open_bundle(many_bundle).manifest
    cells, _ = Grid(
        ("linear",), ("3",), {"aggregation": ("mean", "max"), "layer_budgets": ("uniform",)}
    ).cells(manifest)
    assert labels_of(cells) == ["full", "linear, mean attention", "linear, max attention"]
    keys = {cell.key for cell in cells}
    assert len(keys) == 3
    assert all(msgspec.json.encode(cell.cache) for cell in cells)
