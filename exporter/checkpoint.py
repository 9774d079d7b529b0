"""Read published checkpoints: every container, memory-mapped, never running code from the file."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from runtime.errors import CheckpointError

CONTAINER_KEYS = ("model", "module", "state_dict")
"""Where a checkpoint may keep its weights, in LlamaGen's own order of choice."""

WRAPPER_PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before every name."""


def load_tensors(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """Load a checkpoint's weights, memory-mapped where the format allows.

    Args:
        path: ``.pt``/``.pth`` of torch.save, or safetensors.
        ema: take the exponential moving average that a training file holds, instead of the weights.

    Returns:
        The tensors by name, and which part of the file they are ("model", "ema", ..., "" for a flat file).

    Raises:
        CheckpointError: no such file, truncated or corrupt, holding code, or holding no (ema) weights.
    """
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {found}")
    content = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    part, tensors = _choose(path, content, ema)
    for prefix in WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, part


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    ignored: Iterable[str] = (),
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    """Raise :class:`CheckpointError` listing, sorted, every missing, unexpected, misshapen or non-float tensor.

    Args:
        expected: name to shape of a complete model.
        what: the model's name, for the message.
        ignored: names that may be there and are not used.
        ignored_prefixes: beginnings of such names.
    """
    skip = set(ignored)
    extra = [
        name
        for name in tensors
        if name not in expected and name not in skip and not name.startswith(ignored_prefixes or "\0")
    ]
    shared = sorted(tensors.keys() & expected.keys())
    lists = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(extra),
        "wrong shape": [
            f"{name} {list(tensors[name].shape)} (expected {list(expected[name])})"
            for name in shared
            if tuple(tensors[name].shape) != tuple(expected[name])
        ],
        "not floating point": [
            f"{name} {tensors[name].dtype}" for name in shared if not tensors[name].is_floating_point()
        ],
    }
    if any(lists.values()):
        lines = [f"{path} does not hold {what}:"]
        for title, names in lists.items():
            lines += [f"  {title}: {name}" for name in names]
        raise CheckpointError("\n".join(lines))


def _is_safetensors(path: Path) -> bool:
    """Judge by content: a header length followed by a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and length < 100_000_000


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error


def _load_torch(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is corrupt: the checksum of {damaged} does not match")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        if "Unsupported global" in str(error) or "WeightsUnpickler error" in str(error):
            raise CheckpointError(
                f"{path} holds Python code or objects that are not weights; refused, nothing of it was run. "
                "Save the plain tensors (torch.save of the state dict, or safetensors) and try again. "
                f"({_named_global(str(error)) or reason})"
            ) from error
        raise CheckpointError(f"{path} is truncated, corrupt or no checkpoint: {reason}") from error
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged pickle stream fails in whatever way its bytes lead to.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated, corrupt or no checkpoint: {reason}") from error


def _named_global(message: str) -> str:
    """The sentence of torch's message that names what it refused."""
    for line in message.splitlines():
        if "Unsupported global" in line or "Unsupported operand" in line:
            return line.strip().removeprefix("WeightsUnpickler error: ")
    return ""


def _choose(path: Path, content: Any, ema: bool) -> tuple[str, dict[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    if ema:
        if not isinstance(content.get("ema"), Mapping):
            raise CheckpointError(f"{path} holds no ema weights; it holds {_listed(content)}")
        return "ema", _only_tensors(path, content["ema"])
    for key in CONTAINER_KEYS:
        if isinstance(content.get(key), Mapping):
            return key, _only_tensors(path, content[key])
    return "", _only_tensors(path, content)


def _only_tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(content):
        raise CheckpointError(
            f"{path} holds no dictionary of weights: neither at its top nor under "
            f"{', '.join(CONTAINER_KEYS)}; it holds {_listed(content)}"
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _listed(content: Mapping[Any, Any], most: int = 8) -> str:
    names = sorted(str(name) for name in content)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "nothing"
