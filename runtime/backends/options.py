"""Names and options of the backends, and what opens one. A new backend is added here; each is imported when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.errors import LinertError, RequestError

MOST_THREADS = max(256, os.cpu_count() or 1)
"""Most threads that are started: those that share a core wait for one another."""


class BackendName(StrEnum):
    """Where stages run: ONNX Runtime on the CPU or on a CUDA device, TensorRT for RTX, TensorRT."""

    CPU = "cpu"
    CUDA = "cuda"
    RTX = "rtx"
    TENSORRT = "tensorrt"

    @property
    def extra(self) -> str:
        """The optional dependencies that it needs, by their name in ``pip install 'linert[...]'``."""
        return EXTRAS[self]


EXTRAS = {
    BackendName.CPU: "cpu",
    BackendName.CUDA: "cuda",
    BackendName.RTX: "rtx",
    BackendName.TENSORRT: "tensorrt",
}


@dataclass(frozen=True)
class BackendOptions:
    """How stages run. ``threads``: of the CPU, 0 is one a core. ``cuda_graphs``: False launches operations one by one.

    Raises:
        RequestError: ``threads`` is negative or more than :data:`MOST_THREADS`.
    """

    name: BackendName = BackendName.CPU
    threads: int = 0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MOST_THREADS:
            raise RequestError(
                f"{self.threads} threads asked for: give 1 to {MOST_THREADS}, or 0 for one a core"
            )

    def open(self, bundle: Bundle, stages: Iterable[str]) -> Backend:
        """A backend for ``stages`` of ``bundle``.

        Raises:
            BundleError: the bundle cannot run there.
            DeviceError: there is no such device here.
            LinertError: the runtime is not installed.
        """
        try:
            return self._open(bundle, stages)
        except ModuleNotFoundError as error:
            raise LinertError(
                f"--backend {self.name} needs {error.name}, which is not installed: pip install 'linert[{self.name.extra}]'"
            ) from error

    def _open(self, bundle: Bundle, stages: Iterable[str]) -> Backend:
        if self.name is BackendName.CPU:
            from linert.runtime.backends.ort import OrtBackend

            return OrtBackend(bundle, stages, threads=self.threads)
        if self.name is BackendName.CUDA:
            from linert.runtime.backends.ort_cuda import OrtCudaBackend

            return OrtCudaBackend(bundle, stages, cuda_graphs=self.cuda_graphs)
        from linert.runtime.backends.trt import TrtBackend
        from linert.runtime.backends.trt_flavour import FLAVOURS

        return TrtBackend(bundle, stages, FLAVOURS[self.name], cuda_graphs=self.cuda_graphs)
