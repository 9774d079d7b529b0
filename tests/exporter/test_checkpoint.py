"""Every container loads; everything damaged, hostile or foreign is refused with its reason."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from linert.exporter.checkpoint import open_checkpoint
from linert.exporter.models import LoadedTransformer, ModelRequest, load_image_decoder, load_transformer
from linert.graphs.families import llamagen
from linert.runtime.errors import CheckpointError
from tests.conftest import TINY, TINY_VQ, random_state


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return random_state(llamagen.LlamaGen(TINY), seed)


def fsdp_style(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """FSDP leaves an attribute on its tensors, which makes torch pickle them another way."""
    for tensor in state.values():
        tensor._has_been_cloned = True  # type: ignore[attr-defined]
    return OrderedDict(state)


def training_file(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "steps": 300_000,
        "args": argparse.Namespace(gpt_model="GPT-B", image_size=384),
        "ema": weights(seed=1),
    }


CONTAINERS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "model": lambda state: {"model": OrderedDict(state)},
    "flat": fsdp_style,
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "training": training_file,
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": t for name, t in state.items()}},
    "with freqs_cis": lambda state: {"model": {**state, "freqs_cis": torch.zeros(4, 4, 2)}},
}


def load(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    return dict(transformer(path, **options).tensors)


def transformer(path: Path, patch: int = 16, **options: Any) -> LoadedTransformer:
    request = ModelRequest(**{"grid": TINY.grid, "heads": TINY.heads, **options})
    return load_transformer(open_checkpoint(path, ema=request.ema), request, patch=patch)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_published_containers_load(container: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(CONTAINERS[container](weights()), path, _use_new_zipfile_serialization=not legacy)
    loaded = load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_safetensors_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights(), path)
    assert all(torch.equal(load(path)[name], tensor) for name, tensor in weights().items())


def test_ema_is_an_option_and_never_a_default(tmp_path: Path) -> None:
    path = tmp_path / "train.pt"
    torch.save(training_file(weights()), path)
    name = "output.weight"
    assert torch.equal(load(path)[name], weights()[name])
    assert torch.equal(load(path, ema=True)[name], weights(seed=1)[name])
    torch.save({"model": weights()}, path)
    with pytest.raises(CheckpointError, match="no ema weights"):
        load(path, ema=True)


def test_zip_checkpoints_are_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": weights()}, path)
    tensors = open_checkpoint(path).tensors
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    assert str(path) in maps.read_text()
    assert tensors


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -200, -1])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(keep: int, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": weights()}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(path)


def test_a_changed_byte_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": weights()}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        load(path)


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load(path)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_file_is_not_run(plain_pickle: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "ran"
    content = {"model": weights(), "extra": Hostile(mark)}
    if plain_pickle:
        path.write_bytes(pickle.dumps({"model": {}, "extra": Hostile(mark)}))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load(path)
    assert not mark.exists()


def test_wrong_tensors_are_listed_sorted(tmp_path: Path) -> None:
    state = weights()
    del state["norm.weight"], state["layers.1.ffn_norm.weight"]
    state["zzz"] = state["aaa"] = torch.zeros(2)
    state["output.weight"] = torch.zeros(3, 3)
    state["layers.0.attention_norm.weight"] = torch.zeros(32, dtype=torch.int32)
    path = tmp_path / "model.pt"
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: layers.1.ffn_norm.weight",
        "  missing: norm.weight",
        "  unexpected: aaa",
        "  unexpected: zzz",
        "  wrong shape: output.weight [3, 3] (expected [64, 32])",
        "  not floating point: layers.0.attention_norm.weight torch.int32",
    ]


def test_a_foreign_file_is_named_for_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": {"conv.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(
        CheckpointError, match=r"no family that is known: .*layers\.0\.attention\.wqkv.*LlamaGen"
    ):
        load(path)
    with pytest.raises(CheckpointError, match="not a VQ tokenizer"):
        load_image_decoder(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a dictionary"):
        load(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="no dictionary of weights"):
        load(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "absent.pt")


def test_the_grid_is_asked_for_or_read_from_the_name(tmp_path: Path) -> None:
    path = tmp_path / "c2i_B_384.pt"
    torch.save({"model": weights()}, path)
    assert transformer(path, grid=None).config.grid == 24
    assert transformer(path, patch=8, grid=None).config.grid == 48
    assert transformer(path).config.grid == 6
    other = path.rename(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="--grid"):
        transformer(other, grid=None)
    with pytest.raises(CheckpointError, match="--heads"):
        transformer(other, heads=None)
    with pytest.raises(CheckpointError, match="not a multiple of heads 5"):
        transformer(other, heads=5)


def test_the_image_decoder_needs_no_encoder(tmp_path: Path, tiny_files: tuple[Path, Path]) -> None:
    loaded = load_image_decoder(tiny_files[1])
    assert loaded.config == TINY_VQ
    path = tmp_path / "decoder.pt"
    torch.save({"model": dict(loaded.tensors)}, path)
    assert load_image_decoder(path).config == TINY_VQ
