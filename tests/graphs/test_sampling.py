"""The sampler against sorting, against the published code's stored draws, and by its properties."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linert.graphs.sampling import RUN, SamplingParams, draw, filtered_mass, guide, sample
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


@given(seed=st.integers(0, 1000), uniform=st.integers(0, 2**23 - 1), size=st.sampled_from([50, RUN, 300]))
@settings(max_examples=150, deadline=None)
def test_a_draw_never_leaves_the_support(seed: int, uniform: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(1, size, generator=generator) * (torch.rand(1, size, generator=generator) < 0.2)
    # Masses that vanish beside others: what rounding does to them decides nothing but between neighbours.
    mass *= 10.0 ** -torch.randint(0, 9, (1, size), generator=generator)
    mass[0, 17] = 1e-3
    token = draw(mass, torch.tensor([uniform * 2.0**-23]))
    assert mass[0, token] > 0


@given(seed=st.integers(0, 1000), size=st.sampled_from([7, RUN - 1, RUN, RUN + 1, 1000, 16384]))
@settings(max_examples=60, deadline=None)
def test_a_draw_is_the_first_id_over_the_bound(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = (4 * torch.randn(20, size, generator=generator)).exp()
    uniform = torch.randint(0, 2**23, (20,), generator=generator) * 2.0**-23
    cumulative = mass.double().cumsum(-1)
    bound = uniform.double()[:, None] * cumulative[:, -1:]
    drawn = draw(mass, uniform)[:, None]
    tolerance = 1e-5 * cumulative[:, -1:]
    assert (cumulative.gather(1, drawn) > bound - tolerance).all()
    before = cumulative.gather(1, drawn) - mass.double().gather(1, drawn)
    assert (before <= bound + tolerance).all()


def test_draws_follow_the_probabilities() -> None:
    mass = torch.tensor([[1.0, 0.0, 3.0, 4.0]]).expand(8000, 4)
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(draw(mass, uniform), minlength=4)
    assert counts.tolist() == [1000, 0, 3000, 4000]


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert sample(logits, params(greedy=True), torch.tensor([0.99])).item() == 1
