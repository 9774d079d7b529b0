"""Janus against the transformers library, in its layout and in the published one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from linert.graphs.families import janus
from linert.graphs.memory import memory_of
from tests.eager import Eager

transformers = pytest.importorskip("transformers")

BOS, BOI, PAD = 3, 5, 6
TEXT, CODES, CAPACITY = 64, 48, 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PROMPTS = ([BOS, 20, 21, 22, 23, 24, BOI], [BOS, 30, 31, BOI])


def published(kv_heads: int, vocabulary: int = TEXT, grid: int = 3) -> Any:
    """A tiny ``JanusForConditionalGeneration`` with random weights, biases included."""
    config = transformers.JanusConfig(
        text_config={
            **SIZES,
            "model_type": "llama",
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
        },
        vision_config={
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 2 * grid},
            **{"num_image_tokens": grid * grid, "patch_size": 2, "projection_dim": 32, "depth": 2},
        },
        vq_config={
            **{"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32},
            **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32},
            **{"image_token_embed_dim": 32, "num_hidden_layers": 2, "num_patches": grid},
        },
    )
    torch.manual_seed(0)
    model = transformers.JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "embed" in name else parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn_like(parameter) + ("norm" in name and parameter.ndim == 1))
    return model


def ours(model: Any, kv_heads: int, grid: int = 3) -> janus.Janus:
    config = janus.JanusConfig(
        *(SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["num_attention_heads"], kv_heads),
        *(SIZES["intermediate_size"], CODES, TEXT, CAPACITY, BOS, BOI, PAD),
        grid=grid,
    )
    module = janus.Janus(config)
    module.load_state_dict(tensors_of(model.state_dict(), config))
    return module.requires_grad_(False)


def tensors_of(state: dict[str, torch.Tensor], config: janus.JanusConfig) -> dict[str, torch.Tensor]:
    """The module's parameters of a checkpoint in either layout."""
    [layout] = [layout for layout in janus.FAMILY.layouts if layout.landmark in state]
    names, unknown = layout.rename(state)
    assert not unknown
    return janus.FAMILY.module_tensors(config, {ours: state[name] for name, ours in names.items()})


def padded() -> list[torch.Tensor]:
    """The prompts in our capacity, with rubbish as padding, and no negative prompts."""
    tokens = torch.full((len(PROMPTS), CAPACITY), TEXT - 1)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, CAPACITY - len(prompt) :] = torch.tensor(prompt)
    starts = torch.tensor([CAPACITY - len(prompt) for prompt in PROMPTS])
    return [tokens, starts, tokens.flip(0), torch.full_like(starts, -1)]


@torch.no_grad()
def their_logits(model: Any, prompt: list[int], tokens: torch.Tensor, *, unconditional: bool) -> torch.Tensor:
    """``[n + 1, V]`` for image ``tokens [n]`` after one prompt, alone and without padding."""
    inner = model.model
    ids = [token if token in (BOS, BOI) or not unconditional else PAD for token in prompt]
    text = inner.language_model.embed_tokens(torch.tensor([ids]))
    image = inner.generation_aligner(inner.generation_embeddings(tokens[None]))
    hidden = inner.language_model(inputs_embeds=torch.cat([text, image], dim=1)).last_hidden_state
    return inner.generation_head(hidden[0, len(prompt) - 1 :]).float()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_teacher_forced_logits(kv_heads: int) -> None:
    model = published(kv_heads)
    net = ours(model, kv_heads)
    tokens = torch.randint(CODES, (2, 8), generator=torch.Generator().manual_seed(1))
    logits = net(net.condition(padded(), guided=True), tokens.repeat(2, 1))
    for row in range(4):
        image = row % 2
        wanted = their_logits(model, PROMPTS[image], tokens[image], unconditional=row >= 2)
        torch.testing.assert_close(logits[row], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_tokens_through_the_stages(kv_heads: int) -> None:
    model = published(kv_heads)
    net = ours(model, kv_heads)
    config = net.config
    slots = (config.prefix_len + config.image_tokens,) * config.layers
    memory = memory_of(config, images=2, guided=True, capacities=slots)
    tokens = Eager(net, memory, "full", padded(), guidance=5.0, greedy=1).draw()
    for image, prompt in enumerate(PROMPTS):
        drawn: list[int] = []
        for _ in range(config.image_tokens):
            so_far = torch.tensor(drawn, dtype=torch.int64)
            conditional, unconditional = (
                their_logits(model, prompt, so_far, unconditional=flag)[-1] for flag in (False, True)
            )
            drawn.append(int((unconditional + 5.0 * (conditional - unconditional)).argmax()))
        assert tokens[image].tolist() == drawn


def test_both_layouts_are_the_same_module() -> None:
    model = published(2)
    state, config = model.state_dict(), ours(model, 2).config
    one, other = tensors_of(state, config), tensors_of(original(state), config)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers' tensors under deepseek-ai's names, those of the image decoder too."""
    names, _ = janus.TRANSFORMERS.rename(state)
    renamed = {original_name(mine): state[name] for name, mine in names.items()}
    for name, tensor in state.items():
        if name.startswith("model.vqmodel."):
            inner = name.removeprefix("model.vqmodel.")
            inner = re.sub(r"decoder\.up\.(\d+)\.block", r"decoder.conv_blocks.\1.res", inner)
            inner = re.sub(r"decoder\.up\.", "decoder.conv_blocks.", inner)
            for theirs, mine in (("block_1", "0"), ("attn_1", "1"), ("block_2", "2")):
                inner = inner.replace(f"decoder.mid.{theirs}", f"decoder.mid.{mine}")
            renamed[f"gen_vision_model.{inner}"] = tensor
    renamed["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    renamed["language_model.lm_head.weight"] = state["lm_head.weight"]
    return renamed


def original_name(mine: str) -> str:
    """Ours as deepseek-ai's files have it."""
    fixed = {
        "text_embedding.weight": "language_model.model.embed_tokens.weight",
        "gen_embed.weight": "gen_embed.weight",
    }
    for part, name in (
        ("gen_aligner.0", "gen_aligner.layers.0"),
        ("gen_aligner.1", "gen_aligner.layers.2"),
        ("head.proj", "gen_head.output_mlp_projector"),
        ("head.vision_head", "gen_head.vision_head"),
    ):
        if mine.startswith(part + "."):
            return name + mine.removeprefix(part)
    return fixed.get(mine, f"language_model.model.{mine}")


def test_published_sizes_have_the_published_counts() -> None:
    for layers, dim, heads, ffn_dim, counted in (
        (24, 2048, 16, 5632, 1_652_656_128 - 102400 * 2048 + 131_072 + 4_214_784 + 37_767_168),
        (30, 4096, 32, 11008, 6_910_365_696 - 102400 * 4096 + 131_072 + 16_818_176 + 83_906_560),
    ):
        config = janus.JanusConfig(
            layers, dim, heads, heads, ffn_dim, 16384, 102400, 64, 100000, 100016, 100015
        )
        total = sum(torch.Size(shape).numel() for shape in config.tensor_shapes().values())
        # The folded table stands for the embedding of 8 numbers and the two layers behind it; the head of text is dropped.
        folded = 16384 * dim - (16384 * 8 + 8 * dim + dim + dim * dim + dim)
        assert total == counted + folded
        assert config.head_dim == 128
