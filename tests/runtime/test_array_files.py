"""Files of arrays are read within bounds and written in parts."""

from __future__ import annotations

import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from linert.runtime.errors import RequestError
from linert.runtime.files.array_files import read_arrays, write_arrays, write_parts


@pytest.mark.parametrize("parts", [[(3, 2), (1, 2), (3, 2)], [(1,)], [(2, 0)]])
def test_parts_make_the_array_that_they_are(parts: list[tuple[int, ...]], tmp_path: Path) -> None:
    arrays = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in parts]
    write_parts(tmp_path / "a.npz", "pixels", sum(map(len, arrays)), iter(arrays))
    with np.load(tmp_path / "a.npz") as read:
        assert read.files == ["pixels"]
        assert read["pixels"].dtype == np.float32
        np.testing.assert_array_equal(read["pixels"], np.concatenate(arrays))


def test_one_part_is_held_at_a_time(tmp_path: Path) -> None:
    references: list[weakref.ref[np.ndarray]] = []

    def parts() -> Iterator[np.ndarray]:
        for _ in range(5):
            assert [one() for one in references[:-1]] == [None] * len(references[:-1])
            part = np.ones((2, 3), np.float32)
            references.append(weakref.ref(part))
            yield part

    write_parts(tmp_path / "a.npz", "pixels", 10, parts())
    assert len(references) == 5


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([np.zeros((2, 2), np.float32)], "2 entries of pixels, not 4"),
        ([np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32)], "differ"),
        ([np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float64)], "differ"),
    ],
)
def test_parts_that_make_no_array_leave_no_file(
    parts: list[np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_parts(tmp_path / "a.npz", "pixels", 4, parts)
    assert list(tmp_path.iterdir()) == []


def swollen(path: Path, name: str, megabytes: int) -> None:
    """Zeros, which are stored a thousand times smaller."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as member,
    ):
        shape = (megabytes, 1 << 20)
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(megabytes):
            member.write(bytes(1 << 20))


def test_a_file_that_swells_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    swollen(path, "tokens", 400)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(np.lib.format, "read_array", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(RequestError, match=r"would take 0\.4 GB in memory"):
        read_arrays(path)
    assert read_arrays(path, ["others"]) == {}


def test_bounds_are_those_that_are_given(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_arrays(path, {"tokens": np.zeros(100, np.int64), "other": np.zeros(1000)})
    assert read_arrays(path, ["tokens"], 1000)["tokens"].shape == (100,)
    with pytest.raises(RequestError, match="far more than what it should hold"):
        read_arrays(path, ["tokens", "other"], 1000)


def test_what_is_no_npz_file_is_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "folder.npz").mkdir()
    for name in ("a.npy", "empty.npz", "folder.npz"):
        with pytest.raises(RequestError, match="is no npz file"):
            read_arrays(tmp_path / name)
    with pytest.raises(RequestError, match="does not exist"):
        read_arrays(tmp_path / "none.npz")
