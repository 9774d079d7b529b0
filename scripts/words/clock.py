"""Training by the clock: how fast to learn, and a moving average of what was learned."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from linert.runtime.files.atomic_files import atomic_file


class Budget:
    """The seconds that a training may take, from its making on.

    Args:
        seconds: in all.
        spent: those that an earlier part of the same training took.
    """

    def __init__(self, seconds: float, spent: float = 0.0) -> None:
        self.seconds = seconds
        self.began = time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def share(self) -> float:
        """Of the time, how much is over."""
        return min(1.0, self.spent / self.seconds)

    def steps(self, first: int = 0) -> Iterable[int]:
        """Numbers of steps from ``first`` on, until the time is over."""
        step = first
        while self.share < 1:
            yield step
            step += 1

    def rate(self, step: int, peak: float, warmup: int) -> float:
        """The learning rate: a linear warm-up over so many steps, then a cosine over the time to a hundredth of the peak."""
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.share))
        return peak * cosine * min(1.0, (step + 1) / warmup)


class Every:
    """Says yes every so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        due = time.monotonic() - self.last >= self.seconds
        if due:
            self.last = time.monotonic()
        return due


class Average:
    """A moving average of a model's parameters; a short one while the model is young."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        self.pairs = list(zip(self.averaged.parameters(), model.parameters(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, values = (list(parameters) for parameters in zip(*self.pairs, strict=True))
        torch._foreach_lerp_(averages, values, weight)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Products in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16)


def optimizer(model: nn.Module, rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW in one kernel; vectors do not decay."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def save_halves(tensors: dict[str, Tensor], path: Path) -> None:
    """Write ``tensors`` in half precision."""
    halves = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in tensors.items()}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(halves))


def load_floats(path: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()}
