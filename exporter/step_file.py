"""A temporary file on disk for arrays of many steps, like log-probabilities, that together are too large for memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linert.runtime.errors import OutputError


class StepFile:
    """Arrays of one shape and type in a file without a name, which vanishes with the process whatever ends it.

    Args:
        folder: on whose disk the file is.

    Raises:
        OutputError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)
        self.steps = 0
        with self._errors():
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def append(self, array: NDArray[Any]) -> None:
        """Write the array of the next step.

        Raises:
            OutputError: the disk is full.
        """
        if self.steps and (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"a step of {array.dtype} {array.shape} among ones of {self.dtype} {self.shape}")
        self.shape, self.dtype = array.shape, array.dtype
        with self._errors():
            self.file.write(np.ascontiguousarray(array).data)
        self.steps += 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """The arrays in the order of their steps, one at a time."""
        with self._errors():
            self.file.seek(0)
        for _ in range(self.steps):
            array = np.empty(self.shape, self.dtype)
            with self._errors():
                self.file.readinto(array.data.cast("B"))  # type: ignore[attr-defined]
            yield array

    def __enter__(self) -> StepFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written need not be.
        with contextlib.suppress(OSError):
            self.file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot keep log-probabilities of a batch in {self.folder}: {error.strerror or error}; make room there, "
                "or give another --out"
            ) from error
