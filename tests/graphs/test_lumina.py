"""Lumina-mGPT against outputs of its code, and Chameleon of the transformers library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_folder import chameleon_names

from linert.graphs.families import lumina, vq
from linert.graphs.families.model_facts import ModelFacts
from linert.graphs.memory import memory_of
from tests.conftest import random_state
from tests.eager import Eager
from tests.golden_weights import golden_outputs, golden_state

FIRST, IMAGES, NEWLINE = 4, 8192, 8803
END_OF_IMAGE = 8196


def module(state: dict[str, torch.Tensor], config: lumina.LuminaConfig) -> lumina.Lumina:
    names, unknown = lumina.FAMILY.layouts[0].rename(state)
    assert not unknown
    net = lumina.Lumina(config)
    parameters = {ours: state[name] for name, ours in names.items()}
    net.load_state_dict(lumina.FAMILY.module_tensors(config, parameters))
    return net.requires_grad_(False)


def golden_model(prefix_len: int) -> lumina.Lumina:
    """Of 4 grids of height and 3 of width."""
    config = lumina.LuminaConfig(
        *(3, 64, 4, 4, 176, IMAGES, FIRST, NEWLINE, 8960, prefix_len), rows=8, columns=6
    )
    return module(golden_state("lumina"), config)


def conditions(prompt: list[int], prefix_len: int, pad: int = 61) -> list[torch.Tensor]:
    """One prompt, padded with rubbish, and no negative one."""
    tokens = torch.full((1, prefix_len), pad)
    tokens[0, prefix_len - len(prompt) :] = torch.tensor(prompt)
    starts = torch.tensor([prefix_len - len(prompt)])
    return [tokens, starts, torch.zeros_like(tokens), torch.full_like(starts, -1)]


def ours(ids: torch.Tensor) -> torch.Tensor:
    """Published ids as our tokens."""
    return torch.where(ids == NEWLINE, IMAGES, ids - FIRST)


@pytest.mark.parametrize("prefix_len", [10, 14])
def test_teacher_forced_logits_equal_the_published_codes(prefix_len: int) -> None:
    golden = golden_outputs("greedy_cfg4", "lumina")
    net = golden_model(prefix_len)
    tokens = ours(torch.from_numpy(golden["tokens"]).long()[:-1])
    condition = net.condition(conditions(golden["prompt_ids"].tolist(), prefix_len), guided=True)
    assert condition.starts.tolist() == [prefix_len - 10, prefix_len - 3]
    logits = net(condition, tokens[None, :-1].repeat(2, 1))[:, :, torch.from_numpy(golden["columns"])]
    for row, name in enumerate(("conditional", "unconditional")):
        wanted = torch.from_numpy(golden[name])[: len(tokens)]
        torch.testing.assert_close(logits[row], wanted, atol=2e-4, rtol=0)


def test_greedy_tokens_through_the_stages_equal_the_published_codes() -> None:
    golden = golden_outputs("greedy_cfg4", "lumina")
    net = golden_model(14)
    config = net.config
    slots = (config.prefix_len + config.image_tokens,) * config.layers
    memory = memory_of(config, images=1, guided=True, capacities=slots)
    prompt = golden["prompt_ids"].tolist()
    drawn = Eager(net, memory, "full", conditions(prompt, 14), guidance=4.0, greedy=1).draw()
    wanted = torch.from_numpy(golden["tokens"]).long()
    assert wanted[-1] == END_OF_IMAGE
    assert torch.equal(drawn[0], ours(wanted[:-1]))


SMALL = lumina.LuminaConfig(2, 32, 4, 2, 48, 40, 4, 50, 64, 6, rows=2, columns=2)


def chameleon(kv_heads: int, *, swin_norm: bool, vocab_size: int = 64) -> Any:
    """A tiny random Chameleon of the transformers library."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ChameleonConfig(
        vocab_size=vocab_size,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        num_key_value_heads=kv_heads,
        vocabulary_map={"<image>": 60},
        vq_config={
            **{"embed_dim": 32, "num_embeddings": 64, "latent_channels": 32, "base_channels": 32},
            **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 32},
        },
        swin_norm=swin_norm,
    )
    torch.manual_seed(1)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vqmodel" not in name:
                scale = 0.2 if "_norm" in name or parameter.ndim == 1 else 2 * parameter[0].numel() ** -0.5
                parameter.copy_(
                    scale * torch.randn_like(parameter) + float("norm" in name and "bias" not in name)
                )
    return model


@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_equal_transformers(kv_heads: int, swin_norm: bool) -> None:
    model = chameleon(kv_heads, swin_norm=swin_norm)
    config = replace(SMALL, kv_heads=kv_heads, swin_norm=swin_norm, prefix_len=9)
    net = module(model.state_dict(), config)
    prompt = [0, 30, 31, 32, 55, 56, 57]
    tokens = torch.tensor([[3, 9, 40, 39, 0]])
    ids = torch.where(tokens == 40, 50, tokens + 4)
    logits = net(net.condition(conditions(prompt, 9), guided=True), tokens.repeat(2, 1))
    for row, prefix in enumerate((prompt, prompt[-3:])):
        # The library's own forward masks image tokens' logits.
        whole = torch.cat([torch.tensor([prefix]), ids], dim=1)
        with torch.no_grad():
            hidden = model.model(input_ids=whole).last_hidden_state
            wanted = model.lm_head(hidden)[0, len(prefix) - 1 :, 4:44].float()
        torch.testing.assert_close(logits[row], wanted, atol=2e-5, rtol=0)


def test_norms_of_a_split_model_are_shared_by_its_parts() -> None:
    """Published files have a row of norms for each device that the model was trained on."""
    model = chameleon(2, swin_norm=True)
    state = dict(model.state_dict())
    config = replace(SMALL, kv_heads=2, swin_norm=True)
    for name, tensor in state.items():
        if ".q_norm." in name:
            state[name] = tensor[::2].clone()
    whole = {n: t.repeat_interleave(2, 0) if ".q_norm." in n else t for n, t in state.items()}
    one, other = module(state, config).state_dict(), module(whole, config).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="4 heads cannot share"):
        module({**state, "model.layers.0.self_attn.q_norm.weight": torch.zeros(3, 8)}, config)


def obeys_the_grammar(ids: list[int], rows: int, columns: int) -> bool:
    """The published constraint on what follows the tokens of begin, height and width."""
    for k, number in enumerate(ids):
        if k + 1 == (columns + 1) * rows + 1:
            wanted = number == END_OF_IMAGE
        elif (k + 1) % (columns + 1) == 0:
            wanted = number == NEWLINE
        else:
            wanted = FIRST <= number < FIRST + IMAGES
        if not wanted:
            return False
    return len(ids) == (columns + 1) * rows + 1


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 99), greedy=st.booleans())
def test_lines_end_in_newlines_and_nowhere_else(rows: int, columns: int, seed: int, greedy: bool) -> None:
    if rows * (columns + 1) < 2:
        return
    config = replace(SMALL, rows=rows, columns=columns)
    net = lumina.Lumina(config)
    net.load_state_dict(random_state(net, seed))
    slots = (config.prefix_len + config.image_tokens,) * config.layers
    memory = memory_of(config, images=1, guided=True, capacities=slots)
    with torch.no_grad():
        drawn = Eager(net, memory, "full", conditions([0, 1, 2, 3], 6), greedy=int(greedy)).draw()[0]
    ids = [NEWLINE if token == config.newline_token else token + FIRST for token in drawn.tolist()]
    assert obeys_the_grammar([*ids, END_OF_IMAGE], rows, columns)
    assert max(token for token in drawn.tolist() if token != config.newline_token) < config.vocab_size


@given(side=st.sampled_from([256, 512, 768, 1024]))
def test_sizes_on_offer(side: int) -> None:
    sizes = lumina.sizes(side)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 32 == height % 32 == 0
        assert width * height <= side * side
        assert max(width, height) <= 4 * min(width, height)
        assert (height, width) in sizes
        # The larger of two images of the same width that fit is on offer as well.
        assert any(w == width and w * (h + 32) > side * side for w, h in sizes)


VOCABULARY = {
    **{"<s>": 0, "<racm3:break>": 5, "<reserved08706>": 6, "<reserved08799>": 7},
    **{"IMGIMGBAZ": 8, "IMGIMGAZ": 9, "IMGIMGCZ": 10},
    **{lumina.size_token(units): 20 + units for units in range(1, 33)},
}


def configured(**changed: Any) -> lumina.LuminaConfig:
    shapes = {
        "embed_tokens.weight": (64, 32),
        "layers.0.self_attn.k_proj.weight": (16, 32),
        "layers.0.mlp.gate_proj.weight": (48, 32),
        "layers.1.mlp.gate_proj.weight": (48, 32),
    }
    usual = ModelFacts(
        shapes=shapes, settings={"num_attention_heads": 4}, processing={}, vocabulary=VOCABULARY, side=512
    )
    return lumina.FAMILY.configure(replace(usual, **changed))


def test_the_configuration_is_read() -> None:
    assert (configured(size=(128, 96)).rows, configured().columns) == (6, 32)
    config = configured(size=(768, 320), prefix_len=20)
    assert (config.rows, config.columns, config.line_width) == (20, 48, 49)
    assert (config.kv_heads, config.vocab_size, config.first_image_token, config.newline_id) == (2, 3, 8, 7)
    assert configured(settings={"num_attention_heads": 8, "swin_norm": True}).swin_norm
    known = ModelFacts(shapes={}, vocabulary=VOCABULARY)
    assert lumina.FAMILY.code_order(known) == [10, 0, 2]
    prompts = lumina.FAMILY.prompt_format(config, known)
    assert prompts.first == (0,)
    assert prompts.last == (6, 5, 20 + 10, 20 + 24)
    assert "768x320" in prompts.template


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": (768, 64)}, "no images of 768x64 are on offer: .* trained on .*, 512x512, "),
        ({"size": (500, 512)}, "no images of 500x512 are on offer"),
        ({"size": (544, 512)}, "of 512x512 pixels in all at most"),
        ({"side": None}, "give it with --size"),
        ({"side": None, "size": (100, 96)}, "multiples of 32"),
        ({"side": None, "size": (512, 96)}, "by a factor of 4 at most"),
        ({"vocabulary": {}}, "no vocabulary map"),
        ({"vocabulary": {**VOCABULARY, "IMGIMGDZ": 40}}, "no vocabulary map"),
        (
            {"vocabulary": {k: v for k, v in VOCABULARY.items() if "8799" not in k}},
            "no special token <reserved08799>",
        ),
        ({"settings": {}}, "--heads"),
        (
            {"settings": {"num_attention_heads": 4, "max_position_embeddings": 999}},
            "more than the 999 positions",
        ),
        ({"settings": {"num_attention_heads": 5}}, "do not divide"),
    ],
)
def test_what_is_not_known_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(**changed)


def test_chameleons_image_tokenizer_is_read_in_its_order() -> None:
    """``up.i`` counts from the highest resolution, there is no attention on the way, and codes are not normalised."""
    config = vq.VQConfig(16, 32, 32, (96, 64, 32), res_blocks=2, attention=(), unit_codes=False)
    net = vq.VQModel(config, encoder=True)
    net.load_state_dict(random_state(net))
    theirs = chameleon_names(net.state_dict())
    naming = vq.naming(theirs)
    assert naming is not None
    assert not naming.unknown
    tensors = {ours_: theirs[name] for name, ours_ in naming.ours.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert vq.infer_config(shapes, unit_codes=naming.unit_codes) == config
    kept = {n: t for n, t in net.state_dict().items() if not n.startswith(vq.ENCODER_PREFIXES)}
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_published_sizes_have_the_published_counts() -> None:
    config = lumina.LuminaConfig(
        32, 4096, 32, 32, 11008, IMAGES, FIRST, NEWLINE, 65536, 128, rows=48, columns=48
    )
    total = sum(torch.Size(shape).numel() for shape in config.tensor_shapes().values())
    # Of the head 8,192 rows are left, and the embedding of images stands beside that of all tokens. Published files have one row
    # of norms for all heads.
    text, images = 65536 * 4096, 8192 * 4096
    norms = 32 * 4 * (32 - 1) * 128
    assert total == 7_013_158_912 - text + images + (images + 4096) + norms
