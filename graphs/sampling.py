"""Guidance, temperature, top-k, top-p and the draw: logits to one token a row.

Thresholds are found by bisection and, where it has left a few entries, by sorting these: ties survive, there is no limit on k, and
shapes are static throughout. The draw is an arg-max of probabilities times noise that belongs to the token's position, so that two
distributions that differ a little mostly draw the same. The same code runs eagerly and is traced into the decode stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RUN = 128
"""Ids whose mass is summed up before one of them is drawn."""

SORTED = 512
"""Entries that are sorted where bisection has left no more. ONNX Runtime sorts so many in a hundredth of a millisecond."""

OUTSIDE = 1e30
"""Below it, negated, lies every entry that is not to be sorted."""

LOWEST = -88.0
"""Logarithm of the least float32 mass beside the largest entry's 1: what is below has none."""


def noise_size(vocab_size: int) -> int:
    """Numbers of noise that the draw of one token takes: one a run of ids, and one an id of a run."""
    return -(-vocab_size // RUN) + min(RUN, vocab_size)


class SamplingParams(NamedTuple):
    """Run-time numbers of the sampler: one a row (shape ``[I, 1]``), or one for all (``[]``).

    ``guidance`` float32: scale s of ``u + s (c - u)``; 1 or less means the conditional logits alone.
    ``guidance_interval`` int64: decode steps after this one (counted from 0) are unguided; -1 never.
    ``temperature`` float32. ``top_k`` int64: 0 or less keeps all. ``top_p`` float32: 1 keeps all.
    ``greedy`` int64: nonzero takes the arg-max of the guided logits.
    """

    guidance: Tensor
    guidance_interval: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    greedy: Tensor


def mix(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): away from the unconditional logits, ``scale`` times the way to the conditional."""
    return unconditional + scale * (conditional - unconditional)


def guide(logits: Tensor, params: SamplingParams, image_index: Tensor) -> Tensor:
    """Combine conditional and unconditional logits, where guidance is on, by :func:`mix`.

    Args:
        logits: ``[2 I, V]`` float32, conditional rows first.
        params: the scale and its interval.
        image_index: ``[I]`` int64, index of the token being drawn; token 0 is drawn at the end of
            the condition and is always guided, token i + 1 in decode step i.

    Returns:
        ``[I, V]`` float32.
    """
    conditional, unconditional = logits.chunk(2)
    step = image_index[:, None] - 1
    unlimited = params.guidance_interval < 0
    guided = (params.guidance > 1.0) & (unlimited | (step <= params.guidance_interval))
    return torch.where(guided, mix(conditional, unconditional, params.guidance), conditional)


def scheduled(guidance: Tensor, linear: Tensor, rank: Tensor, tokens: int) -> Tensor:
    """The scale of every token: ``guidance``, or where ``linear`` is not 0, what lies as far on the way from 1 to it as the token in its image.

    Args:
        guidance: ``[n, 1]`` float32.
        linear: ``[n, 1]`` int64.
        rank: ``[n]`` int64, how many of the image's ``tokens`` are drawn before, whether or not in the same group (arXiv 2507.01957).
    """
    grown = 1.0 + (guidance - 1.0) * (rank[:, None].to(guidance.dtype) / tokens)
    return torch.where(linear != 0, grown, guidance)


class Bracket(NamedTuple):
    """Where a threshold lies: above ``low``, at or below ``high``; both ``[I, 1]``."""

    low: Tensor
    high: Tensor


def _bisect(low: Tensor, high: Tensor, halvings: int, stays: Callable[[Tensor], Tensor]) -> Bracket:
    """Narrow a bracket.

    Args:
        low, high: ``[I, 1]``, its ends.
        halvings: how often it is cut in half.
        stays: monotone predicate, true below some value and false above it; ``[I, 1]`` to bool ``[I, 1]``.
    """
    halves = (high - low) * torch.tensor([0.5**i for i in range(1, halvings + 2)])
    *steps, last = halves.split(1, dim=-1)
    middle = low + steps[0]
    for up, down in zip([*steps[1:], last], (-halves).split(1, dim=-1)[1:], strict=True):
        # Not ``where(stays(middle), middle, low)``, of which TensorRT for RTX 1.7 takes sixty times as long to build 24.
        middle = middle + torch.where(stays(middle), up, down)
    return Bracket(middle - last, middle + last)


def _halvings(size: int) -> int:
    """Halvings of the range of ``size`` numbers that leave fewer than :data:`SORTED` of them.

    Numbers that are spread like a normal distribution lie at its middle eight times as densely as if they were spread evenly, where the
    range is twenty standard deviations.
    """
    return max(1, math.ceil(math.log2(16 * size / SORTED)))


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """1 for entries of ``x [I, V]`` that are above ``threshold [I, 1]``, else 0: ``[I, V]`` float32."""
    return (x > threshold).to(x.dtype)


def reaching(x: Tensor, threshold: Tensor) -> Tensor:
    """1 for entries of ``x [I, V]`` that are at least ``threshold [I, 1]``, else 0: ``[I, V]`` float32."""
    return (x >= threshold).to(x.dtype)


def _sorted_within(x: Tensor, bracket: Bracket) -> Tensor:
    """The largest entries of ``x [I, V]`` in the bracket, descending: ``[I, SORTED]``, -inf where there are no more."""
    # A product: ONNX Runtime selects by a condition three times as slowly on the CPU.
    inside = above(x, bracket.low) - above(x, bracket.high)
    return (x * inside + (inside * OUTSIDE - OUTSIDE)).topk(min(SORTED, x.shape[-1]), dim=-1).values


def top_k_threshold(x: Tensor, top_k: Tensor) -> Tensor:
    """Largest entry such that at least ``top_k`` entries of each row of ``x [I, V]`` reach it: ``[I, 1]``.

    0 or less keeps all. ``x`` is at most 0. Where more than :data:`SORTED` entries lie in the last bracket, all of them reach it.
    """
    size = x.shape[-1]
    wanted = torch.where(top_k > 0, top_k.clamp(max=size), size).to(x.dtype)
    least = x.amin(-1, keepdim=True).clamp(min=LOWEST) - 1.0

    def reached(t: Tensor) -> Tensor:
        return above(x, t).sum(-1, keepdim=True)

    bracket = _bisect(least, torch.zeros_like(least), _halvings(size), lambda t: reached(t) >= wanted)
    ordered = _sorted_within(x, bracket)
    rank = (wanted - reached(bracket.high)).clamp(min=1.0) - 1.0
    found = ordered.gather(1, rank.clamp(max=ordered.shape[1] - 1.0).to(torch.int64))
    return torch.where(rank < ordered.shape[1], found, bracket.low)


def top_p_threshold(x: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """Smallest entry of ``x [I, V]`` that belongs to the nucleus: ``[I, 1]``.

    An entry belongs to it while the entries strictly above it hold at most ``top_p`` of the mass, so that the first
    one over the bound is kept (arXiv 1904.09751). Where more than :data:`SORTED` entries lie in the last bracket, all of them belong to it.

    Args:
        x: ``[I, V]`` scores, at most 0; their order is the order of the mass.
        mass: ``[I, V]`` unnormalised probabilities, zero where already filtered.
        top_p: ``[I, 1]`` or ``[]``; 1 or more keeps everything.
    """
    size = x.shape[-1]
    total = mass.sum(-1, keepdim=True)
    allowed = torch.where(top_p < 1.0, top_p, 2.0) * total

    def mass_above(t: Tensor) -> Tensor:
        return (above(x, t) * mass).sum(-1, keepdim=True)

    least = x.amin(-1, keepdim=True).clamp(min=LOWEST) - 1.0
    bracket = _bisect(least, torch.zeros_like(least), _halvings(size), lambda t: mass_above(t) > allowed)
    ordered = _sorted_within(x, bracket)
    masses = ordered.exp()
    belongs = mass_above(bracket.high) + masses.cumsum(-1) - masses <= allowed
    smallest = torch.where(belongs, ordered, 0.0).amin(-1, keepdim=True)
    return torch.where(belongs[:, -1:], bracket.low, smallest)


def tempered(logits: Tensor, params: SamplingParams) -> Tensor:
    """``logits [I, V]`` over the temperature, shifted so that each row's largest is 0."""
    x = logits / params.temperature.clamp(min=1e-5)
    return x - x.amax(-1, keepdim=True)


def filtered_mass(logits: Tensor, params: SamplingParams) -> Tensor:
    """Unnormalised probabilities after temperature, top-k and top-p, in this order.

    Args:
        logits: ``[I, V]`` float32, guided.

    Returns:
        ``[I, V]`` float32, at most 1 an entry, zero where filtered. Top-k keeps every entry tied with the
        k-th; top-p works on the distribution that top-k left.
    """
    x = tempered(logits, params)
    mass = x.exp() * reaching(x, top_k_threshold(x, params.top_k))
    return mass * reaching(x, top_p_threshold(x, mass, params.top_p))


def draw(mass: Tensor, noise: Tensor) -> Tensor:
    """Draw one id a row: first a run of :data:`RUN` ids, then an id in it, each by an arg-max of mass times noise.

    The largest of ``mass / e``, where e is exponentially distributed, is a draw from the distribution; it is what an arg-max of log mass
    plus Gumbel noise finds. Two distributions that differ by little draw the same id with the same noise, wherever in the
    order of ids they differ.

    Args:
        mass: ``[I, V]`` unnormalised probabilities, not all zero.
        noise: ``[I, noise_size(V)]`` reciprocals of exponentially distributed numbers: of the runs, then of the ids of a run.

    Returns:
        ``[I]`` int64; the mass of each is not zero.
    """
    width = min(RUN, mass.shape[1])
    runs = F.pad(mass, (0, -mass.shape[1] % width)).unflatten(-1, (-1, width))
    of_runs, of_ids = noise.split([runs.shape[1], width], dim=-1)
    run = (runs.sum(-1) * of_runs).argmax(-1, keepdim=True)
    inside = runs.gather(1, run[:, :, None].expand(-1, -1, width)).squeeze(1)
    return run.squeeze(1) * width + (inside * of_ids).argmax(-1)


def draw_margin(mass: Tensor, noise: Tensor, drawn: int, other: int) -> float:
    """By how much :func:`draw` prefers the id that was ``drawn`` to ``other``: a gap of log probabilities, at least 0.

    Args:
        mass, noise: of one row, ``[V]`` and ``[noise_size(V)]``.
    """
    width = min(RUN, len(mass))
    runs = F.pad(mass, (0, -len(mass) % width)).unflatten(-1, (-1, width))
    of_runs, of_ids = noise.split([len(runs), width])
    by_run = (runs.sum(-1) * of_runs).log()
    by_id = (runs * of_ids).log()
    first, second = (divmod(number, width) for number in (drawn, other))
    between_runs = (by_run[first[0]] - by_run[second[0]]).item()
    within = (by_id[second[0]].max() - by_id[second]).item()
    return max(between_runs, 0.0) + max(within, 0.0)


def sample(logits: Tensor, params: SamplingParams, noise: Tensor, *, filtered: bool = True) -> Tensor:
    """Token ids ``[I]`` int64 from guided ``logits [I, V]`` and ``noise [I, noise_size(V)]``.

    ``filtered=False`` builds the sampler without top-k and top-p.
    """
    mass = filtered_mass(logits, params) if filtered else tempered(logits, params).exp()
    return torch.where(params.greedy.flatten() != 0, logits.argmax(-1), draw(mass, noise))
