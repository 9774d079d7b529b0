"""Read published checkpoints: every container, memory-mapped, never running code from the file."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from linert.exporter.state_dicts import (
    AVERAGED_KEY,
    FLOATS,
    StateDict,
    listed,
    merged,
    state_dict_of,
    unwrapped,
)
from linert.exporter.torch_files import load_torch
from linert.runtime.bundles.bundle import file_sha256
from linert.runtime.bundles.manifest import Source
from linert.runtime.errors import CheckpointError
from linert.runtime.files.text_files import is_lfs_pointer, is_utf8, lfs_remedy, read_json_object

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""What tells which of many files a tensor is in."""

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "consolidated.pth")
"""What a folder with all tensors in one file calls it."""

SETTINGS_NAME = "config.json"
PROCESSING_NAMES = ("tokenizer_config.json", "processor_config.json")
TOKENIZER_NAME = "tokenizer.json"

SHARD = re.compile(r".+-[0-9]{5}-of-[0-9]{5}\.(safetensors|bin)")
"""Names of files that hold a part of the tensors."""

CACHED = re.compile("models--.+?--(.+)")
"""Folders of a hub's cache: one a repository, with ``snapshots/<revision>`` whose files are links to ``blobs/<digest>``."""

MOST_LISTED = 8
"""Tensors of a kind that a message names."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights and what stands beside them.

    Args:
        path: the file or folder, as it was asked for.
        files: those that hold the weights.
        tensors: by name, memory-mapped where the format allows.
        part: which part of a file they are ("model", "ema", "state_dict.model", ..., "" for a flat one).
        settings: ``config.json``; empty if there is none.
        processing: ``tokenizer_config.json`` and ``processor_config.json``, joined.
        tokenizer: the ``tokenizer.json``, if there is one.
        training: arguments of the training, where the file holds them.
        averaged: whether the file holds a moving average of the weights.
        remarks: what was passed over, for people.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    part: str
    settings: Mapping[str, Any]
    processing: Mapping[str, Any]
    tokenizer: Path | None
    training: Mapping[str, Any]
    averaged: bool
    remarks: tuple[str, ...]

    @functools.cached_property
    def source(self) -> Source:
        """Digest and origin, for the manifest. Reads all files, once."""
        # A link of a hub's cache is followed to nothing that could be read without its neighbours.
        path = os.path.abspath(self.path)
        return Source(
            path=path,
            sha256=digest_of(self.files),
            bytes=sum(file.stat().st_size for file in self.files),
            weights=self.part,
        )

    @property
    def takes_averaged(self) -> bool:
        """Whether ``tensors`` are the moving average."""
        return is_averaged(self.part)

    @property
    def text(self) -> str:
        """What was taken, for people."""
        if self.takes_averaged:
            return f"{self.path}, its moving average"
        return f"{self.path}, its weights and not its moving average" if self.averaged else f"{self.path}"


def is_averaged(part: str) -> bool:
    """Whether a part of a file, as in :attr:`Checkpoint.part`, is the moving average."""
    return part.split(".")[0] == AVERAGED_KEY


def digest_of(files: Sequence[Path]) -> str:
    """sha256 of a file, or of the names and digests of several."""
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights of a checkpoint.

    ``index``: what says which of them a tensor is in, and ``weight_map`` says it; None and empty for a single file without one.
    ``remarks``: what was passed over.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None
    remarks: tuple[str, ...] = ()


def find_weights(path: Path) -> WeightFiles:
    """The files that hold the weights of the checkpoint at ``path``: itself, or those of a folder.

    Of several sets in a folder the first that is complete is taken, safetensors before pickles.

    Raises:
        CheckpointError: no such file or folder, or none in it that is complete.
    """
    if not is_utf8(str(path)):
        raise CheckpointError(f"the name of checkpoint {path} is not in UTF-8: rename it")
    try:
        if path.is_file() and path.name not in INDICES:
            if SHARD.fullmatch(path.name) and any((path.parent / name).is_file() for name in INDICES):
                raise CheckpointError(
                    f"{path} holds a part of the tensors: give its folder, {path.parent}, as the checkpoint"
                )
            return WeightFiles((path,))
        folder = path.parent if path.is_file() else path
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist")
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    folder = snapshot_of(folder)
    incomplete: list[str] = []
    for name in (path.name,) if path.name in INDICES else INDICES:
        index = folder / name
        if not index.is_file():
            continue
        weight_map = read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            incomplete.append(f"{folder} lacks {listed(dict.fromkeys(missing))}, which {name} names")
            continue
        return WeightFiles(
            tuple(folder / shard for shard in shards), index, weight_map, _passed_over(incomplete)
        )
    for name in () if path.name in INDICES else SINGLE_FILES:
        if (folder / name).is_file():
            return WeightFiles((folder / name,), remarks=_passed_over(incomplete))
    if incomplete:
        raise CheckpointError(f"{'; '.join(incomplete)}: download what is missing")
    raise CheckpointError(
        f"checkpoint {path} is a folder without weights: there is none of {', '.join((*INDICES, *SINGLE_FILES))}"
    )


def _passed_over(incomplete: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"passed over: {fault}" for fault in incomplete)


def snapshot_of(folder: Path) -> Path:
    """The revision in a repository's folder of a hub's cache; any other folder itself.

    Raises:
        CheckpointError: the folder holds several, and does not say which is meant.
    """
    if not (CACHED.fullmatch(folder.name) and (folder / "snapshots").is_dir()):
        return folder
    revisions = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        named = main.read_bytes()[:99].decode(errors="replace").strip()
        revisions = [path for path in revisions if path.name == named] or revisions
    if len(revisions) == 1:
        return revisions[0]
    raise CheckpointError(
        f"{folder} holds {len(revisions)} revisions and no refs/main that says which is meant: give one of the folders in its snapshots"
    )


def names_of(path: Path) -> list[str]:
    """What a checkpoint is called, the name that was given first: a file of a usual name goes by its folder's, and a revision in a
    hub's cache by its repository's; what a link leads to comes last."""
    unresolved = Path(os.path.abspath(path))
    names = []
    for place in dict.fromkeys((unresolved, path.resolve())):
        usual = place.is_file() and place.name in (*INDICES, *SINGLE_FILES)
        named = place.parent if usual else place
        names.append(named.name)
        names += [repository[1] for part in reversed(named.parts) if (repository := CACHED.fullmatch(part))]
    return names


def open_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Open a checkpoint: a ``.pt``/``.pth``/``.bin`` of torch.save, safetensors, or a folder of either, in one file or in shards.

    Args:
        ema: take the exponential moving average that a training file holds, instead of the weights.

    Raises:
        CheckpointError: no such file, truncated or corrupt, holding code, or holding no (ema) weights; a shard is missing, or
            has not the tensors that the index says.
    """
    weights = find_weights(path)
    states = {file: load_state_dict(file, ema=ema) for file in weights.files}
    state = merged(states, weights.weight_map or {}, weights.index)
    folder = weights.files[0].parent
    processing: dict[str, Any] = {}
    for name in PROCESSING_NAMES:
        processing |= _object_at(folder / name)
    tokenizer = folder / TOKENIZER_NAME
    return Checkpoint(
        path=path,
        files=weights.files,
        tensors=unwrapped(path, state.tensors),
        part=state.part,
        settings=_object_at(folder / SETTINGS_NAME),
        processing=processing,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        training=state.training,
        averaged=state.averaged,
        remarks=weights.remarks,
    )


def _object_at(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json_object(path, CheckpointError) if path.is_file() else {}


def read_weight_map(index: Path) -> dict[str, str]:
    """File name by tensor, of an index.

    Raises:
        CheckpointError: it has none, an empty one, or one of files elsewhere.
    """
    named = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(named, dict) or not all(_is_file_name(name) for name in named.values()):
        raise CheckpointError(f"{index} has no weight_map of file names in its folder")
    if not named:
        raise CheckpointError(f"{index} is empty: its weight_map names no tensor; download it again")
    return named


def _is_file_name(name: object) -> bool:
    """Whether ``name`` may be that of a file beside another one."""
    return (
        isinstance(name, str) and bool(re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,255}", name)) and name != ".."
    )


def load_state_dict(path: Path, *, ema: bool = False) -> StateDict:
    """Load the weights of one file, memory-mapped where the format allows; arguments and errors are :func:`open_checkpoint`'s."""
    if is_lfs_pointer(path):
        raise CheckpointError(lfs_remedy(path))
    content = _load_safetensors(path) if _is_safetensors(path) else load_torch(path)
    return state_dict_of(path, content, ema=ema)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def checked_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    unknown: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The ``expected`` ones of ``tensors``, which must be all.

    Tensors of truth values beside them are masks, and single integers are counters of steps: no model has such weights, and they are
    left out.

    Args:
        expected: name to shape of a complete model.
        what: the model's name, for the message.
        unknown: tensors of the checkpoint, by its names, that belong to nothing that is known.

    Raises:
        CheckpointError: naming, sorted, what is missing, unexpected, misshapen or no floating-point tensor.
    """
    shared = sorted(tensors.keys() & expected.keys())
    others = {**unknown, **{name: tensors[name] for name in tensors.keys() - expected.keys()}}
    lists = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(name for name, tensor in others.items() if not _is_mask_or_counter(tensor)),
        "wrong shape": [
            f"{name} {list(tensors[name].shape)} (expected {list(expected[name])})"
            for name in shared
            if tuple(tensors[name].shape) != tuple(expected[name])
        ],
        "not floating point": [
            f"{name} {tensors[name].dtype}" for name in shared if tensors[name].dtype not in FLOATS
        ],
    }
    if any(lists.values()):
        lines = [f"{path} does not hold {what}:"]
        for title, names in lists.items():
            lines += [f"  {title}: {name}" for name in names[:MOST_LISTED]]
            if len(names) > MOST_LISTED:
                lines.append(f"  {title}: {len(names) - MOST_LISTED} more")
        raise CheckpointError("\n".join(lines))
    return {name: tensors[name] for name in expected}


def _is_mask_or_counter(tensor: Tensor) -> bool:
    real = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return tensor.dtype is torch.bool or (tensor.ndim == 0 and not real)


def _is_safetensors(path: Path) -> bool:
    """Judge by content: a header length followed by a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and length < 100_000_000


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        # The library raises what its own parts and torch's raise for whatever is wrong with a file.
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or corrupt: {reason}") from error
