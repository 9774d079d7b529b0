"""The LlamaGen module against outputs of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linert.graphs.families import llamagen, vq
from linert.graphs.history import HistoryModel
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES, LineEndParams
from linert.runtime.drawing.generator import picture
from tests.eager import Eager
from tests.golden_weights import golden_outputs, golden_state

# Published parameter counts, counted by instantiating the published code (class-conditional, 16384 tokens).
PUBLISHED = {
    "B": (12, 768, 2048, 12, 110_888_448),
    "L": (24, 1024, 2816, 16, 342_910_976),
    "XL": (36, 1280, 3584, 20, 774_699_520),
    "XXL": (48, 1536, 4096, 24, 1_410_972_672),
    "3B": (24, 3200, 8704, 32, 3_096_659_200),
}


def golden_model(name: str = "c2i") -> llamagen.LlamaGen:
    state = golden_state(name)
    config = llamagen.infer_config({k: tuple(v.shape) for k, v in state.items()}, grid=8, heads=2)
    model = llamagen.LlamaGen(config)
    model.load_state_dict(state)
    return model.requires_grad_(False)


@pytest.mark.parametrize("run", ["greedy_cfg1", "greedy_cfg4", "greedy_cfg4_interval", "sample_topk"])
def test_teacher_forced_logits_equal_the_published_codes(run: str) -> None:
    golden = golden_outputs(run)
    model = golden_model()
    classes, tokens = torch.from_numpy(golden["classes"]), torch.from_numpy(golden["tokens"]).long()
    guided = run != "greedy_cfg1"
    condition = model.condition([classes], guided=guided)
    logits = model(condition, tokens.repeat(1 + guided, 1)[:, :-1]).transpose(0, 1)
    # The bar for fp32 is 2e-4; another order of summation costs about 1e-5 here.
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=2e-4, rtol=0)


def golden_captions() -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """What the published text-conditional code drew, and from which captions; they are padded on the left."""
    golden = golden_outputs("t2i_greedy_cfg7.5")
    mask = golden["emb_mask"]
    assert (np.diff(mask, axis=1) >= 0).all()
    starts = torch.from_numpy((mask == 0).sum(1))
    assert len(set(starts.tolist())) == 2
    # The published sampler zeroes the padding.
    return golden, [torch.from_numpy(golden["caption_emb"] * mask[:, :, None].astype(np.float32)), starts]


def with_no_negatives(captions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Guided inputs of the prefill that leave the unconditional caption to the model."""
    features, starts = captions
    return [features, starts, torch.zeros_like(features), torch.full_like(starts, -1)]


def test_a_negative_caption_takes_the_place_of_the_learned_one() -> None:
    _, (captions, starts) = golden_captions()
    model = golden_model("t2i")
    condition = model.condition([captions, starts, captions.flip(0), starts.flip(0)], guided=True)
    torch.testing.assert_close(condition.embeddings[2:], condition.embeddings[:2].flip(0))
    assert condition.starts.tolist() == [*starts.tolist(), *starts.flip(0).tolist()]


def test_captions_teacher_forced_logits_equal_the_published_codes() -> None:
    golden, captions = golden_captions()
    model = golden_model("t2i")
    tokens = torch.from_numpy(golden["tokens"]).long()
    condition = model.condition(with_no_negatives(captions), guided=True)
    logits = model(condition, tokens.repeat(2, 1)[:, :-1]).transpose(0, 1)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=2e-4, rtol=0)


def test_padding_changes_nothing() -> None:
    golden, (captions, starts) = golden_captions()
    model = golden_model("t2i")
    tokens = torch.from_numpy(golden["tokens"]).long()[:, :20]
    padded = model(model.condition([captions, starts], guided=False), tokens)
    noise = torch.randn(captions.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.where(torch.arange(captions.shape[1])[:, None] < starts[:, None, None], noise, captions)
    torch.testing.assert_close(model(model.condition([noisy, starts], guided=False), tokens), padded)


@pytest.mark.parametrize("lines", [8, 3])
def test_captions_through_the_stages(lines: int) -> None:
    """With all lines the published tokens are drawn; with fewer the line buffer equals a masked history."""
    golden, captions = golden_captions()
    model = golden_model("t2i")
    config = model.config
    slots = (config.prefix_len + lines * config.line_width,) * config.layers
    memory = memory_of(config, images=2, guided=True, capacities=slots)
    policy = "full" if lines == config.lines else "linear"
    eager = Eager(model, memory, policy, with_no_negatives(captions), guidance=7.5, greedy=1)
    tensors = eager.tensors
    params = LineEndParams(*(tensors[name] for name in LineEndParams._fields))
    history = HistoryModel(model, memory.geometry, POLICIES[policy](), params)
    eager.begin()
    torch.testing.assert_close(
        history.begin(with_no_negatives(captions)), tensors["logits"], atol=2e-5, rtol=0
    )
    for index in range(config.image_tokens - 1):
        fed = tensors["token"]
        eager.run("decode")
        torch.testing.assert_close(history.feed(fed[:, None])[:, 0], tensors["logits"], atol=5e-5, rtol=0)
        torch.testing.assert_close(history.scores[0], tensors["scores.0"], atol=2e-5, rtol=0)
        if index % config.line_width == config.line_width - 1:
            eager.run("line_end")
            assert torch.equal(history.end_line().sort(-1).values, tensors["write_slots"].sort(-1).values)
    same = tensors["tokens"].numpy() == golden["tokens"]
    assert same.all() == (lines == config.lines)


def test_vq_decoder_equals_the_published_codes() -> None:
    golden = golden_outputs("vq16")
    state = golden_state("vq16")
    config = vq.infer_config({k: tuple(v.shape) for k, v in state.items()})
    model = vq.VQModel(config, encoder=True)
    del state["quantize.codebook_used"]
    model.load_state_dict(state)
    with torch.no_grad():
        image = model.decode(torch.from_numpy(golden["codes"]).reshape(-1, 8, 8))
    torch.testing.assert_close(image, torch.from_numpy(golden["image"]), atol=2e-5, rtol=0)


def test_pictures_are_rounded_like_save_image() -> None:
    golden = golden_outputs("vq16")
    for pixels, levels in zip(golden["image"], golden["u8_save_image"], strict=True):
        assert (torch.from_numpy(levels.copy()).numpy() == picture(pixels)).all()


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_inferred_from_shapes(size: str) -> None:
    layers, dim, ffn_dim, heads, parameters = PUBLISHED[size]
    config = llamagen.LlamaGenConfig(layers, dim, heads, ffn_dim, 16384, 1000, grid=24)
    shapes = config.tensor_shapes()
    assert llamagen.infer_config(shapes, grid=24, heads=None) == config
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == parameters


def test_unpublished_size_needs_the_head_count() -> None:
    shapes = llamagen.LlamaGenConfig(2, 64, 4, 128, 32, 3, grid=4).tensor_shapes()
    with pytest.raises(ValueError, match="--heads"):
        llamagen.infer_config(shapes, grid=4, heads=None)
    assert llamagen.infer_config(shapes, grid=4, heads=4).head_dim == 16


@pytest.mark.parametrize(("patch", "channels"), [(16, (512, 256, 256, 128, 128)), (8, (512, 256, 256, 128))])
def test_published_tokenizers_are_inferred_from_shapes(patch: int, channels: tuple[int, ...]) -> None:
    config = vq.VQConfig(16384, 8, 256, channels)
    shapes = config.tensor_shapes(encoder=True)
    assert vq.infer_config(shapes) == config
    assert config.patch == patch
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == {16: 71_883_403, 8: 70_109_835}[patch]
