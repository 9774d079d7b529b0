"""``linert bench``: what it counts, what it prints, and what it refuses."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linert.exporter.sources import Checkpoints
from linert.exporter.sweep import cell_request, cells, parse_axes
from linert.runtime.backends import host_memory as memory
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.errors import RequestError
from linert.runtime.machine import ReadBandwidth, forget_peak, peak_macs, peak_resident_bytes, resident_bytes
from linert.runtime.measuring.bench import Limit, limit_of
from linert.runtime.measuring.measured import Measured
from linert.runtime.measuring.step_profile import profile
from tests.conftest import ROOT, TINY, Result

Linert = Callable[..., Result]


def test_the_limit_is_the_longer_of_reading_and_multiplying() -> None:
    reading = Limit(weight_bytes=6_000, state_bytes=4_000, macs=10, read_bandwidth=1e6, mac_rate=1e6)
    assert reading.floor_ms == reading.read_ms == pytest.approx(10)
    multiplying = Limit(weight_bytes=1, state_bytes=0, macs=20_000, read_bandwidth=1e6, mac_rate=1e6)
    assert multiplying.floor_ms == multiplying.compute_ms == pytest.approx(20)


def test_work_is_counted_in_the_graph(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    rows, dim = 4, TINY.dim
    layer = 4 * dim * dim + 3 * dim * TINY.ffn_dim
    products = TINY.layers * layer + dim * TINY.vocab_size
    slots = manifest.raster.slots(3)
    attention = TINY.layers * 2 * rows * TINY.heads * slots * TINY.head_dim
    work = manifest.stages["decode.unfiltered"].work
    assert work.macs == rows * products + attention
    # Products, norms, one row of the embedding and of the rotary table a row, and small constants.
    read = 4 * (products + (2 * TINY.layers + 1) * dim + rows * (dim + 2 * TINY.head_dim))
    assert read <= work.weight_bytes < read + 1500
    assert manifest.stages["prefill"].work.macs == 0


def test_quantised_weights_count_with_their_bits(
    export: Callable[..., Path], tiny_files: tuple[Path, Path]
) -> None:
    options = ("--grid", 6, "--heads", 4, "--budget-lines", 3, "--precision", "int4", "--quantization", "rtn")
    work = open_bundle(export(*tiny_files, *options)).manifest.stages["decode"].work
    products = TINY.layers * (4 * TINY.dim**2 + 3 * TINY.dim * TINY.ffn_dim) + TINY.dim * TINY.vocab_size
    assert products / 2 < work.weight_bytes < products


def test_the_machine_tells_sensible_numbers() -> None:
    assert 1e8 < ReadBandwidth(2).measure() < 1e13
    assert 1e8 < peak_macs() < 1e15
    resident = resident_bytes()
    assert resident is None or 10 << 20 < resident <= peak_resident_bytes()
    before = peak_resident_bytes()
    forget_peak()
    assert peak_resident_bytes() <= before


def test_other_systems_have_no_resource_module() -> None:
    """Windows: commands are imported, and what is not known is not told."""
    script = (
        "import sys; sys.modules['resource'] = None\n"
        "import linert.runtime.commands.bench, linert.runtime.commands.run\n"
        "from pathlib import Path\n"
        "from linert.runtime import machine\n"
        "def absent(self, *rest, **named): raise FileNotFoundError(self)\n"
        "Path.read_text = absent\n"
        "print(machine.peak_resident_bytes(), machine.resident_bytes(), machine.available_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "None", "None"]


def test_names_of_mapped_files_are_any_bytes(tmp_path: Path) -> None:
    """A bundle may lie in a folder whose name is no UTF-8, or holds what ends a line of text."""
    path = tmp_path / os.fsdecode(b"\xff\xe2\x80\xa8\x0b.bin")
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert len(mapped) == 8192
        with memory.huge_pages():
            pass


def test_a_measured_bundle_still_draws_the_same_images(tiny_bundle: Path) -> None:
    measured = Measured(tiny_bundle, None, BackendOptions(threads=1))
    wanted = measured.generator.draw(measured.samples)
    assert len(measured.line()) == TINY.line_width - 1
    assert measured.line_end() > 0
    image = measured.image()
    assert (measured.backend.read("tokens") == wanted).all()
    assert image.total == pytest.approx(
        image.prefill + image.decode + image.line_ends + image.vq_decoder + image.png
    )


def test_profile_names_the_nodes(tiny_bundle: Path) -> None:
    measured = Measured(tiny_bundle, None, BackendOptions(threads=1))
    kinds, nodes = profile(open_bundle(tiny_bundle), measured.batch, threads=1, steps=5)
    products = next(kind for kind in kinds if kind.name == "MatMul")
    assert products.count >= 4 * TINY.layers + 1
    assert [node.ms for node in nodes] == sorted((node.ms for node in nodes), reverse=True)
    assert sum(kind.ms for kind in kinds) == pytest.approx(sum(node.ms for node in nodes))


def test_one_limit_is_printed_before_the_tables(tiny_bundle: Path, linert: Linert) -> None:
    result = linert("bench", tiny_bundle, "--rounds", 1, "--images", 0)
    assert result.code == 0, result.err
    assert result.out.index("one decode step reads") < result.out.index("limit:") < result.out.index("stages")
    assert result.out.count("GB/s") == 1
    assert "{" not in result.out


def test_json_holds_everything_that_was_measured(tiny_bundle: Path, linert: Linert) -> None:
    result = linert("bench", tiny_bundle, "--rounds", 1, "--profile", "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert values["decode_over_limit"] == pytest.approx(values["decode_ms"] / values["limit"]["floor_ms"])
    assert values["seconds_per_image"] * values["images_per_second"] == pytest.approx(1)
    assert values["resident_bytes"] <= values["peak_resident_bytes"]
    assert values["profile"]["MatMul"] > 0


def test_json_alone(tiny_bundle: Path, linert: Linert) -> None:
    result = linert("bench", tiny_bundle, "--rounds", 1, "--images", 0, "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert values["image"] is None
    assert values["seconds_per_image"] is None


def test_every_window_is_measured(windowed_bundle: Path, linert: Linert) -> None:
    result = linert("bench", windowed_bundle, "--rounds", 1, "--images", 1, "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    windows = values["windows"]
    assert list(windows) == ["1", "2", "4"]
    steps = [window["passes"] for window in windows.values()]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0] == TINY.image_tokens
    for window in windows.values():
        assert window["step_ms"] > 0
        assert window["accepted"] == pytest.approx((TINY.image_tokens - 1) / window["passes"])
        seconds = (window["passes"] * window["step_ms"] + window["line_ends"] * values["line_end_ms"]) / 1e3
        assert window["expected_seconds"] == pytest.approx(seconds / values["images"])
        assert window["seconds"] > 0
    table = linert("bench", windowed_bundle, "--rounds", 1, "--images", 0).out
    assert table.index("stages") < table.index("windows") < table.index("to the first token")


def test_a_bundle_of_single_steps_has_no_table_of_windows(tiny_bundle: Path, linert: Linert) -> None:
    result = linert("bench", tiny_bundle, "--rounds", 1, "--images", 0, "--json")
    assert json.loads(result.out)["windows"] == {}


def test_a_sweep_measures_every_combination(tiny_bundle: Path, linert: Linert, tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    result = linert(
        *("sweep", tiny_bundle, "--axis", "precision=fp32,int8", "--axis", "policy=linear,full"),
        *("--rounds", 1, "--plot", plot, "--json"),
    )
    assert result.code == 0, result.err
    measured = json.loads(result.out)["cells"]
    assert [tuple(cell["labels"].values()) for cell in measured] == [
        ("fp32", "linear"),
        ("fp32", "full"),
        ("int8", "linear"),
        ("int8", "full"),
    ]
    assert measured[1]["state_bytes"] > measured[0]["state_bytes"]
    assert measured[2]["limit"]["weight_bytes"] < measured[0]["limit"]["weight_bytes"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_pytorch_draws_what_each_cell_draws(tiny_bundle: Path, linert: Linert) -> None:
    result = linert("sweep", tiny_bundle, "--axis", "grid=4,6", "--rounds", 1, "--compare-pytorch", "--json")
    assert result.code == 0, result.err
    peers = json.loads(result.out)["pytorch"]
    assert {name for name in peers if name.startswith("eager")} == {
        "eager, batch 2, grid 4",
        "eager, batch 2, grid 6",
    }
    assert all(peer["seconds_per_image"] > 0 for peer in peers.values())


def test_cells_are_what_their_labels_say(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    axes = parse_axes(["batch=3", "grid=4", "policy=streaming", "budget=1/2", "precision=int4"])
    [cell] = cells(bundle, axes)
    request = cell_request(bundle, cell, *Checkpoints.find(bundle).load(grid=4))
    assert (request.images, request.raster.lines, request.policies) == (3, 4, ("streaming",))
    assert request.capacity_lines == request.cache.budget_lines == (2,) * TINY.layers
    assert request.precision.weights == "int4"
    assert request.precision.convolutions
    # What is not swept is the bundle's: half of the lines.
    [cell] = cells(bundle, parse_axes(["grid=4"]))
    request = cell_request(bundle, cell, *Checkpoints.find(bundle).load(grid=4))
    assert (request.capacity_lines, request.policies, request.images) == (
        (2,) * TINY.layers,
        ("leverage",),
        2,
    )


def test_a_sweep_of_nothing_measures_the_bundle_beside_pytorch(
    tiny_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    options = ("--rounds", 1, "--images", 0)
    result = linert("sweep", tiny_bundle, *options, "--compare-pytorch", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    [cell] = told["cells"]
    assert cell["labels"] == {"bundle": tiny_bundle.name}
    assert told["pytorch"]["eager, batch 2, grid 6"]["decode_ms"] > 0
    result = linert("sweep", tiny_bundle, *options)
    assert result.code == 0, result.err
    assert tiny_bundle.name in result.out
    assert "{" not in result.out


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("sweep", ("--axis", "colour=red"), "colour=red"),
        ("sweep", ("--axis", "batch="), "batch="),
        ("sweep", ("--axis", "batch=1", "--axis", "batch=2"), "at most once"),
        ("sweep", ("--axis", "policy=none"), "no policy none"),
        ("sweep", ("--axis", "precision=fp8"), "no precision fp8"),
        ("sweep", ("--axis", "batch=two"), "not a number"),
        ("sweep", ("--axis", "batch=1", "--plot", "sweep.xyz"), "ends in one of"),
        ("sweep", ("--axis", "batch=1", "--plot", "no/sweep.png"), "there is no folder"),
        ("sweep", ("--rounds", 0), "--rounds"),
        ("sweep", ("--images", 10**12), "--images"),
        ("bench", ("--rounds", 0), "--rounds"),
        ("bench", ("--rounds", 10**12), "--rounds"),
        ("bench", ("--images", 10**12), "--images"),
        ("bench", ("--backend", "rtx", "--profile"), "--profile"),
    ],
)
def test_wrong_requests_are_refused(
    command: str, options: tuple[object, ...], words: str, tiny_bundle: Path, linert: Linert
) -> None:
    result = linert(command, tiny_bundle, *options)
    assert result.code == 2
    assert words in result.err


def test_a_plot_replaces_nothing_but_a_plot(tiny_bundle: Path, linert: Linert, tmp_path: Path) -> None:
    picture = tmp_path / "holiday.png"
    picture.write_bytes(b"a picture")
    result = linert("sweep", tiny_bundle, "--axis", "policy=linear", "--plot", picture)
    assert result.code == 2
    assert "is no plot of a sweep" in result.err
    assert picture.read_bytes() == b"a picture"


def test_limits_follow_the_bundle(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    limit = limit_of(manifest, 1e9, 1e9)
    # Which line an image is in is nothing that a decode step reads.
    assert limit.state_bytes == manifest.state_bytes - manifest.state_spec("line").nbytes
    assert limit.weight_bytes == manifest.stages["decode.unfiltered"].work.weight_bytes


def test_axes_are_parsed() -> None:
    assert parse_axes(["batch=1, 8", "policy=full"]) == {"batch": ("1", "8"), "policy": ("full",)}
    with pytest.raises(RequestError):
        parse_axes(["batch"])
