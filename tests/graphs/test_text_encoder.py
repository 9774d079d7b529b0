"""T5's encoder against the transformers library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linert.graphs import text_encoder

transformers = pytest.importorskip("transformers")


def published(dim: int = 32, layers: int = 3, **changed: Any) -> Any:
    """A tiny random encoder with a gated feed-forward."""
    config = transformers.T5Config(
        **{"vocab_size": 300, "d_model": dim, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 20, **changed},
    )
    torch.manual_seed(2)
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "embed" in name or "shared" in name or "bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def ours(model: Any) -> text_encoder.TextEncoder:
    state = model.state_dict()
    names, unknown = text_encoder.LAYOUT.rename(state)
    assert not unknown
    parameters = {mine: state[name] for name, mine in names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    net = text_encoder.TextEncoder(text_encoder.infer_config(shapes, model.config.to_dict()))
    net.load_state_dict(parameters)
    return net.requires_grad_(False)


@torch.no_grad()
def test_features_equal_transformers() -> None:
    model = published()
    tokens = torch.randint(300, (3, 60), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([60, 41, 1])
    features = ours(model)(tokens, lengths)
    mask = torch.arange(60) < lengths[:, None]
    wanted = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(features[mask], wanted[mask], atol=2e-5, rtol=0)
    assert not features[~mask].any()


@pytest.mark.parametrize(("length", "buckets", "most"), [(120, 32, 128), (50, 8, 20), (300, 32, 128)])
def test_buckets_equal_transformers(length: int, buckets: int, most: int) -> None:
    attention = transformers.models.t5.modeling_t5.T5Attention
    at = torch.arange(length)
    wanted = attention._relative_position_bucket(
        at[None] - at[:, None], bidirectional=True, num_buckets=buckets, max_distance=most
    )
    assert torch.equal(text_encoder.relative_buckets(length, buckets, most), wanted)


def test_the_first_t5_is_refused() -> None:
    shapes = {"block.0.layer.1.DenseReluDense.wi.weight": (1, 1)}
    with pytest.raises(ValueError, match="not gated"):
        text_encoder.infer_config(shapes, {})


def test_flan_t5_xl_has_its_published_count() -> None:
    config = text_encoder.TextEncoderConfig(24, 2048, 32, 64, 5120, 32128, 32)
    total = sum(torch.Size(shape).numel() for shape in config.tensor_shapes().values())
    assert total == 1_223_527_424
