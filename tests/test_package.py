"""What people install: one package, whose public names are loaded when they are used."""

from __future__ import annotations

import csv
import doctest
import io
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import linert
from tests.conftest import ROOT

FOLDERS = ("linert", "exporter", "graphs", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        source,
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        folder,
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_owns_one_package_with_everything_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith("/RECORD"))
        listed = {row[0] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
    assert listed == set(names)
    assert {name.split("/")[0] for name in names} == {"linert", record.split("/")[0]}
    kept = {name for name in names if name.startswith("linert/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("linert", "linert/exporter", "linert/graphs", "linert/runtime")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".j2", ".json", ".html", ".typed")
    }
    assert kept == wanted
    assert "linert/py.typed" in kept


def test_it_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Without a dependency the public names are listed, and the version; a name that needs one says which."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = next((tmp_path / "empty").glob("bin/python"), tmp_path / "empty" / "Scripts" / "python.exe")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import linert, sys; print(linert.__version__, len(linert.__all__), linert.LinertError.__name__)\n"
        "try:\n    linert.Generator\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    )
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    version, count, name, missing = done.stdout.split()
    assert (version, int(count), name) == (linert.__version__, len(linert.__all__), "LinertError")
    assert missing in {"msgspec", "numpy", "PIL"}


def test_the_command_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "linert", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert linert.__version__ in done.stdout


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(linert.__all__) == linert.__all__
    for name in set(linert.__all__) - {"__version__", "Condition"}:
        assert getattr(linert, name).__doc__, name
    assert set(linert.__all__) <= set(dir(linert))
    with pytest.raises(AttributeError, match="no attribute 'generator'"):
        linert.generator  # noqa: B018


def test_the_first_example_runs(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    example = (linert.__doc__ or "").replace("[3, 7]", "[3, 4]")
    test = doctest.DocTestParser().get_doctest(example, {}, "linert", None, None)
    assert doctest.DocTestRunner().run(test).failed == 0
    assert (tmp_path / "three.png").exists()
