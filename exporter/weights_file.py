"""The shared weights file of a bundle: tensors one after another, each once, on page boundaries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor

WEIGHT_ALIGNMENT = 4096
"""Offsets in the weights file are multiples of a page, so that a runtime can map them."""


class WeightsFile:
    """Appends tensors to the shared weights file; the same tensor is stored once.

    Use as a context manager; ``digest`` is the sha256 of what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._offset = 0
        self._stored: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> WeightsFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def nbytes(self) -> int:
        return self._offset

    def store(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, blocks: Callable[[], Iterable[Tensor]]
    ) -> ir.ExternalTensor:
        """Write the tensor that ``blocks`` yields piece by piece, unless ``name`` is stored already.

        Returns:
            A reference to where it lies.

        Raises:
            OSError: the file cannot be written.
            ValueError: ``name`` is stored with another shape or dtype.
        """
        known = self._stored.get(name)
        if known is not None:
            if (tuple(known.shape.numpy()), known.dtype) != (tuple(shape), dtype):
                raise ValueError(
                    f"{name}: stored as {known.dtype} {known.shape}, wanted as {dtype} {tuple(shape)}"
                )
            return known
        self._write(b"\0" * (-self._offset % WEIGHT_ALIGNMENT))
        offset = self._offset
        for block in blocks():
            self._write(block.contiguous().view(torch.uint8).numpy().data)
        reference = ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=self._offset - offset,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )
        self._stored[name] = reference
        return reference

    def _write(self, data: bytes | memoryview) -> None:
        if self._file is None:
            raise ValueError("the weights file is not open")
        self._file.write(data)
        self._hash.update(data)
        self._offset += memoryview(data).nbytes
