"""The sampler against sorting, against the published code's stored draws, and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linert.graphs.sampling import (
    RUN,
    SORTED,
    SamplingParams,
    draw,
    draw_margin,
    filtered_mass,
    guide,
    noise_size,
    sample,
)
from linert.runtime.drawing.noise import noise_rows
from tests.golden_weights import golden_outputs


def params(
    *,
    guidance: float = 1.0,
    interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
) -> SamplingParams:
    return SamplingParams(
        torch.tensor(guidance),
        torch.tensor(interval),
        torch.tensor(temperature),
        torch.tensor(top_k),
        torch.tensor(top_p),
        torch.tensor(int(greedy)),
    )


def by_sorting(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """LlamaGen's order of filters, written with sorts: probabilities ``[I, V]``."""
    x = logits / max(temperature, 1e-5)
    if top_k > 0:
        kth = x.topk(min(top_k, x.shape[-1])).values[:, -1:]
        x = x.masked_fill(x < kth, float("-inf"))
    if top_p < 1.0:
        ordered, index = x.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        removed = torch.zeros_like(x, dtype=torch.bool).scatter(1, index, before > top_p)
        x = x.masked_fill(removed, float("-inf"))
    return x.softmax(-1)


def probabilities(logits: torch.Tensor, settings_: SamplingParams) -> torch.Tensor:
    mass = filtered_mass(logits, settings_)
    return mass / mass.sum(-1, keepdim=True)


@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.1, 12),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 80),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
)
@settings(max_examples=150, deadline=None)
def test_bisection_finds_what_sorting_finds(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Distinct logits on a lattice far coarser than the bisection's last step, so that no cut is a matter of rounding.
    lattice = torch.stack([torch.randperm(64, generator=generator) for _ in range(3)])
    logits = lattice.float() * spread / 64
    probs = probabilities(logits, params(temperature=temperature, top_k=top_k, top_p=top_p))
    wanted = by_sorting(logits, temperature, top_k, top_p)
    cut = wanted.sort(-1, descending=True).values.cumsum(-1)
    if (abs(cut - top_p) < 1e-5).any():
        return  # the bound falls on an entry's edge: which side is rounding
    torch.testing.assert_close(probs, wanted, atol=1e-5, rtol=0)


def test_top_k_keeps_every_tie() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = filtered_mass(logits, params(top_k=2)) > 0
    assert kept.tolist() == [[True, False, True, True, True, False]]


def test_top_p_keeps_the_first_token_over_the_bound() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert (filtered_mass(logits, params(top_p=0.6)) > 0).tolist() == [[True, True, False, False]]
    assert (filtered_mass(logits, params(top_p=0.1)) > 0).tolist() == [[True, False, False, False]]


def test_stored_noise_reproduces_the_published_draws() -> None:
    golden = golden_outputs("sample_topk")
    classes = len(golden["classes"])
    settings_ = params(guidance=4.0, top_k=50)
    for index, logits in enumerate(torch.from_numpy(golden["logits"])):
        guided = guide(logits, settings_, torch.full((classes,), index))
        probs = probabilities(guided, settings_)
        np.testing.assert_allclose(probs, golden["probs"][index], atol=1e-5)
        drawn = (probs / torch.from_numpy(golden["noise"][index])).argmax(-1)
        assert (drawn.numpy() == golden["tokens"][:, index]).all()


def test_guidance_stops_after_its_interval() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    settings_ = params(guidance=3.0, interval=2)
    guided = torch.tensor([[3.0, -2.0]])
    for image_index, wanted in ((0, guided), (3, guided), (4, logits[:1]), (9, logits[:1])):
        assert torch.equal(guide(logits, settings_, torch.tensor([image_index])), wanted)
    assert torch.equal(guide(logits, params(guidance=1.0), torch.tensor([0])), logits[:1])


def noise_of(seed: int, rows: int, size: int) -> torch.Tensor:
    return torch.from_numpy(noise_rows(seed, rows, noise_size(size)))


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([50, RUN, 300, 5000]),
    top_k=st.integers(0, 6000),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
)
@settings(max_examples=60, deadline=None)
def test_filters_keep_what_sorting_keeps_of_many(seed: int, size: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * 4
    kept = filtered_mass(logits, params(top_k=top_k, top_p=top_p)) > 0
    wanted = by_sorting(logits.double(), 1.0, top_k, top_p) > 0
    # The bound may fall on an entry's edge.
    assert ((kept.sum(-1) - wanted.sum(-1)).abs() <= (top_p < 1)).all()
    assert (kept == wanted).float().mean() >= 1 - 1 / size


def test_more_ties_than_are_sorted_all_stay() -> None:
    logits = torch.zeros(1, 4 * SORTED)
    logits[0, :5] = 3.0
    logits[0, 5 : SORTED + 200] = 1.0
    for settings_ in (params(top_k=6), params(top_p=0.1)):
        kept = filtered_mass(logits, settings_) > 0
        assert kept[0, :5].all()
        assert not kept[0, SORTED + 200 :].any()
    assert (filtered_mass(logits, params(top_k=6)) > 0).sum() == SORTED + 200


def test_what_has_no_mass_beside_the_largest_does_not_spoil_a_filter() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0, -1e9, -1e30]])
    assert (filtered_mass(logits, params(top_k=2)) > 0).tolist() == [[True, True, False, False, False]]
    assert (filtered_mass(logits, params(top_k=4)) > 0).tolist() == [[True, True, True, False, False]]
    assert (filtered_mass(logits, params(top_p=0.7)) > 0).tolist() == [[True, True, False, False, False]]


@given(seed=st.integers(0, 1000), size=st.sampled_from([50, RUN, 300]))
@settings(max_examples=150, deadline=None)
def test_a_draw_never_leaves_the_support(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(1, size, generator=generator) * (torch.rand(1, size, generator=generator) < 0.2)
    mass *= 10.0 ** -torch.randint(0, 9, (1, size), generator=generator)
    mass[0, 17] = 1e-30
    token = draw(mass, noise_of(seed, 1, size))
    assert mass[0, token] > 0


@pytest.mark.parametrize("size", [7, RUN - 1, RUN, RUN + 1, 700])
def test_draws_follow_the_probabilities(size: int) -> None:
    draws = 40_000
    mass = (1.5 * torch.randn(size, generator=torch.Generator().manual_seed(size))).exp()
    mass[3] = 0.0
    drawn = draw(mass.expand(draws, size), noise_of(5, draws, size))
    counts = torch.bincount(drawn, minlength=size).double().numpy()
    wanted = (mass / mass.sum() * draws).double().numpy()
    assert counts[3] == 0
    # Few are expected of the rare ones, which are counted together.
    often = wanted >= 5
    seen = [*counts[often], counts[~often].sum()]
    expected = [*wanted[often], wanted[~often].sum()]
    if expected[-1] < 5:
        seen, expected = seen[:-1], expected[:-1]
    assert scipy.stats.chisquare(seen, np.array(expected) * (sum(seen) / sum(expected))).pvalue > 1e-3


def test_positions_and_seeds_draw_independently() -> None:
    mass = torch.tensor([0.5, 0.3, 0.2])
    draws = np.stack([draw(mass.expand(64, 3), noise_of(seed, 64, 3)).numpy() for seed in range(600)])
    for one, other in ((draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        table = np.zeros((3, 3))
        np.add.at(table, (one.ravel(), other.ravel()), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_distributions_that_differ_a_little_mostly_draw_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 16384, generator=generator)
    other = logits + 0.3 * torch.randn(400, 16384, generator=generator)
    noise = noise_of(1, 400, 16384)
    distance = (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1).mean() / 2
    assert 0.1 < distance < 0.13
    same = draw(logits.exp(), noise) == draw(other.exp(), noise)
    assert same.float().mean() > 0.7


@given(seed=st.integers(0, 1000), size=st.sampled_from([7, 300]))
@settings(max_examples=60, deadline=None)
def test_a_margin_is_what_it_takes_to_draw_otherwise(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = (2 * torch.randn(size, generator=generator)).exp()
    noise = noise_of(seed, 1, size)
    drawn = int(draw(mass[None], noise))
    assert draw_margin(mass, noise[0], drawn, drawn) == 0.0
    # The next in the same run is drawn once it has more than the margin says.
    run = min(RUN, size)
    start = drawn // run * run
    rivals = [number for number in range(start, min(start + run, size)) if number != drawn]
    nearest = min(rivals, key=lambda number: draw_margin(mass, noise[0], drawn, number))
    gap = draw_margin(mass, noise[0], drawn, nearest)
    raised = mass.clone()
    raised[nearest] *= float(np.exp(gap * 1.001 + 1e-4))
    assert int(draw(raised[None], noise)) == nearest
    raised[nearest] = mass[nearest] * float(np.exp(gap * 0.999 - 1e-4))
    assert int(draw(raised[None], noise)) == drawn


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert sample(logits, params(greedy=True), noise_of(0, 1, 3)).item() == 1
