"""The weights in what a checkpoint file holds: in which container they are, and under which names."""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linert.graphs import text_encoder
from linert.graphs.families import FAMILIES, vq
from linert.runtime.errors import CheckpointError

CONTAINER_KEYS = ("model", "module", "state_dict")
"""Where a checkpoint may keep its weights, in LlamaGen's own order of choice."""

AVERAGED_KEY = "ema"
"""Where a training file keeps the moving average of its weights."""

MOST_CONTAINERS = 8
"""Containers within one another that are looked into."""

OUTER_WRAPPERS = frozenset({"model", "module", "state_dict"})
"""What training code puts before every name."""

INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch puts anywhere into names: compiled modules, modules whose weights are sharded or whose activations are computed again."""

LANDMARKS = (
    *(layout.landmark for family in FAMILIES.values() for layout in family.layouts),
    text_encoder.LAYOUT.landmark,
    *(f"{prefix}{vq.LANDMARK}" for prefix in vq.PREFIXES),
)
"""Tensors by which models are known."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""What weights may be stored in."""


@dataclass(frozen=True)
class StateDict:
    """The weights of a file.

    ``part``: the keys down to them, joined by dots; empty for a flat file. ``averaged``: whether a moving average stands beside
    them. ``training``: the arguments that they were trained with, where the file has them.
    """

    tensors: Mapping[str, Tensor]
    part: str = ""
    averaged: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)


def state_dict_of(path: Path, content: Any, *, ema: bool = False) -> StateDict:
    """Find the weights in what a file holds.

    Args:
        path: of the file, for messages.
        ema: take the moving average that a training file holds.

    Raises:
        CheckpointError: there are none, or no moving average; a tensor is of a kind that is not read.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    averaged = _weights_in(content.get(AVERAGED_KEY), (AVERAGED_KEY,))
    if ema and averaged is None:
        raise CheckpointError(f"{path} holds no ema weights; it holds {listed(content)}")
    chosen = averaged if ema else _weights_in(content)
    if chosen is None:
        raise CheckpointError(
            f"{path} holds no dictionary of weights: neither at its top nor under "
            f"{', '.join(CONTAINER_KEYS)}; it holds {listed(content)}"
        )
    keys, weights = chosen
    tensors = {
        name: _plain(path, name, value) for name, value in weights.items() if isinstance(value, Tensor)
    }
    training = content.get("args")
    if isinstance(training, argparse.Namespace | types.SimpleNamespace):
        training = vars(training)
    return StateDict(
        {str(name): tensor for name, tensor in tensors.items()},
        ".".join(keys),
        averaged is not None,
        dict(training) if isinstance(training, Mapping) else {},
    )


def _weights_in(content: Any, keys: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Mapping[Any, Any]] | None:
    """The first dictionary with tensors in it, in a container rather than beside one, and the keys down to it."""
    if not isinstance(content, Mapping) or len(keys) > MOST_CONTAINERS:
        return None
    for key in CONTAINER_KEYS:
        if inner := _weights_in(content.get(key), (*keys, key)):
            return inner
    if any(isinstance(value, Tensor) for value in content.values()):
        return keys, content
    return None


def _plain(path: Path, name: object, tensor: Tensor) -> Tensor:
    """A tensor without what training left on it.

    Raises:
        CheckpointError: its numbers do not lie in memory as those of dense tensors do.
    """
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(f"{path}: {name} is no dense tensor of numbers: save it as one")
    # A file may hang anything on a tensor, under the names of its methods as well.
    return Tensor.detach(tensor).resolve_neg()


def merged(files: Mapping[Path, StateDict], weight_map: Mapping[str, str], index: Path | None) -> StateDict:
    """The weights of several files; where two have a tensor of one name, the index says whose counts.

    Args:
        weight_map: file name by tensor, of the ``index``.

    Raises:
        CheckpointError: a tensor is not in the file that the index says.
    """
    tensors: dict[str, Tensor] = {}
    lost = []
    for path, state in files.items():
        tensors |= {
            name: tensor
            for name, tensor in state.tensors.items()
            if weight_map.get(name, path.name) == path.name
        }
    by_name = {path.name: state for path, state in files.items()}
    for name, file in weight_map.items():
        if name not in by_name[file].tensors:
            lost.append(name)
    if lost and index is not None:
        raise CheckpointError(
            f"{index.parent} lacks {listed(dict.fromkeys(lost))}, which {index.name} names: download its files again"
        )
    first = next(iter(files.values()))
    return StateDict(
        tensors, first.part, any(state.averaged for state in files.values()), dict(first.training)
    )


def unwrapped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names that their model has, without what training code put around them.

    Raises:
        CheckpointError: models stand behind different wrappers, or two tensors have one name without theirs.
    """
    bare = _renamed(path, tensors, _without_inner_wrappers)
    before = {prefix for name in bare for prefix in _wrappers_before_landmark(name)}
    if len(before) > 1:
        shown = " and ".join(repr(prefix) for prefix in sorted(before))
        raise CheckpointError(
            f"{path} holds weights behind {shown}: save those that are meant in a file of their own"
        )
    for prefix in before:
        bare = _renamed(path, bare, lambda name, prefix=prefix: name.removeprefix(prefix))
    return bare


def _renamed(path: Path, tensors: Mapping[str, Tensor], rename: Any) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in renamed:
            raise CheckpointError(
                f"{path} holds {new} twice, once behind a wrapper: save the weights that are meant in a file of their own"
            )
        renamed[new] = tensor
    return renamed


def _without_inner_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS)


def _wrappers_before_landmark(name: str) -> Iterator[str]:
    """What stands before a landmark in a name, if that is nothing but wrappers."""
    for landmark in LANDMARKS:
        if name == landmark or name.endswith(f".{landmark}"):
            prefix = name.removesuffix(landmark)
            if set(prefix.split(".")[:-1]) <= OUTER_WRAPPERS:
                yield prefix


def check_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` for a tensor without numbers, or with more than the file stores for it.

    A few bytes may be a tensor of any size if its rows are all the same one.
    """
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise CheckpointError(f"{path}: {name} is empty: its shape is {list(tensor.shape)}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, {math.prod(tensor.shape)} numbers, and the file stores fewer: save it "
                "with its repeated numbers written out"
            )


def listed(names: Mapping[Any, Any], most: int = 8) -> str:
    """The first names in order, for a message."""
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "") if ordered else "nothing"
