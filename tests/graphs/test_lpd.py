"""LPD against outputs of the published code: the pass of its training, its loop in groups, its orders and its sizes of groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linert.exporter.group_tables import MOST_PADDING, group_sizes, stage_widths
from linert.exporter.lpd_file import published_tensors
from linert.graphs.families.lpd import FAMILY, LPD, PUBLISHED_HEADS, LPDConfig
from linert.graphs.group_memory import GroupMemory
from linert.graphs.group_stages import GroupDecode
from linert.graphs.group_transformer import group_visibility
from linert.graphs.memory import memory_of
from linert.graphs.sampling import SamplingParams, filtered_mass, guide, noise_size, scheduled
from linert.graphs.stage_tensor import NEXT
from linert.graphs.stages import Admit, Prefill
from linert.runtime.bundles.schedule import Groups, GroupWidth, mixed_pairs, pairs
from linert.runtime.drawing.orders import Randomness, generation_order, order_of
from tests.conftest import random_state
from tests.golden_weights import DATA, golden_outputs, golden_state

RUNS = json.loads((DATA / "lpd_runs.json").read_text())
GREEDY = [name for name in RUNS["runs"] if name.startswith("greedy")]
TINY = LPDConfig(layers=2, dim=32, heads=4, ffn_dim=64, vocab_size=40, num_classes=5, grid=4)
SIZES = (1, 2, 4, 5, 4)


@pytest.fixture(scope="module")
def net() -> LPD:
    """The model that the published code ran."""
    state = golden_state("lpd")
    names, unknown = FAMILY.layouts[0].rename(state)
    assert not unknown
    tensors = FAMILY.module_tensors(
        LPDConfig(3, 64, 4, 256, 144, 10, 16), {ours: state[name] for name, ours in names.items()}
    )
    model = LPD(LPDConfig(3, 64, 4, 256, 144, 10, 16))
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def tiny() -> LPD:
    model = LPD(TINY)
    model.load_state_dict(random_state(model))
    return model.requires_grad_(False).eval()


def groups_of(sizes: Sequence[int]) -> Groups:
    return Groups((tuple(sizes),), stage_widths([sizes]), 2.0)


class InGroups:
    """Runs the stages on named tensors, as a loop would.

    Args:
        settings: of the sampler that differ from drawing at temperature 1.
    """

    def __init__(
        self,
        net: LPD,
        groups: Groups,
        labels: Sequence[int],
        orders: Tensor,
        *,
        guided: bool,
        **settings: float,
    ) -> None:
        self.net, self.groups, self.images = net, groups, len(labels)
        self.memory = memory_of(
            net.config, images=self.images, guided=guided, capacities=[groups.slots] * net.config.layers
        )
        numbers = {"guidance": 1.0, "temperature": 1.0, "top_p": 1.0} | {
            name: value for name, value in settings.items() if isinstance(value, float)
        }
        counts = {"guidance_interval": -1, "top_k": 0, "greedy": 0, "guidance_linear": 0} | {
            name: value for name, value in settings.items() if not isinstance(value, float)
        }
        generator = torch.Generator().manual_seed(0)
        size = (self.images, net.config.image_tokens, noise_size(net.config.vocab_size))
        self.tensors = {
            "class_ids": torch.tensor(labels),
            "order": orders,
            "noise": 1 / torch.empty(size).exponential_(generator=generator),
            **{name: torch.full((self.images, 1), value) for name, value in numbers.items()},
            **{
                name: torch.full((self.images, 1), value, dtype=torch.int64) for name, value in counts.items()
            },
        }
        self.run(Prefill(net, self.memory))

    def run(self, stage: Any) -> None:
        outputs = stage(*(self.tensors[spec.name] for spec in stage.inputs))
        for spec, value in zip(stage.outputs, outputs, strict=True):
            assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype), spec.name
            self.tensors[spec.name.removesuffix(NEXT)] = value

    def step(self, drawn: Sequence[int], width: GroupWidth | None = None) -> Tensor:
        """Draw a group of so many tokens in every image; its logits ``[B, Q, V]``."""
        fed = int(self.tensors["newest"].max())
        width = width or self.groups.width(fed, max(drawn))
        self.tensors["group_size"] = torch.tensor(drawn)
        assert isinstance(self.memory, GroupMemory)
        self.run(GroupDecode(self.net, self.memory, width))
        return self.tensors[width.logits]

    def draw(self, told: Tensor | None = None) -> list[Tensor]:
        """All groups; ``told`` tokens take the place of what is drawn. The logits of every group, without what fills it up."""
        logits = []
        rank = 0
        for size in self.groups.sizes[0]:
            logits.append(self.step([size] * self.images)[:, :size])
            rank += size
            if told is not None:
                cells = self.tensors["order"][:, :rank]
                self.tensors["tokens"] = torch.full_like(told, -1).scatter(1, cells, told.gather(1, cells))
        return logits


def test_the_mask_of_the_training_equals_the_published_codes() -> None:
    for name, wanted in golden_outputs("training_mask", "lpd").items():
        sizes = [int(size) for size in name.removeprefix("sizes_").split("_")]
        assert torch.equal(group_visibility(sizes), torch.from_numpy(wanted))


@pytest.mark.parametrize("run", RUNS["runs"])
def test_one_pass_predicts_what_the_published_loop_does(net: LPD, run: str) -> None:
    golden, facts = golden_outputs(run, "lpd"), RUNS["runs"][run]
    tokens, orders = (torch.from_numpy(golden[name]).long() for name in ("tokens", "order"))
    branches = facts["branches"]
    condition = net.condition([torch.tensor(facts["labels"])], guided=branches == 2)
    logits = net(condition, tokens.repeat(branches, 1), orders.repeat(branches, 1), facts["group_sizes"])
    logits = logits.unflatten(0, (branches, -1)).transpose(0, 1)
    [name] = [name for name in golden if name.startswith("logits")]
    every = 1 if name == "logits" else int(name.split("_")[-1].removesuffix("th"))
    torch.testing.assert_close(logits[:, :, ::every], torch.from_numpy(golden[name]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("run", GREEDY)
def test_the_stages_draw_what_the_published_loop_draws(net: LPD, run: str) -> None:
    golden, facts = golden_outputs(run, "lpd"), RUNS["runs"][run]
    loop = InGroups(
        net,
        groups_of(facts["group_sizes"]),
        facts["labels"],
        torch.from_numpy(golden["order"]).long(),
        guided=facts["branches"] == 2,
        guidance=float(facts["cfg"]),
        guidance_linear=int(facts["cfg_schedule"] == "linear"),
        greedy=1,
    )
    logits = torch.cat(loop.draw(), dim=1).unflatten(0, (facts["branches"], -1)).transpose(0, 1)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=2e-4, rtol=0)
    assert np.array_equal(loop.tensors["tokens"].numpy(), golden["tokens"])


def test_guidance_grows_with_the_rank() -> None:
    for run, schedule in (("greedy_linear_20", 1), ("greedy_constant_8", 0)):
        golden, facts = golden_outputs(run, "lpd"), RUNS["runs"][run]
        scale = scheduled(
            torch.full((256, 1), facts["cfg"]), torch.full((256, 1), schedule), torch.arange(256), 256
        )
        torch.testing.assert_close(scale.flatten(), torch.from_numpy(golden["guidance"]), atol=1e-6, rtol=0)
    golden, facts = golden_outputs("greedy_linear_20", "lpd"), RUNS["runs"]["greedy_linear_20"]
    ranks = torch.arange(0, 256, 16)
    logits = torch.from_numpy(golden["logits"])[:, :, ::16].transpose(0, 1).flatten(0, 2)
    params = params_of(facts)
    linear = torch.ones(32, 1, dtype=torch.int64)
    scale = scheduled(params.guidance.expand(32, 1), linear, ranks.repeat(2), 256)
    guided = guide(logits, params._replace(guidance=scale), ranks.repeat(2)).unflatten(0, (2, -1))
    torch.testing.assert_close(guided, torch.from_numpy(golden["guided_every_16th"]), atol=1e-5, rtol=0)


def params_of(facts: dict[str, Any]) -> SamplingParams:
    """The sampler's numbers of a published run."""
    numbers = (facts["cfg"], -1, facts["temperature"], facts["top_k"], facts["top_p"], 0)
    return SamplingParams(*map(torch.tensor, numbers))


def test_sampled_tokens_had_the_published_probabilities(net: LPD) -> None:
    golden, facts = golden_outputs("sample_linear_20", "lpd"), RUNS["runs"]["sample_linear_20"]
    tokens, orders = (torch.from_numpy(golden[name]).long() for name in ("tokens", "order"))
    loop = InGroups(net, groups_of(facts["group_sizes"]), facts["labels"], orders, guided=True)
    flat = torch.cat(loop.draw(tokens), dim=1).flatten(0, 1)
    params = params_of(facts)
    ranks = torch.arange(256).repeat(2)
    scale = scheduled(params.guidance.expand(512, 1), torch.ones(512, 1, dtype=torch.int64), ranks, 256)
    mass = filtered_mass(guide(flat, params._replace(guidance=scale), ranks), params)
    probabilities = (mass / mass.sum(-1, keepdim=True)).unflatten(0, (2, 256))
    ids = torch.from_numpy(golden["top_ids"]).long()
    wanted = torch.from_numpy(golden["top_probs"])
    torch.testing.assert_close(probabilities.gather(2, ids), wanted, atol=2e-5, rtol=0)
    chosen = tokens.gather(1, orders)[:, :, None]
    own = probabilities.gather(2, chosen)[:, :, 0]
    torch.testing.assert_close(own, torch.from_numpy(golden["chosen_prob"]), atol=2e-5, rtol=0)


# What the filling up and the batch must not change.


def orders_of(seeds: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([order_of(seed, TINY.grid, SIZES, 1.0) for seed in seeds]))


def test_the_width_of_a_stage_changes_nothing(tiny: LPD) -> None:
    """What fills a group up is neither seen nor left where a token would be."""
    widest = GroupWidth(7, 9)
    exact = tuple(GroupWidth(fed, drawn) for fed, drawn in pairs(SIZES))
    narrow, wide = (
        InGroups(
            tiny,
            Groups((SIZES,), widths, 1.0),
            [1, 4],
            orders_of([3, 4]),
            guided=True,
            guidance=3.0,
            guidance_linear=1,
        )
        for widths in (exact, (widest,))
    )
    for width in exact:
        own = narrow.step([width.drawn] * 2, width)
        padded = wide.step([width.drawn] * 2, widest)
        torch.testing.assert_close(padded[:, : width.drawn], own, atol=1e-5, rtol=0)
        assert torch.equal(wide.tensors["tokens"], narrow.tensors["tokens"])
    fed = 1 + TINY.image_tokens - SIZES[-1]
    for name in ("k_cache.0", "v_cache.1"):
        kept = (loop.tensors[name][:, :, :fed] for loop in (wide, narrow))
        torch.testing.assert_close(*kept, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lists", [[SIZES], [(16,)], [(1, 15)], [SIZES, (1, 7, 8)], [(1,) * 16, (8, 8)]])
def test_every_step_has_its_slots(lists: list[tuple[int, ...]]) -> None:
    """Of whatever width it is: images that are drawn in other numbers of steps share a batch."""
    groups = Groups(tuple(lists), stage_widths(lists), 1.0)
    for sizes in lists:
        drawn = 0
        for fed, size in pairs(sizes):
            assert drawn - fed + 1 + max(width.fed for width in groups.widths) <= groups.slots
            drawn += size
    assert groups.slots <= 1 + 16 + max(width.fed for width in groups.widths)


@pytest.mark.parametrize(
    "lists", [[(1, 1, 14), (1, 7, 8)], [(1, 1, 1, 13), (4, 4, 4, 4)], [(1, 1, 1, 1, 12), (1, 2, 3, 5, 5)]]
)
def test_images_in_other_numbers_of_steps_share_every_step(lists: list[tuple[int, ...]]) -> None:
    """One may feed many tokens and draw few where another feeds few and draws many."""
    groups = Groups(tuple(lists), stage_widths(lists), 1.0)
    first, second = map(pairs, lists)
    for one, other in zip(first, second, strict=False):
        width = groups.width(max(one[0], other[0]), max(one[1], other[1]))
        assert width.fits(*one)
        assert width.fits(*other)
        assert {(one[0], other[1]), (other[0], one[1])} <= mixed_pairs(lists)


def test_images_at_different_groups_share_a_batch(tiny: LPD) -> None:
    """What one image draws does not depend on where the other is."""
    groups, orders = groups_of(SIZES), orders_of([3, 4])
    together = InGroups(tiny, groups, [1, 4], orders, guided=True, guidance=3.0)
    together.draw()
    apart = InGroups(tiny, groups, [1, 4], orders, guided=True, guidance=3.0)
    ahead = list(SIZES)
    for number in range(len(SIZES) + 2):
        first = ahead[number] if number < len(SIZES) else 0
        second = SIZES[number - 2] if number >= 2 else 0
        before = apart.tensors["tokens"].clone()
        apart.step([first, second])
        if not second:
            assert torch.equal(apart.tensors["tokens"][1], before[1])
    assert torch.equal(apart.tensors["tokens"], together.tensors["tokens"])
    assert (apart.tensors["tokens"] >= 0).all()


def test_an_admitted_image_is_the_one_that_it_is_alone(tiny: LPD) -> None:
    groups = groups_of(SIZES)
    loop = InGroups(tiny, groups, [1, 4], orders_of([3, 4]), guided=True, guidance=3.0)
    alone = InGroups(tiny, groups, [2, 4], orders_of([9, 4]), guided=True, guidance=3.0)
    alone.draw()
    loop.draw()
    kept = {name: loop.tensors[name].clone() for name in ("tokens", "drawn", "newest", "condition")}
    loop.tensors |= {
        "class_ids": torch.tensor([2, 0]),
        "admitted": torch.tensor([1, 0]),
        "order": orders_of([9, 4]),
    }
    loop.run(Admit(tiny, loop.memory))
    assert loop.tensors["drawn"].tolist() == [0, TINY.image_tokens]
    for name, before in kept.items():
        rows = [1] if before.shape[0] == 2 else [1, 3]
        assert torch.equal(loop.tensors[name][rows], before[rows]), name
    for size in SIZES:
        loop.step([size, 0])
    assert torch.equal(loop.tensors["tokens"][0], alone.tensors["tokens"][0])
    assert torch.equal(loop.tensors["tokens"][1], kept["tokens"][1])


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.5, "top_k": 9, "top_p": 0.9}]
)
def test_every_token_is_drawn_in_its_cell_with_its_noise(tiny: LPD, filters: dict[str, float]) -> None:
    """Another order inside a group, with one scale for all, draws the same image: noise belongs to the cell."""
    groups, orders = groups_of(SIZES), orders_of([3, 4])
    turned = orders.clone()
    turned[:, 3:7] = orders[:, 3:7].flip(1)
    images = []
    for each in (orders, turned):
        loop = InGroups(tiny, groups, [1, 4], each, guided=True, guidance=3.0, **filters)
        loop.draw()
        images.append(loop.tensors["tokens"])
    assert torch.equal(*images)


# Sizes, orders and files.


def test_the_published_tables() -> None:
    for pixels, tables in RUNS["group_size_tables"].items():
        grid = int(pixels) // 16
        ours = group_sizes(grid)
        assert {steps: list(sizes) for steps, sizes in ours.items() if steps < grid * grid} == {
            int(steps): sizes for steps, sizes in tables.items() if int(steps) < grid * grid
        }
        assert ours[grid * grid] == (1,) * grid * grid


@pytest.mark.parametrize(("grid", "steps"), [(16, 8), (16, 20), (16, 32), (16, 256), (32, 48)])
def test_few_widths_leave_little_to_fill_up(grid: int, steps: int) -> None:
    sizes = group_sizes(grid)[steps]
    groups = groups_of(sizes)
    needed = sum(fed + drawn for fed, drawn in pairs(sizes))
    computed = sum(step.width.fed + step.width.drawn for step in groups.steps(sizes))
    assert needed <= computed <= (1 + MOST_PADDING) * needed
    assert len(groups.widths) <= 5
    # Fewer stages fill up more.
    [widest] = stage_widths([sizes], most=1)
    assert (widest.fed, widest.drawn) == (max((1, *sizes[:-1])), max(sizes))
    assert groups.slots == 1 + grid * grid - sizes[-1]


@pytest.mark.parametrize("name", RUNS["orders"])
def test_orders_equal_the_published_codes(name: str) -> None:
    facts, golden = RUNS["orders"][name], golden_outputs("orders", "lpd")
    wanted, shuffled = golden[f"{name}_order"], golden[f"{name}_shuffled"].astype(np.int64)
    taken = 0

    def replayed(cells: np.ndarray) -> np.ndarray:
        nonlocal taken
        taken += len(cells)
        part = shuffled[taken - len(cells) : taken]
        assert sorted(part) == sorted(cells)
        return part

    order = generation_order(
        facts["grid"],
        facts["group_sizes"],
        facts["repulsion_threshold"],
        Randomness(int(wanted[0]), replayed),
    )
    assert np.array_equal(order, wanted)
    assert taken == len(shuffled)


def test_an_order_belongs_to_its_seed() -> None:
    sizes = group_sizes(16)[20]
    orders = [order_of(seed, 16, sizes, 2.0) for seed in (0, 0, 1, 2**63 - 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert all(sorted(order.tolist()) == list(range(256)) for order in orders)
    # Written down, so that a seed stays an image: numpy promises the raw stream of Philox.
    assert orders[0][:12].tolist() == [17, 18, 255, 1, 254, 31, 224, 2, 239, 208, 15, 121]


@pytest.mark.parametrize("size", PUBLISHED_HEADS)
def test_published_sizes(size: tuple[int, int]) -> None:
    counted = {(24, 1024): 337_157_120, (36, 1280): 751_947_520, (48, 1536): 1_412_184_576}
    layers, dim = size
    config = LPDConfig(layers, dim, PUBLISHED_HEADS[size], 4 * dim, 16384, 1000, 16)
    shapes = config.tensor_shapes()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == counted[size]
    assert config.head_dim == 64


@pytest.mark.parametrize("heads", [1, 2, 16, 32])
def test_heads_of_any_size(heads: int) -> None:
    """The stages draw what the reference in PyTorch predicts, also where a head has one channel or an odd number."""
    config = replace(TINY, dim=96, heads=heads)
    model = LPD(config)
    model.load_state_dict(random_state(model))
    model.requires_grad_(False).eval()
    loop = InGroups(model, groups_of(SIZES), [1, 4], orders_of([3, 4]), guided=False)
    logits = torch.cat(loop.draw(), dim=1)
    condition = model.condition([torch.tensor([1, 4])], guided=False)
    wanted = model(condition, loop.tensors["tokens"], loop.tensors["order"], SIZES)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_what_is_written_under_published_names_is_read_back() -> None:
    state = golden_state("lpd")
    names, _ = FAMILY.layouts[0].rename(state)
    config = LPDConfig(3, 64, 4, 256, 144, 10, 16)
    ours = FAMILY.module_tensors(config, {mine: state[name] for name, mine in names.items()})
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == config.tensor_shapes()
    again = published_tensors(ours)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="no tensor rope"):
        published_tensors(ours | {"rope": torch.zeros(1)})
