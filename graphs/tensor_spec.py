"""Name, type and shape of a stage's input or output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

NEXT = ".next"
"""Suffix of the output that replaces a state."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and static shape of a stage's input or output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def next(self) -> TensorSpec:
        return replace(self, name=self.name + NEXT)

    @property
    def nbytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize
