"""Name, type and shape of a stage's input or output, and of the state between stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

NEXT = ".next"
"""Suffix of the output that replaces a state."""


@dataclass(frozen=True)
class StageTensor:
    """Name, dtype and static shape of a stage's input or output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def next(self) -> StageTensor:
        """The output that replaces this state."""
        return StageTensor(self.name + NEXT, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StateTensor(StageTensor):
    """A state between stages. ``kind``: what it is, in whichever ``layer``; None where it belongs to all. ``axes``: what each counts."""

    kind: str
    layer: int | None
    axes: tuple[str, ...]

    @staticmethod
    def of(kind: str, dtype: torch.dtype, sides: Mapping[str, int], layer: int | None = None) -> StateTensor:
        """The state of that kind with these ``sides``, by what they count; a layer's is called ``kind.layer``."""
        name = kind if layer is None else f"{kind}.{layer}"
        return StateTensor(name, dtype, tuple(sides.values()), kind, layer, tuple(sides))
