"""The ONNX Runtime backend, on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from linert.runtime.backends.base import Array
from linert.runtime.backends.host_memory import huge_pages, release_freed
from linert.runtime.backends.ort_sessions import SessionBackend
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import TensorSpec
from linert.runtime.errors import BundleError
from linert.runtime.machine import default_threads

DISABLED_OPTIMIZERS = ("MatMulScaleFusion", "MatMulAddFusion")
"""A scale fused into attention's MatMul takes it off the matrix-vector path and doubles its time. An addition fused
into a product hides that its weight is quantised, which then is widened every time."""

INTEGER_PRODUCTS = "4"
"""Accuracy level of products with quantised weights: activations are rounded to int8, block by block of each row. The
levels below widen the weights, which is slower than float32."""

CHANNEL_BLOCK = "128"
"""Block that weights with one scale a channel are cut into, and activations are rounded in. ONNX Runtime's usual 32 takes a
fifth longer."""


class OrtBackend(SessionBackend):
    """Every tensor is one numpy array."""

    disabled_optimizers = DISABLED_OPTIMIZERS

    def __init__(
        self, bundle: Bundle, stages: Iterable[str], *, threads: int = 0, profile: Path | None = None
    ) -> None:
        """Prepare to run ``stages``.

        ``threads`` of 0 is one a core that this process may use. ``profile`` is a folder to record the time of
        every node in (see :meth:`end_profile`).

        Raises:
            BundleError: the bundle computes in a type that the CPU has no operators for.
        """
        # ONNX Runtime counts the cores of the machine, and its threads spin on those that this process may not use.
        usable = default_threads()
        self.threads = threads or (usable if usable < (os.cpu_count() or 1) else 0)
        self.profile = profile
        self._arrays: dict[str, Array] = {}
        super().__init__(bundle, stages)
        if any(spec.dtype == "bfloat16" for spec in self.specs.values()):
            raise BundleError(
                f"{bundle.path} computes in bf16, which ONNX Runtime does not on the CPU: "
                "export it with --activations fp32 (weights can stay bf16)"
            )

    def _session(self, stage: str) -> ort.InferenceSession:
        with huge_pages():
            session = super()._session(stage)
        release_freed()
        return session

    def array(self, name: str) -> Array:
        """The live memory of tensor ``name``, not a copy."""
        self.value(name)
        return self._arrays[name]

    def end_profile(self, stage: str) -> Path:
        """Stop recording ``stage``; the file with ONNX Runtime's trace events (JSON) of all its runs."""
        session, _ = self._bindings[stage]
        return Path(session.end_profiling())

    def _close(self) -> None:
        super()._close()
        self._arrays.clear()

    def _read(self, spec: TensorSpec) -> Array:
        return self.array(spec.name).copy()

    def _write(self, spec: TensorSpec, array: Array) -> None:
        np.copyto(self.array(spec.name), array)

    def _allocate(self, spec: TensorSpec) -> ort.OrtValue:
        array = np.zeros(spec.shape, spec.dtype)
        # The first is the tensor itself, a later one a place beside it.
        self._arrays.setdefault(spec.name, array)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def _copy(self, source: ort.OrtValue, target: ort.OrtValue) -> None:
        # ONNX Runtime's own update_inplace takes no OrtValue before 1.31.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.tensor_size_in_bytes())

    def _providers(self, stage: str) -> list[tuple[str, Mapping[str, str]]]:
        return [("CPUExecutionProvider", {})]

    def _options(self, stage: str) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        if stage == "vq_decoder":
            # Its maps are hundreds of megabytes: laid out one by one, and given back after their last reader instead of
            # kept for the next map of the size, they need half of the memory, and the first image waits for less of it
            # to be touched.
            options.enable_mem_pattern = options.enable_mem_reuse = False
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / stage)
        # Sessions take turns; one that keeps spinning steals the cores of the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INTEGER_PRODUCTS)
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", CHANNEL_BLOCK)
        return options
