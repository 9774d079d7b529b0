"""The ONNX Runtime backend on a CUDA device, for GPUs that have no TensorRT."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from linert.runtime.backends.base import Array, DeviceMemory
from linert.runtime.backends.ort_sessions import SessionBackend
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import TensorSpec
from linert.runtime.errors import BundleError, DeviceError, RequestError

if TYPE_CHECKING:
    from linert.runtime.backends.cuda import Device

BFLOAT16 = 16
"""ONNX's number of the type, which numpy lacks."""

PROVIDER = "CUDAExecutionProvider"

DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)
"""It makes 32-bit integers of biases for convolutions in int8, and there is no CUDA kernel that widens those."""

NOT_CAPTURED = frozenset({"prefill", "admit"})
"""Stages that run without a CUDA graph. ONNX Runtime copies outputs that are constants from the host once the operators have
run, and does not when it replays a graph; an empty state is constants."""


class OrtCudaBackend(SessionBackend):
    """Every tensor is device memory; ONNX Runtime captures stages as CUDA graphs and replays them.

    The first run of a session with a CUDA graph executes it three times: twice to allocate
    (``min_num_runs_before_cuda_graph_capture_`` of its CUDAExecutionProvider), and once more when it is captured. So a stage that
    updates states in place is run once when it is loaded, before an image begins. ONNX Runtime keeps a graph for each thread that
    runs the session (in ``PerThreadContext``), so that loading is a matter of the thread too.
    """

    disabled_optimizers = DISABLED_OPTIMIZERS

    def __init__(
        self, bundle: Bundle, stages: Iterable[str], *, cuda_graphs: bool = True, device: str = "cuda"
    ) -> None:
        """Prepare to run ``stages``.

        Args:
            cuda_graphs: False runs operators one by one, and those that have no kernel for CUDA on the CPU.
            device: ``cpu`` does the same on the CPU, to test with.

        Raises:
            BundleError: the bundle computes in a combination of types that ONNX Runtime has no kernels for.
            DeviceError: this ONNX Runtime has no CUDA, or finds no device.
        """
        precision = bundle.manifest.precision
        integers = {"int8", "int4"} & {precision.weights, *precision.parts.values()}
        if precision.activations == "bf16" and integers:
            raise BundleError(
                f"{bundle.path} computes in bf16 with weights in {' and '.join(sorted(integers))}, which ONNX Runtime widens on CUDA "
                "to fp32 and fp16 alone: export it with --activations fp16"
            )
        self.cuda_graphs = cuda_graphs
        self.device = device
        self._ready = Ready()
        if device == "cuda":
            if PROVIDER not in ort.get_available_providers():
                raise DeviceError(
                    f"ONNX Runtime {ort.__version__} has no CUDA here: pip uninstall onnxruntime, then "
                    "pip install 'linert[cuda]'"
                )
            # The CUDA and cuDNN of pip's packages are not on the loader's path.
            ort.preload_dlls()
            # It warns of what is no fault: that CUDA is no plugin, and that the call below is to go some day.
            ort.set_default_logger_severity(3)
            library = ort.capi._pybind_state
            if hasattr(library, "set_arena_extend_strategy"):
                # Tensors of 750 MB would each take a gigabyte of an arena that grows by powers of two.
                library.set_arena_extend_strategy(library.ArenaExtendStrategy.kSameAsRequested)
        super().__init__(bundle, stages)

    def load(self, stage: str) -> None:
        super().load(stage)
        if not self._counts_runs(stage) or stage in self._ready.stages:
            return
        # Whatever the last image left, every stage can run on an empty state.
        super().load("prefill")
        self._execute("prefill")
        self._execute(stage)
        self._ready.stages.add(stage)

    def device_memory(self) -> DeviceMemory | None:
        return None if self.device == "cpu" else self._memory

    @cached_property
    def _memory(self) -> Device:
        from linert.runtime.backends.cuda import Device

        return Device()

    def _close(self) -> None:
        super()._close()
        if "_memory" in vars(self):
            self._memory.close()

    def _counts_runs(self, stage: str) -> bool:
        """Whether it matters how many times the stage's first run executes: not if its inputs are what they were."""
        return self._captures(stage) and bool(self.stages[stage].in_place)

    def _run(self, stage: str) -> None:
        if self._counts_runs(stage) and stage not in self._ready.stages:
            raise RequestError(
                f"stage {stage} updates its state in place and must be loaded in this thread, before the image begins, since its "
                "first run executes several times"
            )
        super()._run(stage)

    def _allocate(self, spec: TensorSpec) -> ort.OrtValue:
        kind = BFLOAT16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), kind, self.device, 0)
        except Exception as error:
            # ONNX Runtime raises RuntimeErrors of several kinds.
            raise DeviceError(f"no device memory for {spec.name}: {error}") from error
        if spec.name not in self._states:
            value.update_inplace(np.zeros(spec.shape, spec.dtype))
        return value

    @cached_property
    def _states(self) -> frozenset[str]:
        """What an image's first stage writes: gigabytes that need not be zeroed before."""
        return frozenset(spec.name for spec in self.bundle.manifest.state)

    def _read(self, spec: TensorSpec) -> Array:
        if spec.dtype == "bfloat16":
            raise BundleError(f"{spec.name} is bf16, which ONNX Runtime does not hand to numpy")
        return np.array(self.value(spec.name).numpy())

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self.value(spec.name).update_inplace(np.ascontiguousarray(array))

    def _copy(self, source: ort.OrtValue, target: ort.OrtValue) -> None:
        # ONNX Runtime's GPUDataTransfer::CopyTensor (core/providers/cuda/gpu_data_transfer.cc) copies in CUDA's default stream and
        # waits for it (cudaStreamSynchronize), as it does in update_inplace of an array; a session's run waits for its own stream
        # before it returns (CUDAExecutionProvider::OnRunEnd). So nothing overlaps, and no graph holds these copies.
        target.update_inplace(source)

    def _session(self, stage: str) -> ort.InferenceSession:
        try:
            return super()._session(stage)
        except BundleError as error:
            operators = self.operators_without_kernel(stage) if self._captures(stage) else ""
            if not operators:
                raise
            raise BundleError(
                f"stage {stage} of {self.bundle.path} cannot be captured as a CUDA graph, since ONNX Runtime {ort.__version__} has "
                f"no CUDA kernels for {operators}: export it again by this version of linert, or give --no-cuda-graphs, which "
                "runs these on the CPU"
            ) from error

    def _captures(self, stage: str) -> bool:
        return self.cuda_graphs and stage not in NOT_CAPTURED

    def operators_without_kernel(self, stage: str) -> str:
        """Names and numbers of the operators that ONNX Runtime would run on the CPU; empty if there is another fault."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = [(PROVIDER, cuda_options(captured=False)), ("CPUExecutionProvider", {})]
        try:
            session = ort.InferenceSession(
                self.bundle.stage_path(stage),
                options,
                providers=providers,
                disabled_optimizers=list(self.disabled_optimizers),
            )
        except Exception:
            return ""
        counts = Counter(
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != PROVIDER
            for node in part.get_nodes()
        )
        return ", ".join(f"{operator} ({count})" for operator, count in sorted(counts.items()))

    def _providers(self, stage: str) -> list[tuple[str, Mapping[str, str]]]:
        if self.device == "cpu":
            return [("CPUExecutionProvider", {})]
        return [(PROVIDER, cuda_options(captured=self._captures(stage))), ("CPUExecutionProvider", {})]

    def _options(self, stage: str) -> ort.SessionOptions:
        return ort.SessionOptions()


class Ready(threading.local):
    """Stages whose first run is behind them in this thread."""

    def __init__(self) -> None:
        self.stages: set[str] = set()


def cuda_options(*, captured: bool) -> dict[str, str]:
    """Options of ONNX Runtime's CUDA provider.

    ``captured``: the session's runs become a CUDA graph. Products of float32 are float32's, not TF32's, and memory grows by what
    is asked for.
    """
    return {
        "device_id": "0",
        "enable_cuda_graph": str(int(captured)),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
