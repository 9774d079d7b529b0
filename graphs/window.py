"""The window: T positions of every sequence in one decode step, of which the first few are accepted.

A row feeds its last accepted token and, behind it, drafts of what may follow. Every position draws with the noise that belongs to it. A
draft is accepted while it is what was just drawn; the first draw that differs takes its place and is accepted as well. So the
tokens are those that single steps draw (Jacobi decoding with shared noise; arXiv 2410.01699, 2510.24211). What was drawn behind it is
the next drafts. Nothing is accepted behind the end of a row's line, whose next line's slots are not chosen yet. Where the memory allows,
a window looks ahead: what it has room for behind the line's end is drawn as well, so that the next line begins with better drafts.

Axes: I images, B sequences, T window, N image tokens, W tokens of a line, R = B x KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linert.graphs.stage import Geometry

NO_DRAFT = -1
"""An image token of which nothing was drawn yet."""


@dataclass(frozen=True)
class Window:
    """Where the window of every sequence lies.

    ``width``: T. ``at [B, T]``: positions, within the image's. ``starts [B]``: padding at the beginning of the condition. ``count
    [B]``: how many of the T positions are fed for good, 0 of a finished image; others may be looked ahead to, ``drawn [B]`` in all.
    ``in_prefix [B]`` bool: positions of the condition, all of which are accepted. ``column [B]``: of the first position, in its line.
    """

    geometry: Geometry
    width: int
    at: Tensor
    starts: Tensor
    count: Tensor
    drawn: Tensor
    in_prefix: Tensor
    column: Tensor

    @staticmethod
    def of(geometry: Geometry, width: int, position: Tensor, starts: Tensor, *, looks_ahead: bool) -> Window:
        """The window at ``position [B]``: to the end of the condition, of the line, or of what an image feeds."""
        config = geometry.config
        image_index = position - config.prefix_len
        in_prefix = image_index < 0
        column = image_index % config.line_width
        left_of_image = config.image_tokens - 1 - image_index
        left_of_line = torch.minimum(config.line_width - column, left_of_image)
        count = torch.where(in_prefix, -image_index, left_of_line).clamp(min=0, max=width)
        drawn = torch.where(in_prefix, count, left_of_image.clamp(min=0, max=width)) if looks_ahead else count
        last = config.prefix_len + config.image_tokens - 1
        at = (position[:, None] + torch.arange(width)).clamp(max=last)
        return Window(geometry, width, at, starts, count, drawn, in_prefix, column)

    @property
    def offset(self) -> Tensor:
        """``[T]``: 0 to T - 1."""
        return torch.arange(self.width)

    @property
    def fed(self) -> Tensor:
        """``[B, T]`` bool, the positions that are fed for good."""
        return self.offset < self.count[:, None]

    @property
    def last_fed(self) -> Tensor:
        """``[B]``, the last position of the window that is fed; 0 of a finished image."""
        return self.count.clamp(min=1) - 1

    @property
    def padded(self) -> Tensor:
        """``[B, T]`` bool, positions of padding."""
        return self.at < self.starts[:, None]

    @property
    def columns(self) -> Tensor:
        """``[B, T]``, of the positions in their line; of those behind its end the last."""
        return (self.column[:, None] + self.offset).clamp(max=self.geometry.config.line_width - 1)

    @property
    def sees(self) -> Tensor:
        """``[B, T, T]`` bool: which positions of the window each of them sees; padding is seen by itself alone."""
        offset = self.offset
        return ((offset <= offset[:, None]) & ~self.padded[:, None]) | (offset == offset[:, None])

    def drawn_index(self) -> Tensor:
        """``[B, T]``, the image tokens that the positions draw, within the image."""
        config = self.geometry.config
        return (self.at + 1 - config.prefix_len).clamp(min=0, max=config.image_tokens - 1)


def drafts(window: Window, token: Tensor, tokens: Tensor) -> Tensor:
    """The image tokens that a window feeds, ``[I, T]``.

    Args:
        token: ``[I]``, the last that was accepted; it comes first.
        tokens: ``[I, N]``, what is drawn so far. Where nothing is, the token above is the draft, and in the first line the last token.
    """
    geometry, config = window.geometry, window.geometry.config
    index = window.at[: geometry.images] - config.prefix_len
    known = tokens.gather(1, index.clamp(min=0))
    above = tokens.gather(1, (index - config.line_width).clamp(min=0))
    above = torch.where(index >= config.line_width, above, token[:, None])
    guessed = torch.where(known == NO_DRAFT, above, known)
    if config.newline_token is not None:
        ends = index % config.line_width == config.line_width - 1
        guessed = torch.where(ends, config.newline_token, guessed)
    return torch.where(window.offset == 0, token[:, None], guessed)


@dataclass(frozen=True)
class Accepted:
    """What is accepted of a window.

    ``last [B]``: the last position of the window that is accepted, 0 of a finished image. ``steps [B]``: how many are, 0 of a
    finished image.
    """

    window: Window
    last: Tensor
    steps: Tensor

    @staticmethod
    def of(window: Window, fed: Tensor, drawn: Tensor) -> Accepted:
        """Accept what was ``drawn [I, T]`` after ``fed [I, T]``."""
        geometry = window.geometry
        count = window.count[: geometry.images]
        prefix = window.in_prefix[: geometry.images]
        if window.width > 1:
            more = window.offset[1:] < count[:, None]
            right = ((fed[:, 1:] == drawn[:, :-1]) | prefix[:, None]) & more
            last = torch.where(right, window.width - 1, window.offset[:-1]).amin(1)
        else:
            last = torch.zeros_like(count)
        steps = torch.where(count > 0, last + 1, 0)
        return Accepted(window, last.repeat(geometry.branches), steps.repeat(geometry.branches))

    @property
    def mask(self) -> Tensor:
        """``[B, T]`` bool, the positions that are accepted."""
        return self.window.offset <= self.last[:, None]

    @property
    def written(self) -> Tensor:
        """``[B, T]`` bool, the positions whose keys and values stay: those that are accepted, but for padding before others."""
        last = self.window.offset == self.last[:, None]
        return (self.mask & ~self.window.padded) | last
