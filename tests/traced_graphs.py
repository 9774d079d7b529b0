"""Every distinct stage is traced once, however many tests export it: a store keyed by what a stage is, shared by the workers.

Tracing takes nine tenths of the time of a small export, and its result depends on the stage's structure and shapes alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import torch
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

from linert.exporter import onnx_export
from linert.exporter.onnx_export import Traced
from linert.graphs.stage import Stage

ROOT = Path(__file__).parents[1]
SOURCES = (
    *sorted((ROOT / "graphs").rglob("*.py")),
    *(ROOT / "exporter" / name for name in ("onnx_export.py", "weight_storage.py", "operations.py")),
)
"""Of what the stages compute, and of how they are traced."""

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")


def fingerprint(stage: Stage) -> str:
    """Digest of everything that ``stage`` holds: classes, settings, shapes of parameters, contents of buffers.

    Raises:
        TypeError: it holds something of a kind that is not known here; two stages might then be taken for one.
    """
    told = repr(_told(stage, {})).encode()
    sources = b"".join(path.read_bytes() for path in SOURCES)
    versions = " ".join(importlib.metadata.version(name) for name in PACKAGES)
    return hashlib.sha256(told + sources + versions.encode()).hexdigest()


def _told(value: Any, seen: dict[int, int]) -> Any:
    """Nested tuples of what ``value`` is. Objects that stand there twice are told once."""
    if value is None or isinstance(
        value, bool | int | float | str | bytes | torch.dtype | torch.device | Enum
    ):
        return value
    if id(value) in seen:
        return "seen", seen[id(value)]
    if isinstance(value, torch.nn.Parameter):
        return "parameter", tuple(value.shape), str(value.dtype)
    seen[id(value)] = len(seen)
    if isinstance(value, torch.Tensor):
        content = (
            "meta" if value.is_meta else value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
        return "tensor", tuple(value.shape), str(value.dtype), content
    if isinstance(value, np.ndarray):
        return "array", value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, list | tuple):
        return type(value).__qualname__, [_told(part, seen) for part in value]
    if isinstance(value, set | frozenset):
        return "set", sorted(map(repr, value))
    if isinstance(value, Mapping):
        return "mapping", [(key, _told(part, seen)) for key, part in value.items()]
    if isinstance(value, msgspec.Struct):
        return type(value).__qualname__, _told(msgspec.structs.asdict(value), seen)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, _told(getattr(value, field.name), seen)) for field in dataclasses.fields(value)]
        return type(value).__qualname__, parts
    if isinstance(value, torch.nn.Module):
        parts = [(name, _told(part, seen)) for name, part in vars(value).items() if "hook" not in name]
        return type(value).__qualname__, parts
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return value.__module__, value.__qualname__
    if type(value).__module__.startswith(("linert.graphs.", "tests.")):
        return type(value).__qualname__, _told(vars(value), seen)
    raise TypeError(f"{type(value)} in a stage: say in tests/traced_graphs.py what tells two of them apart")


class TraceStore:
    """Stands for :func:`linert.exporter.onnx_export.trace`; ``folder`` is shared by all workers and runs."""

    def __init__(self, folder: Path) -> None:
        self._trace, self._folder = onnx_export.trace, folder
        # PyTorch makes the table of all its operators again for every graph, which takes a third of a second.
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: Stage) -> Traced:
        key = fingerprint(stage)
        graph, constants = self._folder / f"{key}.onnx", self._folder / f"{key}.pt"
        with FileLock(self._folder / f"{key}.lock"):
            if not graph.exists():
                traced = self._trace(stage)
                torch.save(traced.constants, constants)
                partial = graph.with_suffix(".partial")
                onnx.save(ir.to_proto(traced.model), partial)
                partial.replace(graph)
        # What was just traced is read back as well: a stored graph and a new one are treated alike.
        return Traced(ir.from_proto(onnx.load(graph)), torch.load(constants))
