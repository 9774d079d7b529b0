"""Weights are found in whatever training code puts around them, and where reading would be a guess it is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linert.exporter.checkpoint import open_checkpoint
from linert.exporter.models import (
    LoadedTransformer,
    ModelRequest,
    load_models,
    load_text_encoder,
    load_transformer,
)
from linert.exporter.state_dicts import unwrapped
from linert.graphs import text_encoder
from linert.graphs.families import FAMILIES, janus, llamagen, lumina, vq
from linert.runtime.errors import CheckpointError, RequestError
from tests.conftest import TINY, random_state
from tests.exporter.test_checkpoint import weights
from tests.text_models import write_tiny_janus, write_tiny_t5

Tensors = dict[str, Tensor]


def load(path: Path, content: Any, **request: Any) -> LoadedTransformer:
    """What is loaded of a file that holds ``content``."""
    torch.save(content, path)
    asked = ModelRequest(**{"grid": TINY.grid, "heads": TINY.heads, **request})
    return load_transformer(open_checkpoint(path), asked, patch=16)


def behind(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "state_dict.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module._orig_mod.",
        "state_dict.model.module.",
        "module.module.",
    ],
)
def test_wrappers_around_a_model_are_taken_off(prefix: str, tmp_path: Path) -> None:
    loaded = load(tmp_path / "model.pt", behind(prefix, weights()))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_layers_are_taken_off(wrapper: str, tmp_path: Path) -> None:
    state = {name.replace("layers.1.", f"layers.1.{wrapper}."): t for name, t in weights().items()}
    assert load(tmp_path / "model.pt", state).config == TINY


@pytest.mark.parametrize(
    "family",
    [janus.FAMILY, lumina.FAMILY, llamagen.FAMILY],
    ids=lambda family: family.name,
)
def test_names_of_a_family_that_look_like_wrappers_stay(family: Any) -> None:
    """``model.`` is a part of some families' names."""
    for layout in family.layouts:
        names = {layout.landmark: torch.zeros(1), "lm_head.weight": torch.zeros(1)}
        assert unwrapped(Path("x"), names).keys() == names.keys()
        assert unwrapped(Path("x"), behind("model.module.", names)).keys() == names.keys()


CONTAINERS: dict[str, Callable[[Tensors], Any]] = {
    "containers in containers": lambda state: {"state_dict": {"model": {"module": state}}},
    "a name where weights may be": lambda state: {"model": "GPT-B", "state_dict": state},
    "an empty container": lambda state: {"model": {}, "module": state},
    "numbers among tensors": lambda state: {**state, "epoch": 3, "lr": 1e-4, "note": "x", "none": None},
    "numbers of numpy": lambda state: {
        "model": state,
        "loss": np.float64(0.5),
        "step": np.int64(3),
        "curve": np.arange(4.0),
        "kind": np.dtype("float32"),
        "random": np.random.default_rng(0).bit_generator.state,
    },
    "a number of numpy among tensors": lambda state: {**state, "loss": np.float32(0.5)},
    "objects of the standard library": lambda state: {
        "model": state,
        "args": types.SimpleNamespace(lr=1.0),
        "path": pathlib.PurePosixPath("/data"),
        "time": datetime.datetime(2024, 1, 2),
        "losses": collections.defaultdict(list, {"train": [1.0]}),
    },
    "buffers of rotary embeddings, masks and caches": lambda state: {
        **state,
        "causal_mask": torch.ones(3, 3),
        "layers.0.attention.bias": torch.ones(3, 3, dtype=torch.bool),
        "layers.0.attention.mask": torch.ones(3, 3),
        "rope.freqs": torch.zeros(4),
        "freqs_cis": torch.zeros(4, 4, 2),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2),
        "layers.0.attention.rotary_emb.inv_freq": torch.zeros(3),
        "n_averaged": torch.tensor(7),
        "layers.0.attention_norm.num_batches_tracked": torch.tensor(7),
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_stands_around_weights_is_no_matter(container: str, tmp_path: Path) -> None:
    loaded = load(tmp_path / "model.pt", CONTAINERS[container](weights()))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in weights().items())


LAYOUTS = {
    f"{family.name}, {layout.who}": layout for family in FAMILIES.values() for layout in family.layouts
} | {"text encoder": text_encoder.LAYOUT}
BUFFERS = (
    *("inv_freq", "original_inv_freq", "freqs_cis", "freqs", "cos_cached", "sin_cached", "position_ids"),
    *("causal_mask", "attention_mask", "attn_mask", "mask", "masked_bias", "tril", "k_cache", "v_cache"),
)
PLACES = (
    "",
    "model.",
    "rotary_emb.",
    "model.layers.0.self_attn.",
    "language_model.model.layers.1.self_attn.",
)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_are_no_parameters_in_any_family(layout: str, buffer: str) -> None:
    names = [place + part + buffer for place in PLACES for part in ("", "rotary_emb.")]
    assert LAYOUTS[layout].rename(names) == ({}, [])
    codes = {vq.LANDMARK: 0, "decoder.conv_in.weight": 0}
    naming = vq.naming([*codes, *(f"decoder.{name}" for name in names), *names])
    assert naming is not None
    assert naming.ours.keys() == codes.keys()
    assert not naming.unknown


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="no dictionary of weights"):
        load(tmp_path / "model.pt", content)


def test_two_models_in_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"behind 'model\.' and 'module\.'"):
        load(tmp_path / "model.pt", behind("model.", weights()) | behind("module.", weights(1)))
    with pytest.raises(CheckpointError, match="twice, once behind a wrapper"):
        load(tmp_path / "model.pt", weights() | behind("_orig_mod.", weights(1)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(64, 32).to_sparse(), "no dense tensor"),
        (torch.zeros(64, 32, device="meta"), "no dense tensor"),
        (torch.zeros(64, 32, dtype=torch.complex64), "not floating point: output.weight torch.complex64"),
        (torch.zeros(64, 32, dtype=torch.bool), "not floating point: output.weight torch.bool"),
        (torch.zeros(()), r"output\.weight \[\] \(expected \[64, 32\]\)"),
        (torch.zeros(0, 32), "output.weight is empty"),
        (torch.zeros(1, 1).expand(64, 32), "the file stores fewer"),
        (torch.zeros(1, 1).expand(10**9, 10**9), "the file stores fewer"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.layout} {value.dtype} {list(value.shape)}",
)
def test_tensors_of_other_kinds_are_refused(tensor: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.pt", {**weights(), "output.weight": tensor})


def test_weights_may_be_views_and_carry_attributes(tmp_path: Path) -> None:
    state = weights()
    kept = state["output.weight"].clone()
    state["output.weight"] = kept.t().contiguous().t()
    # What a file hangs on a tensor must not stand for its methods.
    state["output.weight"].detach = 5  # type: ignore[assignment,method-assign]
    loaded = load(tmp_path / "model.pt", state)
    assert torch.equal(loaded.tensors["output.weight"], kept)


@pytest.mark.parametrize(
    "name",
    ["layers.999999999.x", "layers.-1.x", "layers.007.x", f"layers.{'9' * 5000}.x", "layers.٣.x", "layers.x"],
)
def test_a_number_in_a_name_does_not_size_the_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no layers\.2 although there is layers"):
        load(tmp_path / "model.pt", {**weights(), name: torch.zeros(2)})


def test_long_lists_of_tensors_are_cut(tmp_path: Path) -> None:
    state = weights() | {f"other.{number}": torch.zeros(1) for number in range(500)}
    with pytest.raises(CheckpointError, match="unexpected: 492 more") as caught:
        load(tmp_path / "model.pt", state)
    assert len(str(caught.value).splitlines()) == 1 + 8 + 1


def trained(side: int, patch: int | None = 16) -> argparse.Namespace:
    return argparse.Namespace(image_size=side, **({} if patch is None else {"downsample_size": patch}))


@pytest.mark.parametrize(
    "told",
    [
        {"args": trained(96)},
        {"args": vars(trained(96, None))},
        {"model": {**weights(), "freqs_cis": torch.zeros(1 + 36, TINY.head_dim // 2, 2)}},
    ],
    ids=["arguments", "a dictionary of arguments", "rotary angles"],
)
def test_the_grid_is_read_where_the_file_tells_it(told: dict[str, Any], tmp_path: Path) -> None:
    assert load(tmp_path / "model.pt", {"model": weights(), **told}, grid=None).config.grid == 6
    # A name is less than what a file holds; what is asked for is more, and said.
    loaded = load(tmp_path / "model_384.pt", {"model": weights(), **told}, grid=None)
    assert loaded.config.grid == 6
    assert "24 by the checkpoint's name" in loaded.remarks[-1]
    loaded = load(tmp_path / "model.pt", {"model": weights(), **told}, grid=8)
    assert loaded.config.grid == 8
    assert "taken to have 8 tokens, and has 6 by" in loaded.remarks[0]


def test_files_that_contradict_themselves_are_asked_about(tmp_path: Path) -> None:
    state = weights() | {"freqs_cis": torch.zeros(1 + 16, TINY.head_dim // 2, 2)}
    with pytest.raises(CheckpointError, match="say how many tokens it has with --grid"):
        load(tmp_path / "model.pt", {"model": state, "args": trained(96)}, grid=None)


def test_rotary_angles_tell_the_heads(tmp_path: Path) -> None:
    state = weights() | {"freqs_cis": torch.zeros(1 + 36, TINY.head_dim // 2, 2)}
    assert load(tmp_path / "model.pt", state, grid=None, heads=None).config == TINY


@pytest.mark.parametrize("value", [10**30, -96, "96", 0, 1.5])
def test_arguments_that_tell_nonsense_are_not_followed(value: object, tmp_path: Path) -> None:
    content = {"model": weights(), "args": argparse.Namespace(image_size=value)}
    with pytest.raises(CheckpointError, match=r"--grid|must be 1 to 512"):
        load(tmp_path / "model.pt", content, grid=None)


def test_buffers_of_another_rotary_embedding_are_refused(tmp_path: Path) -> None:
    """Frequencies follow from ``config.json``: where they do not, it is another model's."""

    def frequencies(base: float) -> Tensor:
        return torch.tensor([base ** (-2 * pair / 8) for pair in range(4)]).bfloat16()

    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_tiny_janus(tmp_path / "same", extra={name: frequencies(10000.0)})
    load_models(folder, None, ModelRequest())
    folder = write_tiny_janus(tmp_path / "other", extra={name: frequencies(500000.0)})
    with pytest.raises(CheckpointError, match="frequencies of another rotary embedding"):
        load_models(folder, None, ModelRequest())


def test_a_moving_average_of_the_image_decoder_is_a_choice(
    tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, averaged = (
        random_state(llamagen.LlamaGen(TINY)),
        {name: 2 * tensor for name, tensor in random_state(llamagen.LlamaGen(TINY)).items()},
    )
    model, decoder = tmp_path / "model.pt", tmp_path / "vq.pt"
    torch.save({"model": plain, "ema": averaged}, model)
    state = torch.load(tiny_files[1])["model"]
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"model": state, "ema": doubled}, decoder)
    name = "decoder.conv_out.weight"

    def loaded(**asked: Any) -> Tensor:
        _, image_decoder = load_models(model, decoder, ModelRequest(grid=6, heads=4, **asked))
        return image_decoder.tensors[name]

    assert torch.equal(loaded(), state[name])
    assert torch.equal(loaded(vq_ema=True), doubled[name])
    assert torch.equal(loaded(ema=True, vq_ema=True), doubled[name])
    assert torch.equal(loaded(ema=True, vq_ema=False), state[name])
    with pytest.raises(RequestError, match=r"--vq-ema .* or with --no-vq-ema"):
        loaded(ema=True)
    torch.save({"model": state}, decoder)
    assert torch.equal(loaded(ema=True), state[name])
    with pytest.raises(CheckpointError, match="no ema weights"):
        loaded(vq_ema=True)
    with pytest.raises(RequestError, match="leave --vq-ema out"):
        load_models(write_tiny_janus(tmp_path / "janus"), None, ModelRequest(vq_ema=True))


def test_a_text_encoder_may_hold_its_table_under_either_name(tmp_path: Path) -> None:
    own, shared = "encoder.embed_tokens.weight", "shared.weight"
    for names in ((shared,), (own,), (shared, own)):
        folder = write_tiny_t5(tmp_path / "+".join(names), tables=names)
        assert "embed_tokens.weight" in load_text_encoder(folder).tensors
    folder = write_tiny_t5(tmp_path / "different", tables=(shared, own), alike=False)
    with pytest.raises(CheckpointError, match="a T5 has one table"):
        load_text_encoder(folder)
