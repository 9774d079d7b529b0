"""Zips of torch.save are held to their own directory before anything is mapped or inflated."""

from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from linert.exporter.torch_files import Inert, load_torch
from linert.runtime.errors import CheckpointError
from tests.exporter.test_checkpoint import weights

Change = Callable[[str, bytes], bytes | None]


@pytest.fixture(scope="module")
def saved() -> bytes:
    file = io.BytesIO()
    torch.save({"model": weights()}, file)
    return file.getvalue()


def rewritten(saved: bytes, change: Change, compression: int = zipfile.ZIP_STORED) -> bytes:
    """``saved`` with other entries, and checksums that fit them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return file.getvalue()


def unchanged(name: str, content: bytes) -> bytes:
    return content


def test_a_zip_that_another_program_wrote_loads(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(rewritten(saved, unchanged))
    loaded = load_torch(path)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-64], "has 4032 bytes, and the tensors that it is for take 4096"),
        (lambda content: content + bytes(64), "has 4160 bytes, and the tensors that it is for take 4096"),
        (lambda content: b"", "its entries are not where its weights are"),
        (lambda content: None, "truncated, corrupt or no checkpoint"),
    ],
    ids=["shorter", "longer", "empty", "missing"],
)
def test_an_entry_is_as_long_as_its_tensors(
    change: Callable[[bytes], bytes | None], message: str, saved: bytes, tmp_path: Path
) -> None:
    """The mapping would give the neighbour's bytes for what a shorter entry lacks."""
    path = tmp_path / "model.pt"
    path.write_bytes(
        rewritten(saved, lambda name, content: change(content) if name.endswith("/data/3") else content)
    )
    with pytest.raises(CheckpointError, match=message):
        load_torch(path)


def test_compressed_entries_are_refused(saved: bytes, tmp_path: Path) -> None:
    """Their bytes would be mapped as weights."""
    path = tmp_path / "model.pt"
    path.write_bytes(rewritten(saved, unchanged, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="is compressed"):
        load_torch(path)


def test_nothing_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("model/data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(256):
            entry.write(bytes(1 << 20))
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(CheckpointError, match="is compressed"):
        load_torch(path)
    assert time.process_time() - begun < 0.1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_overlapping_entries_are_refused(saved: bytes, tmp_path: Path) -> None:
    """Two entries of the directory lead to the same bytes."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        listed = {entry.filename.rpartition("/")[2]: entry for entry in archive.infolist()}
        directory = archive.start_dir
    data = bytearray(saved)
    name = listed["3"].filename.encode()
    at = data.index(name, directory) - 46
    # The offset of the local header, in a record of the directory.
    data[at + 42 : at + 46] = listed["2"].header_offset.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        load_torch(path)


def test_two_entries_of_one_name_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(entry.filename for entry in archive.infolist() if entry.filename.endswith("/data/3"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, bytes(4096))
    with pytest.raises(CheckpointError, match="two entries of one name"):
        load_torch(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02.", b"{}", b"<!DOCTYPE html>", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(99)],
    ids=lambda content: content[:8].decode("latin1"),
)
def test_what_is_no_checkpoint_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, corrupt or no checkpoint"):
        load_torch(path)


def test_objects_that_are_taken_for_nothing_run_nothing(tmp_path: Path) -> None:
    """In the place of a path stands something that does nothing."""
    path = tmp_path / "model.pt"
    torch.save({"model": weights(), "path": Path("/nowhere")}, path)
    assert isinstance(load_torch(path)["path"], Inert)
