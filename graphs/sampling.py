"""Guidance, temperature, top-k, top-p and the draw: logits to one token an image.

Every threshold is found by bisection: no sort, ties survive, no limit on k, and static shapes throughout. The
same code runs eagerly and is traced into the decode stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BISECTION_STEPS = 24
"""Halvings of the logit range. 2^-24 of a range of 60 is 4e-6: entries closer than that are ties, as they are to
the rounding of the logits themselves."""

RUN = 128
"""Ids whose mass is summed up before one of them is drawn."""


class SamplingParams(NamedTuple):
    """Run-time scalars (shape ``[]``) of the sampler.

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
    step = image_index - 1
    unlimited = params.guidance_interval < 0
    guided = (params.guidance > 1.0) & (unlimited | (step <= params.guidance_interval))
    return torch.where(guided[:, None], mix(conditional, unconditional, params.guidance), conditional)


def _bisect(low: Tensor, high: Tensor, stays: Callable[[Tensor], Tensor]) -> Tensor:
    """Largest t in [low, high) (within the last step) with ``stays(t)``; ``low`` is given to stay.

    Args:
        low: ``[I, 1]`` start; ``stays`` holds there.
        high: ``[I, 1]`` end.
        stays: monotone predicate, true below some value and false above it; ``[I, 1]`` to bool ``[I, 1]``.
    """
    halves = (high - low) * torch.tensor([0.5**i for i in range(1, BISECTION_STEPS + 1)])
    for step in halves.split(1, dim=-1):
        # Not ``where(stays(middle), middle, low)``, of which TensorRT for RTX 1.7 takes sixty times as long to build 24.
        low = low + torch.where(stays(low + step), step, 0.0)
    return low


def top_k_threshold(x: Tensor, top_k: Tensor) -> Tensor:
    """Largest t such that at least ``top_k`` entries of each row of ``x [I, V]`` are >= t: ``[I, 1]``."""
    size = x.shape[-1]
    wanted = torch.where(top_k > 0, top_k.clamp(max=size), size).to(x.dtype)
    return _bisect(
        x.amin(-1, keepdim=True),
        x.amax(-1, keepdim=True),
        lambda t: (x >= t).to(x.dtype).sum(-1, keepdim=True) >= wanted,
    )


def top_p_threshold(x: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """Value at or below which entries of ``x [I, V]`` leave the nucleus: ``[I, 1]``.

    An entry stays while the entries strictly above it hold at most ``top_p`` of the mass, so that the first
    one over the bound is kept (arXiv 1904.09751).

    Args:
        x: ``[I, V]`` scores; their order is the order of the mass.
        mass: ``[I, V]`` unnormalised probabilities, zero where already filtered.
        top_p: scalar; 1 or more keeps everything.
    """
    total = mass.sum(-1, keepdim=True)
    allowed = torch.where(top_p < 1.0, top_p, 2.0) * total
    return _bisect(
        x.amin(-1, keepdim=True) - 1.0,
        x.amax(-1, keepdim=True),
        # A product: ONNX Runtime selects by a condition three times as slowly on the CPU.
        lambda t: ((x > t).to(mass.dtype) * mass).sum(-1, keepdim=True) > allowed,
    )


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
    mass = torch.where(x >= top_k_threshold(x, params.top_k), x.exp(), 0.0)
    return torch.where(x > top_p_threshold(x, mass, params.top_p), mass, 0.0)


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id a row by inverse CDF in id order.

    First a run of ``RUN`` ids is drawn, then an id in it: a running sum is sequential, and two short ones take a quarter
    of the time of a long one.

    Args:
        mass: ``[I, V]`` unnormalised probabilities, not all zero.
        uniform: ``[I]`` in [0, 1 - 2^-23].

    Returns:
        ``[I]`` int64: the first id whose cumulative mass exceeds ``uniform`` times the total. Its mass is not zero.
    """
    runs = F.pad(mass, (0, -mass.shape[1] % RUN)).unflatten(-1, (-1, RUN))
    upto = runs.sum(-1).cumsum(-1)
    bound = uniform[:, None] * upto[:, -1:]
    passed = upto <= bound
    run = passed.to(torch.int64).sum(-1, keepdim=True)
    left = bound - torch.where(passed, upto, 0.0).amax(-1, keepdim=True)
    inside = runs.gather(1, run[:, :, None].expand(-1, -1, RUN)).squeeze(1).cumsum(-1)
    # Rounding may leave a little more than the run holds: then it is the last id that has mass.
    earlier = (inside <= left) & (inside < inside[:, -1:])
    return run.squeeze(1) * RUN + earlier.to(torch.int64).sum(-1)


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor, *, filtered: bool = True) -> Tensor:
    """Token ids ``[I]`` int64 from guided ``logits [I, V]`` and one ``uniform [I]`` each.

    ``filtered=False`` builds the sampler without top-k and top-p.
    """
    mass = filtered_mass(logits, params) if filtered else tempered(logits, params).exp()
    return torch.where(params.greedy != 0, logits.argmax(-1), draw(mass, uniform))
