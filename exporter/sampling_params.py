"""A run's sampling settings as the tensors that PyTorch samples with."""

from __future__ import annotations

import torch

from linert.graphs.sampling import SamplingParams
from linert.runtime.bundles.sampling_settings import SamplingSettings


def sampling_params(settings: SamplingSettings) -> SamplingParams:
    """The sampler's scalars of ``settings``."""
    return SamplingParams(
        torch.tensor(settings.guidance),
        torch.tensor(settings.guidance_interval),
        torch.tensor(settings.temperature),
        torch.tensor(settings.top_k),
        torch.tensor(settings.top_p),
        torch.tensor(int(settings.greedy)),
    )
