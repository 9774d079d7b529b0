"""Load ``tensorrt`` or ``tensorrt_rtx``, whichever is asked for, and find its shared object."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linert.runtime.errors import LinertError


@dataclass(frozen=True)
class Flavour:
    """``module``: its Python package. ``soname``: the name that its own parser loads it by, if its wheel lacks that name."""

    name: str
    module: str
    soname: str = ""

    def load(self) -> Any:
        """The Python module.

        Raises:
            LinertError: it is not installed, or its shared object cannot be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise LinertError(
                f"{self.module} cannot be loaded ({error}): pip install 'linert[{self.name}]'"
            ) from error

    def shared_object(self) -> Path | None:
        """The file that ``soname`` should be a name of, None where nothing is missing."""
        package = importlib.util.find_spec(f"{self.module}_libs")
        if not self.soname or package is None or not package.submodule_search_locations:
            return None
        for folder in package.submodule_search_locations:
            files = sorted(Path(folder).glob(f"{self.soname}.*"))
            if files and not (Path(folder) / self.soname).exists():
                return files[-1]
        return None


def make_logger(trt: Any, on_message: Callable[[str, bool], None]) -> Any:
    """A logger for ``trt`` that passes on every message, and whether it is an error."""
    errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

    class Logger(trt.ILogger):
        """TensorRT's own prints to standard error."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            on_message(message, severity in errors)

    return Logger()


FLAVOURS = {
    "rtx": Flavour("rtx", "tensorrt_rtx", "libtensorrt_rtx.so"),
    "tensorrt": Flavour("tensorrt", "tensorrt"),
}
