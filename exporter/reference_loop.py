"""The loop that draws images with PyTorch, token by token: the reference that parity, calibration and the speed of peers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from linert.exporter.sampling_params import sampling_params
from linert.graphs.group_history import GroupHistory
from linert.graphs.sampling import (
    SamplingParams,
    draw,
    draw_margin,
    filtered_mass,
    guide,
    scheduled,
    tempered,
)
from linert.graphs.stages import with_newlines
from linert.graphs.transformer import FamilyConfig
from linert.runtime.bundles.sampling_settings import GuidanceSchedule, SamplingSettings


class Drawing(Protocol):
    """What can be fed: :class:`linert.graphs.history.History`, or :class:`linert.exporter.peers.PyTorchPeer`."""

    @property
    def config(self) -> FamilyConfig:
        """Of the model."""

    def begin(self, inputs: Sequence[Tensor], /) -> Tensor:
        """Feed the condition that ``inputs`` of the prefill stage say; return the logits ``[B, V]`` of token 0."""

    def feed(self, tokens: Tensor, /) -> Tensor:
        """Feed the next tokens, ``[I, n]``; return the logits ``[B, n, V]`` of the tokens after each."""


class DrawnToken(NamedTuple):
    """One token of every image: its ``index``, the guided ``logits [I, V]``, and the ``token [I]`` int64."""

    index: int
    logits: Tensor
    token: Tensor


Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Guides logits ``[B, V]`` of the token of an index, and draws it: guided ``[I, V]`` and ``[I]``."""


def draw_tokens(
    model: Drawing, inputs: Sequence[Tensor], choose: Choose, end_line: Callable[[int], object]
) -> Iterator[DrawnToken]:
    """Draw every token of a batch.

    Args:
        model: fed with what is drawn.
        inputs: the condition.
        choose: draws from logits.
        end_line: called with the line's number when a line, but the last, is fed.
    """
    config = model.config
    logits = model.begin(inputs)
    for index in range(config.image_tokens):
        guided, drawn = choose(logits, index)
        token = with_newlines(config, drawn, torch.tensor(index))
        yield DrawnToken(index, guided, token)
        if index < config.image_tokens - 1:
            logits = model.feed(token[:, None])[:, 0]
            line, column = divmod(index, config.line_width)
            if column == config.line_width - 1:
                end_line(line)


def sampler(params: SamplingParams, noise: Tensor, *, guided: bool) -> Choose:
    """The draw that the stages make, with ``noise [I, N, S]``; ``guided`` where logits have unconditional rows."""

    def choose(logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        if guided:
            logits = guide(logits, params, torch.full((len(noise),), index))
        if params.greedy:
            return logits, logits.argmax(-1)
        return logits, draw(filtered_mass(logits, params), noise[:, index])

    return choose


class DrawnGroup(NamedTuple):
    """One group of every image: the ``rank`` of its first token, its ``cells [I, n]``, the guided ``logits [I, n, V]``, and the ``tokens [I, n]``
    int64."""

    rank: int
    cells: Tensor
    logits: Tensor
    tokens: Tensor


def draw_groups(
    model: GroupHistory,
    inputs: Sequence[Tensor],
    orders: Tensor,
    sizes: Sequence[int],
    sampling: SamplingSettings,
    noise: Tensor,
) -> Iterator[DrawnGroup]:
    """Draw every token of a batch in groups.

    Args:
        model: fed with what is drawn.
        inputs: the condition.
        orders: ``[I, N]``, the cell of the token of every rank.
        sizes: of the groups.
        noise: ``[I, N, S]``, by cell.
    """
    images, tokens = orders.shape
    params = sampling_params(sampling)
    linear = torch.tensor([[int(sampling.guidance_schedule == GuidanceSchedule.LINEAR)]])
    model.begin(inputs)
    rank = 0
    for size in sizes:
        cells = orders[:, rank : rank + size]
        logits = model.ask(cells).flatten(0, 1)
        ranks = torch.arange(rank, rank + size).repeat(images)
        if model.guided:
            scale = scheduled(params.guidance.expand(len(ranks), 1), linear, ranks, tokens)
            logits = guide(logits, params._replace(guidance=scale), ranks)
        drawn_with = noise.gather(1, cells[:, :, None].expand(-1, -1, noise.shape[2])).flatten(0, 1)
        drawn = logits.argmax(-1) if sampling.greedy else draw(filtered_mass(logits, params), drawn_with)
        group = drawn.unflatten(0, (images, size))
        yield DrawnGroup(rank, cells, logits.unflatten(0, (images, size)), group)
        model.tell(cells, group)
        rank += size


def undecidedness(logits: Tensor, params: SamplingParams, noise: Tensor, other: int) -> float:
    """How far guided ``logits [V]`` with ``noise [S]`` are from drawing ``other`` instead: a gap of logits.

    Where rounding takes the one into what is kept, or the other out of it, it is the distance from the last that is kept.
    """
    if params.greedy:
        return (logits.max() - logits[other]).item()
    scores = tempered(logits[None], params)[0]
    kept = filtered_mass(logits[None], params)[0] > 0
    least = scores[kept].min()
    drawn = int(draw(filtered_mass(logits[None], params), noise[None]))
    mass = torch.where(kept, scores.exp(), 0.0)
    mass[other] = scores[other].exp()
    gap = draw_margin(mass, noise, drawn, other)
    outside = max((least - scores[other]).item(), 0.0)
    return max(outside, min(gap, (scores[drawn] - least).item()))
