"""Refuse weights that are NaN or infinite, or overflow in the format that they would be stored or computed in, before an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from linert.exporter.models import Loaded
from linert.exporter.precision import FLOATS, Weight, largest_of
from linert.graphs.transformer import part_of
from linert.runtime.errors import CheckpointError, ExportError

MOST_NAMED = 3
"""Tensors that a message names."""

FLOAT_NAMES = {dtype: str(precision) for precision, dtype in FLOATS.items()}


def check_numbers(model: Loaded[Any, Any], weights: Mapping[str, Weight], computed: torch.dtype) -> None:
    """Read all weights of a model, once, and raise where a bundle of them could not hold what they hold.

    Args:
        weights: its parameters by name, and what they are to be stored in.
        computed: what the model computes in.

    Raises:
        CheckpointError: numbers that are not finite; the message names the tensors.
        ExportError: numbers that are not finite in what they are to be stored or computed in.
    """
    largest = model.largest
    if None in largest.values():
        raise CheckpointError(_not_finite(model, largest))
    for name, size in largest.items():
        stored = weights[name].stored_as(computed)
        for dtype, what in ((stored, "stored"), (computed, "computed with")):
            if torch.tensor(size, dtype=torch.float64).to(dtype).isinf():
                raise ExportError(
                    f"{model.path}: {name} holds numbers up to {size:.6g}, and is to be {what} in {FLOAT_NAMES[dtype]}, which ends at "
                    f"{torch.finfo(dtype).max:.6g}: {_remedy(weights[name], dtype, what)}"
                )


def _not_finite(model: Loaded[Any, Any], largest: Mapping[str, float | None]) -> str:
    """What to say of a model with numbers that are not finite: its tensors by the names of the file, as far as they are there."""
    tensors = model.checkpoint.tensors
    if names := [name for name in model.sources if largest_of(tensors[name]) is None]:
        return (
            f"{model.path}: {_named(names)} holds numbers that are not finite: the file is damaged, or its training diverged; get "
            "another one"
        )
    made = [name for name, size in largest.items() if size is None]
    return f"{model.path}: the numbers of the file are so large that what is made of them, {_named(made)}, is not finite: get another file"


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MOST_NAMED
    return ", ".join(listed[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _remedy(weight: Weight, dtype: torch.dtype, what: str) -> str:
    if dtype is torch.float32:
        return "no precision here holds them"
    if what == "computed with":
        return "give --activations fp32"
    if weight.model == "image_decoder":
        return "give --image-decoder-precision fp32"
    if weight.model == "text_encoder":
        return "give --precision fp32"
    return f"give --keep {part_of(weight.name)}=fp32, or another --precision"
