"""Folders as hubs, caches and people leave them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from linert.exporter.checkpoint import find_weights, names_of, open_checkpoint
from linert.exporter.models import ModelRequest, load_models, named_side
from linert.exporter.vocabulary import TokenizerFile
from linert.runtime.errors import CheckpointError
from tests.conftest import Result
from tests.text_models import parts, write_shards, write_tiny_janus

Linert = Callable[..., Result]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file."""
    return write_tiny_janus(tmp_path_factory.mktemp("janus") / "folder")


@pytest.fixture
def folder(janus: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(janus, tmp_path / "folder")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in three files and an index."""
    file = folder / "model.safetensors"
    write_shards(parts(safetensors.torch.load_file(file), 3), 3, folder)
    file.unlink()
    return folder


def cached(files: dict[str, Path], root: Path, *, revision: str = "abc", main: bool = True) -> Path:
    """A repository of a hub's cache: files are links to blobs that are called by their digests."""
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(revision)
    for number, (name, path) in enumerate(files.items()):
        blob = root / "blobs" / (f"{number:x}" * 64)
        shutil.copy(path, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_the_size_stands_in_the_name_that_was_given(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = cached({"c2i_B_384.pt": tiny_files[0]}, tmp_path / "models--org--LlamaGen")
    assert named_side(names_of(snapshot / "c2i_B_384.pt")) == 384
    link = tmp_path / "c2i_B_256.pt"
    link.symlink_to(snapshot / "c2i_B_384.pt")
    assert named_side(names_of(link)) == 256
    # A link of another name goes by what it leads to.
    plain = tmp_path / "model.pt"
    target = tmp_path / "c2i_B_512.pt"
    shutil.copy(tiny_files[0], target)
    plain.symlink_to(target)
    assert named_side(names_of(plain)) == 512
    transformer, _ = load_models(link, tiny_files[1], ModelRequest(heads=4))
    assert transformer.config.grid == 256 // 2


def test_a_usual_name_goes_by_its_folder_and_a_revision_by_its_repository(
    tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    snapshot = cached({"pytorch_model.bin": tiny_files[0]}, tmp_path / "models--org--c2i_B_384")
    assert named_side(names_of(snapshot)) == 384
    assert named_side(names_of(snapshot / "pytorch_model.bin")) == 384
    named = tmp_path / "c2i_B_256"
    named.mkdir()
    shutil.copy(tiny_files[0], named / "pytorch_model.bin")
    assert named_side(names_of(named / "pytorch_model.bin")) == 256


def test_a_name_with_two_sizes_tells_none() -> None:
    assert named_side(["c2i_B_256_to_384.pt", "c2i_B_512.pt"]) is None


def test_a_cache_s_repository_is_its_main_revision(janus: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--Janus"
    files = {path.name: path for path in janus.iterdir()}
    snapshot = cached(files, root, main=False)
    transformer, _ = load_models(root, None, ModelRequest())
    assert transformer.checkpoint.files == (snapshot / "model.safetensors",)
    # The manifest remembers what can be read again, with the files beside it.
    assert load_models(Path(transformer.source.path), None, ModelRequest())
    named = TokenizerFile.find(transformer.checkpoint, root)
    assert named is not None
    assert named.path == snapshot / "tokenizer.json"
    (root / "snapshots" / "def").mkdir()
    with pytest.raises(CheckpointError, match="holds 2 revisions and no refs/main"):
        find_weights(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc\n")
    assert find_weights(root).files == (snapshot / "model.safetensors",)


def test_the_path_in_a_manifest_keeps_its_name(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = cached({"c2i_B_384.pt": tiny_files[0]}, tmp_path / "models--org--LlamaGen")
    source = open_checkpoint(snapshot / "c2i_B_384.pt").source
    assert source.path == str(snapshot / "c2i_B_384.pt")


def test_a_complete_set_is_taken_beside_an_incomplete_one(sharded: Path) -> None:
    state = open_checkpoint(sharded).tensors
    torch.save(dict(state), sharded / "pytorch_model.bin")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors.keys() == state.keys()
    assert "lacks model-00002-of-00003.safetensors" in checkpoint.remarks[0]
    # What was asked for by its name is not passed over.
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003"):
        open_checkpoint(sharded / "model.safetensors.index.json")
    (sharded / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003"):
        open_checkpoint(sharded)


def test_the_index_says_whose_tensor_counts(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = open_checkpoint(sharded).tensors
    first, last = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    name = next(name for name, file in index.items() if file == first.name)
    shard = safetensors.torch.load_file(last)
    safetensors.torch.save_file({**shard, name: wanted[name] + 1}, last)
    assert torch.equal(open_checkpoint(sharded).tensors[name], wanted[name])


def test_a_shard_alone_is_refused(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a part of the tensors: give its folder"):
        open_checkpoint(sharded / "model-00001-of-00003.safetensors")


def test_wrapped_names_in_an_index_are_those_of_the_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    file.unlink()
    write_shards(parts({f"module.{name}": tensor for name, tensor in state.items()}, 2), 2, folder)
    assert open_checkpoint(folder).tensors.keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no weight_map of file names"),
        ('{"weight_map": {}}', "names no tensor; download it again"),
        ('{"weight_map": []}', "has no weight_map of file names"),
        ('{"weight_map": {"a": ".."}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": "../x"}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": "x\\u0000"}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": "\\ud800"}}', "has no weight_map of file names"),
        (json.dumps({"weight_map": {"a": "x" * 5000}}), "has no weight_map of file names"),
    ],
)
def test_an_index_names_files_in_its_folder(content: str, message: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


JSON_FILES = ("config.json", "model.safetensors.index.json", "tokenizer_config.json", "processor_config.json")


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply|is no tokenizer.json"),
        (b"[" * 100_000, "nested too deeply|is no tokenizer.json"),
        (b"\xff\x00\x01", "is no text in UTF-8"),
        ("{}".encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
        ("{}".encode("utf-16-le"), "it holds zero bytes"),
        ("{}".encode("utf-32"), "is text in UTF-32: save it as UTF-8"),
        (b"", "is damaged|is no tokenizer.json"),
        (b"[]", "holds no JSON object|is no tokenizer.json"),
        (b"1" * 9999, "is damaged|is no tokenizer.json"),
        (POINTER.encode(), "is a git-lfs pointer"),
    ],
    ids=[
        "objects",
        "lists",
        "bytes",
        "utf-16",
        "utf-16 without a mark",
        "utf-32",
        "empty",
        "list",
        "digits",
        "pointer",
    ],
)
def test_damaged_files_are_refused_in_a_sentence(
    content: bytes, message: str, name: str, folder: Path, linert: Linert, tmp_path: Path
) -> None:
    (folder / name).write_bytes(content)
    result = linert("export", folder, "--out", tmp_path / "bundle")
    assert result.code == 2
    told = " ".join(result.err.split())
    assert name in told
    assert any(part in told for part in message.split("|")), told
    assert not (tmp_path / "bundle").exists()


def test_files_may_begin_with_a_byte_order_mark(sharded: Path) -> None:
    load_models(sharded, None, ModelRequest())
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (sharded / name).write_bytes(b"\xef\xbb\xbf" + (sharded / name).read_bytes())
    load_models(sharded, None, ModelRequest())


def test_pointers_of_git_lfs_are_named(folder: Path, tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"git-lfs pointer.* git lfs pull"):
        open_checkpoint(folder)
    pointer = tmp_path / "vq.pt"
    pointer.write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"vq\.pt is a git-lfs pointer"):
        load_models(tiny_files[0], pointer, ModelRequest(grid=6, heads=4))


def test_pipes_and_devices_are_no_checkpoints(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="does not exist"):
            find_weights(path)


def test_names_that_are_not_in_utf_8_are_refused(tiny_files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"model\xff.pt")
    shutil.copy(tiny_files[0], path)
    with pytest.raises(CheckpointError, match="rename it"):
        open_checkpoint(path)
