"""Compiled kernels in a file of their own, for a machine that has neither Triton nor PyTorch nor ONNX.

The file is a compressed MessagePack list of :class:`Carried`; ``python -m exporter.tensorrt.carried`` writes it.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import DeviceError
from runtime.plugins import OPERATIONS
from runtime.plugins.base import Launch
from runtime.plugins.kernels import KernelSet


class Carried(msgspec.Struct, frozen=True):
    """The kernels of one operation on one shape: its name, its launch parameters as stored, and what was compiled for them."""

    operation: str
    launch: dict[str, Any]
    kernels: KernelSet


def read_kernels(path: Path) -> list[tuple[str, Launch, KernelSet]]:
    """The operation's name, the launch and the kernels of everything in a file.

    Raises:
        DeviceError: the file cannot be read, or was written by another version of linert.
    """
    try:
        entries = msgspec.msgpack.decode(zlib.decompress(path.read_bytes()), type=list[Carried])
        return [
            (
                entry.operation,
                msgspec.convert(entry.launch, OPERATIONS[entry.operation].launch_type),
                entry.kernels,
            )
            for entry in entries
        ]
    except (OSError, zlib.error, msgspec.DecodeError, KeyError, ValueError) as error:
        raise DeviceError(
            f"{path} holds no kernels that this version can launch ({error}); write it again with python -m "
            "exporter.tensorrt.carried"
        ) from error
