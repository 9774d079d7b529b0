"""LASADGen: its stages against the weights of all pairs of tokens, and its configuration."""

from __future__ import annotations

import pytest
import torch

from linert.graphs.families import FAMILIES
from linert.graphs.families.lasadgen import FAMILY, SIZES, LASADGen, LASADGenConfig, Variant, infer_config
from linert.graphs.history import full_history
from linert.graphs.memory import memory_of
from tests.conftest import random_state
from tests.eager import Eager


def model(variant: Variant, grid: int = 6, prefix_len: int = 1) -> LASADGen:
    config = LASADGenConfig(2, 32, 4, 64, 40, 5, grid, variant, gate_rank=8, prefix_len=prefix_len)
    net = LASADGen(config)
    # Unit-scale logits of the decays reach from factors of 0.3 to 0.8; these, from 0.05 to 0.95.
    state = random_state(net)
    state |= {name: 30 * tensor for name, tensor in state.items() if name.endswith("_decay")}
    net.load_state_dict(state)
    return net.requires_grad_(False).eval()


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("guided", [True, False])
def test_stages_draw_what_the_parallel_form_draws(variant: Variant, guided: bool) -> None:
    net = model(variant)
    memory = memory_of(net.config, images=2, guided=guided)
    ids = torch.tensor([1, 3])
    eager = Eager(net, memory, "", [ids], guidance=2.0 if guided else 1.0)
    tokens = eager.draw()
    fed = tokens.repeat(memory.geometry.branches, 1)[:, :-1]
    wanted = net(net.condition([ids], guided=guided), fed)[:, -1]
    torch.testing.assert_close(eager.tensors["logits"], wanted, atol=1e-4, rtol=1e-4)
    # What was drawn depends on what is seen: other decays, other tokens.
    net.load_state_dict({name: -t if "decay" in name else t for name, t in net.state_dict().items()})
    assert variant is Variant.NONE or not torch.equal(Eager(net, memory, "", [ids]).draw(), tokens)


@pytest.mark.parametrize("variant", Variant)
def test_lines_at_once_are_the_parallel_form(variant: Variant) -> None:
    net = model(variant)
    memory = memory_of(net.config, images=2, guided=True)
    history, ids = full_history(net, memory), torch.tensor([0, 4])
    tokens = torch.randint(40, (2, 36), generator=torch.Generator().manual_seed(1))
    logits = [history.begin([ids])[:, None]]
    for line in range(6):
        logits.append(history.feed(tokens[:, 6 * line : 6 * line + 6 - (line == 5)]))
        history.end_line()
    wanted = net(net.condition([ids], guided=True), tokens.repeat(2, 1)[:, :-1])
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, atol=1e-4, rtol=1e-4)


def test_a_full_size_grid_agrees() -> None:
    """32 x 32 tokens, to 1e-4 of the logits' scale."""
    net = model(Variant.MANHATTAN, grid=32)
    memory = memory_of(net.config, images=1, guided=False)
    ids = torch.tensor([2])
    eager = Eager(net, memory, "", [ids])
    tokens = eager.draw()
    wanted = net(net.condition([ids], guided=False), tokens[:, :-1])[:, -1]
    assert (eager.tensors["logits"] - wanted).abs().max() <= 1e-4 * wanted.std().clamp(min=1)


def test_the_state_is_one_line_whatever_the_image() -> None:
    """Manhattan decay keeps a matrix a column; signed decay one."""

    def state_bytes(variant: Variant, grid: int) -> int:
        memory = memory_of(model(variant, grid).config, images=1, guided=True)
        return sum(s.nbytes for s in memory.state() if s.name.startswith("above."))

    matrix = 2 * 2 * 4 * 8 * 8 * 4  # layers, branches, heads, a head's matrix, float32
    assert [state_bytes(Variant.MANHATTAN, grid) for grid in (6, 12)] == [6 * matrix, 12 * matrix]
    assert [state_bytes(Variant.SIGNED, grid) for grid in (6, 12)] == [matrix, matrix]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_mirror_llamagen(size: str) -> None:
    """The same parameters, but for the gates and the decays."""
    from random_checkpoint import transformer_shapes

    config = LASADGenConfig.of_size(size, grid=24)
    ours, theirs = config.tensor_shapes(), transformer_shapes(size)

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    added = config.layers * (2 * config.dim * config.gate_rank + config.head_dim + 2 * config.heads)
    assert count(ours) == count(theirs) + added
    assert config.head_dim == 64


@pytest.mark.parametrize("variant", Variant)
def test_a_configuration_survives_its_container(variant: Variant) -> None:
    config = model(variant).config
    assert infer_config(config.tensor_shapes(), config.settings()) == config
    assert FAMILIES["lasadgen"] is FAMILY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "no config.json"),
        ({"variant": "euclid"}, "variant 'euclid' is none of manhattan, signed, raster, none"),
        ({"grid_size": None}, "config.json lacks grid_size"),
        ({"num_attention_heads": 5}, "dim 32 is not a multiple of heads 5"),
        ({"num_attention_heads": 16}, "head size 2 is not a multiple of 4"),
        ({"grid_size": 0}, "grid_size is 0, must be a whole number from 1"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str) -> None:
    config = model(Variant.MANHATTAN).config
    settings = {name: value for name, value in {**config.settings(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        infer_config(config.tensor_shapes(), settings)
