"""What all commands have: settings files, quiet and JSON, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

Linert = Callable[..., Result]


def settings(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_settings_file_gives_defaults_that_the_command_line_overrides(
    linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    file = settings(
        tmp_path / "linert.toml",
        "[run]\nclasses = [1, 2]\nnum-images = 3\nseed = 7\nguidance = 2.5\ngreedy = true\n[export]\ngrid = 9\n",
    )
    result = linert("run", tiny_bundle, "--config", file, "--out", tmp_path / "a", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert [(image["condition"]["class_id"], image["seed"]) for image in told["images"]] == [
        (1, 7),
        (2, 7),
        (1, 8),
    ]
    result = linert(
        "run", tiny_bundle, "--config", file, "--seed", 1, "--classes", "3", "--out", tmp_path / "b", "--json"
    )
    assert result.code == 0, result.err
    assert [image["seed"] for image in json.loads(result.out)["images"]] == [1, 2, 3]
    request = json.loads((tmp_path / "b" / "run.json").read_text())
    assert request["sampling"]["guidance"] == 2.5
    assert request["sampling"]["greedy"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nnum-image = 3\n", "linert run has no option num-image; it has"),
        ("[run]\nconfig = 'other.toml'\n", "has no option config"),
        ("[run]\nno-cuda-graphs = true\n", "has no option no-cuda-graphs"),
        ("[run]\ngreedy = 'perhaps'\n", "'perhaps' is not a valid boolean"),
        ("[run]\nseed = 'x'\n", "'x' is not a valid integer"),
        ("[run]\nnum-images = 2.5\n", "not a valid integer"),
        ("run = 3\n", "run must be a table: [run]"),
        ("[run\n", "is no TOML file"),
    ],
)
def test_a_settings_file_with_faults_is_refused(
    text: str, message: str, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    file = settings(tmp_path / "linert.toml", text)
    result = linert("run", tiny_bundle, "--classes", 1, "--config", file, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()
    assert linert("run", tiny_bundle, "--config", tmp_path / "none.toml", "--out", tmp_path / "out").code == 2


def test_quiet_prints_nothing_but_errors(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    result = linert("run", tiny_bundle, "--classes", 1, "--out", tmp_path / "out", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    result = linert("run", tiny_bundle, "--classes", 99, "--out", tmp_path / "other", "--quiet")
    assert result.code == 2
    assert "Error" in result.err


def test_the_result_of_a_run_as_json(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    out, saved, trace = tmp_path / "out", tmp_path / "tokens.npz", tmp_path / "trace.npz"
    options = ("--save-tokens", saved, "--record-trace", trace, "--json")
    result = linert("run", tiny_bundle, "--classes", "1,2", "--out", out, *options)
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert [(out / image["file"]).is_file() for image in told["images"]] == [True, True]
    assert (told["folder"], told["tokens"], told["trace"]) == (str(out), str(saved), str(trace))
    assert Path(told["contact_sheet"]).is_file()


def test_the_result_of_an_export_as_json(
    linert: Linert, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    options = ("--grid", 6, "--heads", 4, "--batch", 2, "--budget-lines", 3)
    result = linert(
        "export", tiny_files[0], "--vq", tiny_files[1], *options, "--out", out, "--json", "--quiet"
    )
    assert result.code == 0, result.err
    assert result.err == ""
    told = json.loads(result.out)
    assert told["bundle"] == str(out)
    assert told["sha256"] == json.loads((out / "manifest.json").read_text())["sha256"]
    assert told["sizes"] == ["12x12"]
    assert told["file_bytes"] == sum(
        path.stat().st_size for path in out.iterdir() if path.name != "manifest.json"
    )
    assert told["state_bytes"] > 0
