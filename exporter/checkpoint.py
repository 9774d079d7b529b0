"""Read published checkpoints: every container, memory-mapped, never running code from the file."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from runtime.bundle import file_sha256
from runtime.errors import CheckpointError
from runtime.manifest import Source

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""What tells which of many files a tensor is in."""

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "consolidated.pth")
"""What a folder with all tensors in one file calls it."""

SETTINGS_NAME = "config.json"
PROCESSING_NAMES = ("tokenizer_config.json", "processor_config.json")
TOKENIZER_NAME = "tokenizer.json"

CONTAINER_KEYS = ("model", "module", "state_dict")
"""Where a checkpoint may keep its weights, in LlamaGen's own order of choice."""

WRAPPER_PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before every name."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what stands beside them.

    Args:
        path: the file or folder, as it was asked for.
        files: those that hold the weights.
        tensors: by name, memory-mapped where the format allows.
        part: which part of a file they are ("model", "ema", ..., "" for a flat one).
        settings: ``config.json``; empty if there is none.
        processing: ``tokenizer_config.json`` and ``processor_config.json``, joined.
        tokenizer: the ``tokenizer.json``, if there is one.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    part: str
    settings: Mapping[str, Any]
    processing: Mapping[str, Any]
    tokenizer: Path | None

    @functools.cached_property
    def source(self) -> Source:
        """Digest and origin, for the manifest. Reads all files, once."""
        return Source(
            path=str(self.path.resolve()),
            sha256=digest_of(self.files),
            bytes=sum(file.stat().st_size for file in self.files),
            weights=self.part,
        )


def digest_of(files: Sequence[Path]) -> str:
    """sha256 of a file, or of the names and digests of several."""
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of the checkpoint at ``path``: itself, or those of a folder.

    Raises:
        CheckpointError: no such file or folder, none in it, or one of them is missing.
    """
    if path.is_file() and path.name not in INDICES:
        return (path,)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    for name in INDICES:
        if (folder / name).is_file():
            shards = sorted(set(_weight_map(folder / name).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {name} names")
            return tuple(folder / shard for shard in shards)
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return (folder / name,)
    raise CheckpointError(
        f"checkpoint {path} is a folder without weights: there is none of {', '.join((*INDICES, *SINGLE_FILES))}"
    )


def open_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Open a checkpoint: a ``.pt``/``.pth``/``.bin`` of torch.save, safetensors, or a folder of either, in one file or in shards.

    Args:
        ema: take the exponential moving average that a training file holds, instead of the weights.

    Raises:
        CheckpointError: no such file, truncated or corrupt, holding code, or holding no (ema) weights; a shard is missing, or
            has not the tensors that the index says.
    """
    files = weight_files(path)
    tensors: dict[str, Tensor] = {}
    part = ""
    for file in files:
        found, part = load_tensors(file, ema=ema)
        tensors |= found
    folder = files[0].parent
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is not None and len(files) > 1:
        lost = sorted(name for name in _weight_map(index) if name not in tensors)
        if lost:
            raise CheckpointError(f"{folder} lacks {_listed(dict.fromkeys(lost))}, which {index.name} names")
    processing: dict[str, Any] = {}
    for name in PROCESSING_NAMES:
        processing |= _json(folder / name)
    tokenizer = folder / TOKENIZER_NAME
    return Checkpoint(
        path,
        files,
        tensors,
        part,
        _json(folder / SETTINGS_NAME),
        processing,
        tokenizer if tokenizer.is_file() else None,
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    """File name by tensor, of an index."""
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in named.values()
    ):
        raise CheckpointError(f"{index} has no weight_map of file names in its folder")
    return named


def load_tensors(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """Load the weights of one file, memory-mapped where the format allows; the arguments are :func:`open_checkpoint`'s.

    Returns:
        The tensors by name, and which part of the file they are.
    """
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
    unknown: Iterable[str] = (),
) -> None:
    """Raise :class:`CheckpointError` listing, sorted, every missing, unexpected, misshapen or non-float tensor.

    Args:
        expected: name to shape of a complete model.
        what: the model's name, for the message.
        unknown: names of the checkpoint that belong to nothing that is known.
    """
    shared = sorted(tensors.keys() & expected.keys())
    lists = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted({*unknown, *(tensors.keys() - expected.keys())}),
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
