"""The ONNX Runtime backend on a CUDA device, for GPUs that have no TensorRT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from runtime.backend import Array, DeviceMemory
from runtime.bundle import Bundle
from runtime.errors import BundleError, DeviceError
from runtime.manifest import TensorSpec
from runtime.ort_sessions import SessionBackend

if TYPE_CHECKING:
    from runtime.cuda import Device

BFLOAT16 = 16
"""ONNX's number of the type, which numpy lacks."""

PROVIDER = "CUDAExecutionProvider"


class OrtCudaBackend(SessionBackend):
    """Every tensor is device memory; ONNX Runtime captures each stage as a CUDA graph and replays it."""

    def __init__(
        self, bundle: Bundle, stages: Iterable[str], *, cuda_graphs: bool = True, device: str = "cuda"
    ) -> None:
        """Allocate the tensors of ``stages``.

        Args:
            cuda_graphs: False runs operators one by one, and those that have no kernel for CUDA on the CPU.
            device: ``cpu`` does the same on the CPU, to test with.

        Raises:
            DeviceError: this ONNX Runtime has no CUDA, or finds no device.
        """
        self.cuda_graphs = cuda_graphs
        self.device = device
        if device == "cuda":
            if PROVIDER not in ort.get_available_providers():
                raise DeviceError(
                    f"ONNX Runtime {ort.__version__} has no CUDA here: pip uninstall onnxruntime, then "
                    "pip install 'linert[cuda]'"
                )
            # The CUDA and cuDNN of pip's packages are not on the loader's path.
            ort.preload_dlls()
        super().__init__(bundle, stages)

    def device_memory(self) -> DeviceMemory | None:
        return None if self.device == "cpu" else self._memory

    @cached_property
    def _memory(self) -> Device:
        from runtime.cuda import Device

        return Device()

    def _close(self) -> None:
        super()._close()
        if "_memory" in vars(self):
            self._memory.close()

    def _allocate(self, spec: TensorSpec) -> ort.OrtValue:
        kind = BFLOAT16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), kind, self.device, 0)
        except Exception as error:
            # ONNX Runtime raises RuntimeErrors of several kinds.
            raise DeviceError(f"no device memory for {spec.name}: {error}") from error
        if spec.dtype != "bfloat16":
            value.update_inplace(np.zeros(spec.shape, spec.dtype))
        return value

    def _read(self, spec: TensorSpec) -> Array:
        if spec.dtype == "bfloat16":
            raise BundleError(f"{spec.name} is bf16, which ONNX Runtime does not hand to numpy")
        return np.array(self._values[spec.name].numpy())

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._values[spec.name].update_inplace(np.ascontiguousarray(array))

    def _copy(self, source: ort.OrtValue, target: ort.OrtValue) -> None:
        target.update_inplace(source)

    def _providers(self) -> list[tuple[str, Mapping[str, str]]]:
        if self.device == "cpu":
            return [("CPUExecutionProvider", {})]
        graphs = {"enable_cuda_graph": "1" if self.cuda_graphs else "0"}
        return [(PROVIDER, {"device_id": "0", **graphs}), ("CPUExecutionProvider", {})]

    def _options(self, stage: str) -> ort.SessionOptions:
        return ort.SessionOptions()
