"""The digest of code changes with everything that decides what the code does, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from linert.runtime.files import source_digest as module
from linert.runtime.files.source_digest import source_digest


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``judges`` with a module in a package in it, and a file beside it."""
    files = {
        "judges/__init__.py": "",
        "judges/inner/__init__.py": "",
        "judges/inner/metric.py": "import numpy\nfrom ..shared import scale\nfrom . import helper\n"
        "def metrics():\n    import judges.late\n    from beside import thing\n",
        "judges/inner/helper.py": "import os",
        "judges/shared.py": "scale = 1",
        "judges/late.py": "from judges.later import *",
        "judges/later.py": "",
        "judges/unused.py": "",
        "beside.py": "thing = 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


USED = ("__init__", "inner/__init__", "inner/metric", "inner/helper", "shared", "late", "later")


def test_it_follows_imports_where_the_module_lies(code: Path) -> None:
    before = source_digest("judges.inner.metric")
    assert source_digest("judges.inner.metric") == before
    seen = {before}
    for file in (*(code / "judges" / f"{name}.py" for name in USED), code / "beside.py"):
        file.write_text(file.read_text() + "\n# changed")
        seen.add(source_digest("judges.inner.metric"))
    assert len(seen) == 2 + len(USED)
    after = source_digest("judges.inner.metric")
    (code / "judges" / "unused.py").write_text("1 / 0")
    (code / "other.py").write_text("1 / 0")
    assert source_digest("judges.inner.metric") == after


def test_a_file_is_its_own_home(code: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = code / "metric.py"
    file.write_text("from beside import thing\nfrom judges import shared")
    before = source_digest(str(file))
    (code / "judges" / "late.py").write_text("")
    assert source_digest(str(file)) == before
    moved = tmp_path_factory.mktemp("moved") / "code"
    code.rename(moved)
    assert source_digest(str(moved / "metric.py")) == before
    (moved / "beside.py").write_text("thing = 2")
    assert source_digest(str(moved / "metric.py")) != before


def test_installed_packages_are_told_by_their_versions(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest("judges.inner.metric")
    monkeypatch.setattr("numpy.__version__", "99")
    changed = source_digest("judges.inner.metric")
    assert changed != before
    # What lies beside the module in a folder of installed packages is not read.
    monkeypatch.setattr(module, "_is_installed", lambda folder: folder == code)
    there = source_digest("judges.inner.metric")
    (code / "beside.py").write_text("thing = 3")
    assert source_digest("judges.inner.metric") == there
    (code / "judges" / "shared.py").write_text("scale = 3")
    assert source_digest("judges.inner.metric") != there
