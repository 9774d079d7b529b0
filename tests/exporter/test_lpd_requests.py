"""Orders that a file or a program tells, and what an LPD, its bundles and others do not take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linert.graphs.families.lpd import LPD
from linert.runtime.drawing.generator import Generator
from linert.runtime.drawing.samples import ClassLabel, Sample
from linert.runtime.errors import RequestError
from tests.conftest import Result

Linert = Callable[..., Result]


def shown(result: Result) -> str:
    return " ".join((result.out + result.err).split())


def write_orders(path: Path, orders: Sequence[Sequence[int]]) -> Path:
    path.write_text(json.dumps([list(map(int, order)) for order in orders]))
    return path


def test_orders_of_a_file_are_taken_one_an_image(
    grouped_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    chance = np.random.default_rng(0)
    orders = [chance.permutation(16) for _ in range(5)]
    path = write_orders(tmp_path / "orders.json", orders)
    saved = tmp_path / "tokens.npz"
    asked = ("--classes", "1,2", "--num-images", 5, "--orders", path, "--save-tokens", saved)
    result = linert("run", grouped_bundle, *asked, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    with Generator(grouped_bundle) as generator:
        wanted = [
            generator.draw([Sample(ClassLabel(1 + k % 2), k // 2)], orders=[order])[0]
            for k, order in enumerate(orders)
        ]
    assert np.array_equal(np.load(saved)["tokens"], np.stack(wanted))
    # Another file is another run.
    other = write_orders(tmp_path / "other.json", orders[::-1])
    result = linert(
        "run", grouped_bundle, *asked[:-4], "--orders", other, "--out", tmp_path / "out", "--resume"
    )
    assert result.code == 2
    result = linert("run", grouped_bundle, *asked[:-2], "--out", tmp_path / "out", "--resume")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0, 1, 2]]", "order 0 has 3 cells; images have 16"),
        (json.dumps([[0] * 16]), "order 0 does not hold every cell from 0 to 15 once"),
        (json.dumps([list(range(1, 17))]), "order 0 does not hold every cell from 0 to 15 once"),
        ("[]", "holds 0 orders, for 1 images"),
        ('{"orders": []}', "is no list of orders"),
        ("[[0, 1", "is no list of orders"),
        (json.dumps([["a"] * 16]), "order 0 is no list of cells"),
    ],
)
def test_bad_order_files_are_named(
    content: str, message: str, grouped_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    path = tmp_path / "orders.json"
    path.write_text(content)
    result = linert("run", grouped_bundle, "--classes", 1, "--orders", path, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in shown(result)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([], "0 orders for 2 images"),
        ([range(16)], "1 orders for 2 images"),
        ([range(16), range(1, 17)], "order 1 does not hold every cell from 0 to 15 once"),
        ([[0] * 16, range(16)], "order 0 does not hold every cell from 0 to 15 once"),
        ([range(15), range(16)], "order 0 has 15 cells; images have 16"),
        ([np.arange(16.0), range(16)], "order 0 is no list of cells"),
    ],
)
def test_orders_of_a_program_are_checked_like_those_of_a_file(
    orders: Any, message: str, grouped_bundle: Path
) -> None:
    with Generator(grouped_bundle) as generator:
        samples = [Sample(ClassLabel(k), 0) for k in (1, 2)]
        with pytest.raises(RequestError, match=message):
            generator.draw(samples, orders=orders)
        in_rows = np.stack([np.arange(16), np.arange(16)[::-1]])
        rows = generator.draw(samples, orders=in_rows)  # type: ignore[arg-type]
        assert np.array_equal(rows, generator.draw(samples, orders=list(in_rows)))


def test_orders_are_for_groups(tiny_bundle: Path, linert: Linert, tmp_path: Path) -> None:
    path = write_orders(tmp_path / "orders.json", [range(36)])
    result = linert("run", tiny_bundle, "--classes", 1, "--orders", path, "--out", tmp_path / "out")
    assert result.code == 2
    assert "draws line by line; leave --orders out" in shown(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 20), "no images of 4 x 4 tokens in 20 steps: there is no table"),
        ((), "there is no table for images of 4 x 4 tokens: tell the sizes of the groups with --group-sizes"),
        (
            ("--group-sizes", "1,7,9"),
            "groups of 17 tokens in all, the smallest of 1; must be at least 1 each and 16 in all",
        ),
        (("--group-sizes", "1,0,15"), "the smallest of 0; must be at least 1"),
        (("--group-sizes", "1;15"), "is no list of sizes like 1,3,5"),
        (("--group-sizes", "1,7,8", "--group-sizes", "2,6,8"), "two lists of 3 groups"),
        (("--group-sizes", "1,7,8", "--repulsion", 9), "a repulsion of 9 cells; must be 0 to 4"),
        (
            ("--group-sizes", "1,7,8", "--window", "1,4"),
            "is an LPD, which draws in groups: leave --window out",
        ),
        (("--group-sizes", "1,7,8", "--policy", "full"), "is an LPD, whose cache evicts nothing"),
        (("--group-sizes", "1,7,8", "--budget-lines", 2), "is an LPD, whose cache evicts nothing"),
        (("--group-sizes", "1,7,8", "--capacity-lines", 2), "is an LPD, whose cache evicts nothing"),
    ],
)
def test_what_an_lpd_does_not_take_is_refused(
    options: Sequence[object],
    message: str,
    lpd_file: Path,
    tiny_files: tuple[Path, Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    result = linert(
        "export", lpd_file, "--vq", tiny_files[1], "--heads", 4, "--out", tmp_path / "bundle", *options
    )
    assert result.code == 2
    assert message in shown(result)


def test_steps_without_a_table_list_those_with_one(
    tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    from linert.exporter.lpd_file import published_tensors
    from linert.graphs.families.lpd import LPDConfig

    net = LPD(LPDConfig(1, 8, 1, 16, 64, 2, 16))
    torch.save({"model": published_tensors(net.state_dict())}, tmp_path / "lpd.pth")
    options = ("--vq", tiny_files[1], "--heads", 1, "--steps", "20,21", "--out", tmp_path / "bundle")
    result = linert("export", tmp_path / "lpd.pth", *options)
    assert result.code == 2
    assert (
        "no images of 16 x 16 tokens in 21 steps: there are tables of 8, 12, 16, 20, 24, 32, 64, 128, 256 steps"
        in shown(result)
    )


def test_a_raster_takes_no_groups(
    tiny_files: tuple[Path, Path], tiny_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    options = ("--grid", 6, "--heads", 4, "--out", tmp_path / "bundle")
    result = linert("export", tiny_files[0], "--vq", tiny_files[1], *options, "--steps", 20)
    assert result.code == 2
    assert (
        "is a LlamaGen, which draws line by line: leave --steps, --group-sizes, --group-stages and --repulsion out"
        in shown(result)
    )
    for option, message in (
        ("--steps", "steps: the bundle draws line by line"),
        ("--guidance-schedule", "guidance_schedule linear"),
    ):
        value = 4 if option == "--steps" else "linear"
        result = linert("run", tiny_bundle, "--classes", 1, option, value, "--out", tmp_path / "out")
        assert result.code == 2
        assert message in shown(result)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "--policy", "linear", "--classes", "0", "--out", "x"), "cache options"),
        (("run", "--eviction-map", "layers", "--classes", "0", "--out", "x"), "--eviction-map"),
        (("run", "--record-trace", "x.npz", "--classes", "0", "--out", "x"), "--record-trace"),
        (("compare", "--classes", "0", "--out", "x"), "compare weighs cache policies"),
        (("sweep", "--axis", "policy=full"), "--axis policy"),
    ],
)
def test_what_needs_eviction_is_refused(
    command: tuple[str, ...], message: str, grouped_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    name, *options = command
    at = [str(tmp_path / option) if option.startswith("x") else option for option in options]
    result = linert(name, grouped_bundle, *at)
    assert result.code == 2
    assert f"{message}: the bundle evicts nothing" in shown(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--steps", 4),
            "the bundle draws no image in 4 steps, only in 5, 3: export it with a list of so many groups too, by --steps or "
            "--group-sizes",
        ),
        (("--steps", -1), "steps -1 must be at least 0"),
        (
            ("--window", 4),
            "a window of 4 positions: the bundle draws in groups of its own; leave --window out",
        ),
        (("--window", "auto"), "leave --window out"),
    ],
)
def test_what_the_bundle_does_not_draw_is_refused(
    options: Sequence[object], message: str, grouped_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    result = linert("run", grouped_bundle, "--classes", 1, *options, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in shown(result)


def test_a_grid_that_is_no_square_is_named(
    lpd_file: Path, tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    held = torch.load(lpd_file, weights_only=False)
    held["model"]["pos_embed"] = held["model"]["pos_embed"][:, :-1]
    torch.save(held, tmp_path / "lpd.pth")
    result = linert(
        "export", tmp_path / "lpd.pth", "--vq", tiny_files[1], "--heads", 4, "--out", tmp_path / "bundle"
    )
    assert result.code == 2
    assert "pos_embed has 16 rows, which is not one more than the cells of a square" in shown(result)


def test_heads_must_be_told_of_sizes_that_are_not_published(
    lpd_file: Path, tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    result = linert(
        "export", lpd_file, "--vq", tiny_files[1], "--group-sizes", "1,7,8", "--out", tmp_path / "bundle"
    )
    assert result.code == 2
    assert "2 layers of width 32 are not a published LPD size" in shown(result)
    assert "give it with --heads" in shown(result)


def test_the_image_decoder_is_asked_for_by_its_name(lpd_file: Path, linert: Linert, tmp_path: Path) -> None:
    result = linert("export", lpd_file, "--heads", 4, "--group-sizes", "1,7,8", "--out", tmp_path / "bundle")
    assert result.code == 2
    assert "give one with --vq (vq_ds16_c2i.pt for LlamaGen and LPD;" in shown(result)
