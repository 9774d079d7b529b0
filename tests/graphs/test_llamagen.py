"""The LlamaGen module against outputs of the published code."""

from __future__ import annotations

import pytest
import torch

from graphs.families import llamagen, vq
from runtime.generator import picture
from tests.golden_weights import golden_outputs, golden_state

# Published parameter counts, counted by instantiating the published code (class-conditional, 16384 tokens).
PUBLISHED = {
    "B": (12, 768, 2048, 12, 110_888_448),
    "L": (24, 1024, 2816, 16, 342_910_976),
    "XL": (36, 1280, 3584, 20, 774_699_520),
    "XXL": (48, 1536, 4096, 24, 1_410_972_672),
    "3B": (24, 3200, 8704, 32, 3_096_659_200),
}


def golden_model() -> llamagen.LlamaGen:
    state = golden_state("c2i")
    config = llamagen.infer_config({k: tuple(v.shape) for k, v in state.items()}, grid=8, heads=2)
    model = llamagen.LlamaGen(config)
    model.load_state_dict(state)
    return model.requires_grad_(False)


@pytest.mark.parametrize("run", ["greedy_cfg1", "greedy_cfg4", "greedy_cfg4_interval", "sample_topk"])
def test_teacher_forced_logits_equal_the_published_codes(run: str) -> None:
    golden = golden_outputs(run)
    model = golden_model()
    classes, tokens = torch.from_numpy(golden["classes"]), torch.from_numpy(golden["tokens"]).long()
    if run != "greedy_cfg1":
        classes, tokens = model.guided_classes(classes), tokens.repeat(2, 1)
    logits = model(classes, tokens[:, :-1]).transpose(0, 1)
    # The bar for fp32 is 2e-4; another order of summation costs about 1e-5 here.
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=2e-4, rtol=0)


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
