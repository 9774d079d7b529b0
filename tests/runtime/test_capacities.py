"""A bundle with buffers of several sizes: a run takes the smallest that its budget fits, and draws what a bundle of its own does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from linert.exporter.cache_wishes import CacheWishes
from linert.exporter.models import ModelRequest, load_models
from linert.runtime.bundles.bundle import open_bundle, variants_of
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.errors import BundleError
from tests.conftest import Result

Files = tuple[Path, Path]
Linert = Callable[..., Result]
OPTIONS = ("--grid", 6, "--heads", 4, "--policy", "linear,full", "--budget-lines", 3)
SAMPLES = [Sample(ClassLabel(2), 5)]


@pytest.fixture(scope="module")
def bundle(export: Callable[..., Path], tiny_files: Files) -> Path:
    return export(*tiny_files, *OPTIONS, "--capacity-lines", "6,3")


def test_the_default_is_first_and_every_variant_holds_what_fits_it(bundle: Path) -> None:
    assert variants_of(bundle) == ["", "6lines"]
    opened = open_bundle(bundle)
    small, large = opened.capacities.values()
    assert set(small.policies) == {"linear"}
    assert set(large.policies) == {"linear", "full"}
    assert small.capacity_lines == (3, 3)
    assert opened.widest.capacity_lines == (6, 6)
    assert small.state_bytes < large.state_bytes
    assert small.files["weights.bin"] == large.files["weights.bin"]


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (CacheRequest(), 3),
        (CacheRequest(budget_lines=2), 3),
        (CacheRequest(budget_lines=4), 6),
        (CacheRequest(policy="full"), 6),
        (CacheRequest(layer_budgets="2,5"), 6),
    ],
)
def test_a_run_takes_the_smallest_that_its_budget_fits(
    asked: CacheRequest, lines: int, bundle: Path, export: Callable[..., Path], tiny_files: Files
) -> None:
    opened, settings = asked.settle_for(open_bundle(bundle))
    assert opened.manifest.capacity_lines == (lines, lines)
    alone = open_bundle(export(*tiny_files, *OPTIONS))
    with Generator(opened) as generator, Generator(alone) as usual:
        drawn = generator.draw(SAMPLES, cache=settings)
        assert np.array_equal(drawn, usual.draw(SAMPLES, cache=settings))


def test_commands_choose_and_say_so(bundle: Path, linert: Linert, tmp_path: Path) -> None:
    told = linert("inspect", bundle, "--json")
    assert [each["capacity_lines"] for each in json.loads(told.out)["capacities"]] == [[3, 3], [6, 6]]
    assert "3 lines" in linert("inspect", bundle).out
    states = {}
    for lines, options in ((3, ()), (6, ("--policy", "full"))):
        measured = linert("bench", bundle, *options, "--rounds", 1, "--images", 0, "--json")
        states[lines] = json.loads(measured.out)["state_bytes"]
        done = linert("validate", bundle, *options)
        assert done.code == 0, done.out + done.err
        done = linert("run", bundle, "--classes", 2, *options, "--out", tmp_path / f"{lines}")
        assert done.code == 0, done.err
    small, large = open_bundle(bundle).capacities.values()
    assert states == {3: small.state_bytes, 6: large.state_bytes}


def test_a_trace_is_replayed_where_it_fits(bundle: Path, linert: Linert, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    options = ("--classes", 2, "--budget-lines", 4, "--record-trace", trace)
    assert linert("run", bundle, *options, "--out", tmp_path / "one").code == 0
    done = linert("run", bundle, "--replay-trace", trace, "--out", tmp_path / "two")
    assert done.code == 0, done.err
    assert "100.00%" in done.err
    assert linert("validate", bundle, "--trace", trace).code == 0


def test_a_variant_that_was_changed_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    with (copy / "decode.6lines.onnx").open("r+b") as file:
        file.write(b"\x01")
    opened = open_bundle(copy)
    with pytest.raises(BundleError, match="was changed"):
        CacheRequest(policy="full").settle_for(opened)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--capacity-lines", "4,none"), "is no list of lines"),
        (("--capacity-lines", "2,1"), "fits no buffer of 2, 1 lines: give --capacity-lines 3 too"),
        (("--capacity-lines", "3,4", "--policy", "linear,full"), "needs a buffer of all 6 lines"),
        (("--capacity-lines", "3,9"), "a buffer of 9 lines; must be 1 to 6"),
        (("--capacity-lines", "3,0"), "a buffer of 0 lines; must be 1 to 6"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: tuple[str, ...], told: str, linert: Linert, tiny_files: Files, tmp_path: Path
) -> None:
    files = (tiny_files[0], "--vq", tiny_files[1], "--grid", 6, "--heads", 4, "--budget-lines", 3)
    done = linert("export", *files, *options, "--out", tmp_path / "out")
    assert done.code == 2
    assert told in done.err, done.err


def test_of_several_sizes_a_buffer_has_no_more_lines_than_the_image(tiny_files: Files) -> None:
    transformer, _ = load_models(*tiny_files, ModelRequest(grid=6, heads=4))
    wishes = CacheWishes(("linear", "full"), CacheRequest(budget_lines=3), (3, 9))
    shapes = wishes.settle(transformer, guided=False, one_of_many=True)
    assert [shape.capacity_lines for shape in shapes] == [(3, 3), (6, 6)]
    assert [shape.policies for shape in shapes] == [("linear",), ("linear", "full")]
