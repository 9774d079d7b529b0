"""What is said of a model fits its family, and what its files say of it is read, with types and bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from linert.exporter.commands.export import command
from linert.exporter.lasadgen_folder import write_lasadgen
from linert.exporter.model_options import FLAGS, takers
from linert.exporter.models import LoadedTransformer, ModelRequest, load_models, load_text_encoder
from linert.graphs.families import FAMILIES
from linert.graphs.families.lasadgen import LASADGen, LASADGenConfig, Variant
from linert.graphs.families.model_facts import ModelOption
from linert.runtime.errors import CheckpointError
from tests.conftest import ROOT, TINY_VQ, Result, random_state
from tests.text_models import write_lumina, write_tiny_janus, write_tiny_t5

Linert = Callable[..., Result]
VALUES: Mapping[ModelOption, object] = {
    ModelOption.GRID: 6,
    ModelOption.HEADS: 4,
    ModelOption.SIZE: "512x512",
    ModelOption.PROMPT_TOKENS: 64,
    ModelOption.TOKENIZER: "tokenizer.json",
    ModelOption.TEMPLATE: "{prompt}",
    ModelOption.TEXT_ENCODER: "t5",
}


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_files: tuple[Path, Path], lpd_file: Path
) -> dict[str, Any]:
    """What to export of every family."""
    root = tmp_path_factory.mktemp("families")
    net = LASADGen(LASADGenConfig(2, 32, 4, 64, TINY_VQ.codebook_size, 5, 6, Variant.MANHATTAN, gate_rank=8))
    net.load_state_dict(random_state(net))
    write_lasadgen(net.state_dict(), net.config, root / "lasadgen")
    lumina, vqgan = write_lumina(root / "lumina")
    vq = tiny_files[1]
    return {
        "llamagen": (tiny_files[0], "--vq", vq),
        "lasadgen": (root / "lasadgen", "--vq", vq),
        "janus": (write_tiny_janus(root / "janus"),),
        "lumina": (lumina, "--vq", vqgan),
        "lpd": (lpd_file, "--vq", vq),
    }


@pytest.mark.parametrize("option", ModelOption)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_option_is_taken_or_refused(
    family: str, option: ModelOption, checkpoints: dict[str, Any], linert: Linert, tmp_path: Path
) -> None:
    if option in FAMILIES[family].takes:
        assert FAMILIES[family].title in takers(option)
        return
    out = tmp_path / "bundle"
    result = linert("export", *checkpoints[family], FLAGS[option], VALUES[option], "--out", out)
    assert result.code == 2
    told = " ".join(result.err.split())
    wanted = f"is {FAMILIES[family].a_title}, which takes no {FLAGS[option]} (for {takers(option)}): leave that out"
    assert wanted in told
    assert not out.exists()


def test_the_help_says_whose_an_option_is() -> None:
    helps = {option: parameter.help for parameter in command.params for option in parameter.opts}  # type: ignore[attr-defined]
    for option, flag in FLAGS.items():
        assert str(helps[flag]).startswith(f"{takers(option)}: ")


def test_the_guide_says_whose_an_option_is() -> None:
    text = (ROOT / "docs" / "guides" / "llamagen.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| ([^|]+?) \|", text, flags=re.MULTILINE))
    for option, flag in FLAGS.items():
        assert rows[flag] == takers(option), flag


def janus(folder: Path, settings: Mapping[str, Any], **asked: Any) -> LoadedTransformer:
    transformer, _ = load_models(write_tiny_janus(folder, settings), None, ModelRequest(**asked))
    return transformer


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({}, 24),
        ({"vision_config": {"image_size": 8}}, 4),
        ({"vision_config": {"params": {"image_size": 16}}}, 8),
        ({"vision_config": {"num_image_tokens": 25}}, 5),
        ({"vq_config": {"num_patches": 6}}, 6),
        ({"vision_config": {"num_image_tokens": 36, "image_size": 12}, "vq_config": {"num_patches": 6}}, 6),
    ],
)
def test_janus_draws_what_its_files_say(settings: dict[str, Any], grid: int, tmp_path: Path) -> None:
    assert janus(tmp_path / "janus", settings).config.grid == grid


def test_what_files_say_is_not_contradicted(tmp_path: Path) -> None:
    told = {"vision_config": {"image_size": 8}}
    assert janus(tmp_path / "same", told, grid=4).config.grid == 4
    with pytest.raises(CheckpointError, match=r"4 by vision_config\.image_size tokens, and --grid 5"):
        janus(tmp_path / "other", told, grid=5)
    both = {"vision_config": {"image_size": 8, "num_image_tokens": 25}}
    with pytest.raises(CheckpointError, match="say which with --grid"):
        janus(tmp_path / "both", both)
    assert janus(tmp_path / "said", both, grid=5).config.grid == 5
    with pytest.raises(CheckpointError, match="tells 4 attention heads, and --heads 8"):
        janus(tmp_path / "heads", told, heads=8)


NUMBERS = (-1, 10**30, 10**400, "4", True, [4], 4.5, float("nan"), float("inf"))


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "key",
    ["num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "max_position_embeddings"],
)
def test_whole_numbers_are_bounded(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .*, must be a whole number from 1 to"):
        janus(tmp_path / "janus", {"language_config": {"num_attention_heads": 4, key: value}})


@pytest.mark.parametrize("value", [-1, 10**400, "1", True, [1], float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_numbers_are_bounded(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .*, must be a number from"):
        janus(tmp_path / "janus", {"language_config": {"num_attention_heads": 4, key: value}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language_config": "x"}, "language_config is 'x', must be an object"),
        ({"vision_config": [1]}, r"vision_config is \[1\], must be an object"),
        ({"vision_config": {"num_image_tokens": 17}}, "must be the tokens of a square"),
        ({"vision_config": {"image_size": 9}}, "image_size is 9, must be a multiple of the 2 pixels"),
        ({"vq_config": {"num_patches": 10**12}}, "must be a whole number from 1 to 512"),
        ({"language_config": {"num_attention_heads": 5}}, "do not divide a width of 32"),
        ({"language_config": {"num_attention_heads": 4, "head_dim": 16}}, "head_dim is 16, must be 8"),
        (
            {"language_config": {"num_attention_heads": 4, "rope_scaling": {"type": "linear", "factor": 2}}},
            "no scaled rotary embedding is built",
        ),
        (
            {"language_config": {"num_attention_heads": 4, "rope_parameters": {"rope_type": "llama3"}}},
            "no scaled rotary embedding is built",
        ),
        (
            {
                "language_config": {
                    "num_attention_heads": 4,
                    "rope_theta": 500000,
                    "rope_parameters": {"rope_theta": 10000},
                }
            },
            "rope_theta is 500000, must be 10000, as in rope_parameters",
        ),
        (
            {"language_config": {"num_attention_heads": 4, "hidden_act": "gelu"}},
            "no other activation is built",
        ),
        (
            {"language_config": {"num_attention_heads": 4, "max_position_embeddings": 600}},
            "more than the 600 positions that the model was made for",
        ),
    ],
)
def test_settings_that_are_not_built_or_contradict_the_tensors_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        janus(tmp_path / "janus", settings)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bos_token", 3, "bos_token is 3, must be a token's name"),
        ("pad_token", {"content": []}, r"pad_token is .*, must be a token's name"),
        ("bos_token", "<absent>", None),
        ("bos_token", {"special": True}, None),
    ],
)
def test_names_of_special_tokens_are_names(
    key: str, value: object, message: str | None, tmp_path: Path
) -> None:
    folder = write_tiny_janus(tmp_path / "janus")
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value}))
    if message is None:
        load_models(folder, None, ModelRequest())
        return
    with pytest.raises(CheckpointError, match=message):
        load_models(folder, None, ModelRequest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_map": [1]}, r"vocabulary_map is \[1\], must be an object"),
        ({"vocabulary_map": {"IMGIMGAZ": "x"}}, "IMGIMGAZ is 'x', must be a whole number"),
        ({"vocabulary_map": {"IMGIMGAZ": None}}, "IMGIMGAZ is None, must be a whole number"),
        ({"vocabulary_map": {"IMGIMGAZ": -1}}, "IMGIMGAZ is -1, must be a whole number"),
        (
            {"vocabulary_map": {"IMGIMGAZ": 3}},
            "numbers 'IMGIMGAZ' 3 in its vocabulary_map, and .* numbers it",
        ),
        ({"swin_norm": "no"}, "swin_norm is 'no', must be true or false"),
    ],
)
def test_settings_of_lumina_are_held_to_its_tokenizer(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, vqgan = write_lumina(tmp_path / "tiny")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_models(folder, vqgan, ModelRequest(size=(64, 64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x', must be a number from 0 to 1"),
        ({"relative_attention_max_distance": 2}, "must be a whole number from 3"),
        ({"relative_attention_max_distance": 10**30}, "must be a whole number from 3"),
        ({"feed_forward_proj": "relu"}, "must be gated-gelu"),
    ],
)
def test_settings_of_a_text_encoder_are_bounded(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(write_tiny_t5(tmp_path / "t5", settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grid", 0), "grid is 0, must be at least 1"),
        (("--grid", 10**9), "must be 1 to 512 of each"),
        (("--heads", 0), "heads is 0, must be at least 1"),
        (("--heads", -4), "heads is -4, must be at least 1"),
        (("--batch", 10**12), "must be 1 to 4096"),
        (("--block-size", 2**200, "--precision", "int4"), "must be a power of two from 16 to 65536"),
        (("--calibration-images", 0, "--precision", "int8"), "0 is not in the range"),
        (("--calibration-images", 3), "nothing is calibrated for fp32"),
        (("--calibration-prompts", "x.txt"), "nothing is calibrated for fp32"),
        (("--top-k", 10**30), "is not in the range"),
        (("--guidance-interval", 10**30), "is not in the range"),
        (("--recent-lines", "nan"), "--recent-lines nan: give a number of lines"),
        (("--recent-lines", "inf"), "--recent-lines inf: give a number of lines"),
        (("--recent-lines", "1e300"), "give a number of lines"),
        (("--anchor-tokens", 10**30), "is not in the range"),
        (("--budget-lines", "1e999999999"), "is neither a number of lines nor a fraction"),
        (("--budget-lines", "9" * 5000), "is neither a number of lines nor a fraction"),
        (("--budget-lines", "1/0"), "is neither a number of lines nor a fraction"),
        (("--layer-budgets", "9" * 5000), "or one number of lines a layer"),
        (("--layer-budgets", "nan,1"), "or one number of lines a layer"),
        (("--keep", "9" * 5000 + "=fp16"), "say PART=PRECISION"),
        (("--policy", ""), "no policy"),
        (("--size", ""), "is no size like 768x512"),
        (("--size", "9" * 5000 + "x64"), "is no size like 768x512"),
        (("--no-vq-ema", "--vq-ema"), "holds no ema weights"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_options_that_cannot_be_meant_are_refused_in_a_sentence(
    options: tuple[object, ...], message: str, tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    sizes = {"--grid": 6, "--heads": 4}
    usual = [part for flag, value in sizes.items() if flag not in options for part in (flag, value)]
    files = (tiny_files[0], "--vq", tiny_files[1])
    result = linert("export", *files, *usual, *options, "--out", tmp_path / "bundle")
    assert result.code == 2
    told = " ".join(result.err.split())
    assert message in told
    assert len(told) < 2000
    assert not (tmp_path / "bundle").exists()
