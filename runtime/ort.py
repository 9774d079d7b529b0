"""The ONNX Runtime backend, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.backend import Array, Backend
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.manifest import StageSpec, TensorSpec
from runtime.memory import huge_pages, release_freed

DISABLED_OPTIMIZERS = ["MatMulScaleFusion", "MatMulAddFusion"]
"""A scale fused into attention's MatMul takes it off the matrix-vector path and doubles its time. An addition fused
into a product hides that its weight is quantised, which then is widened every time."""

INTEGER_PRODUCTS = "4"
"""Accuracy level of products with quantised weights: activations are rounded to int8, block by block of each row. The
levels below widen the weights, which is slower than float32."""

CHANNEL_BLOCK = "128"
"""Block that weights with one scale a channel are cut into, and activations are rounded in. ONNX Runtime's usual 32 takes a
fifth longer."""


class OrtBackend(Backend):
    """Every tensor is one numpy array that all sessions are bound to once.

    A state that a stage may update in place is bound as input and output alike, so nothing is copied; one
    that it may not is written beside and copied back.
    """

    def __init__(
        self, bundle: Bundle, stages: Iterable[str], *, threads: int = 0, profile: Path | None = None
    ) -> None:
        """Allocate the tensors of ``stages``; a session is made when its stage first runs.

        ``threads`` of 0 leaves the number to ONNX Runtime (one a core). ``profile`` is a folder to record the time of
        every node in (see :meth:`end_profile`).

        Raises:
            BundleError: the bundle computes in a type that the CPU has no operators for.
        """
        super().__init__(bundle, stages)
        if any(spec.dtype == "bfloat16" for spec in self.specs.values()):
            raise BundleError(
                f"{bundle.path} computes in bf16, which ONNX Runtime does not on the CPU: "
                "export it with --activations fp32 (weights can stay bf16)"
            )
        self.threads = threads
        self.profile = profile
        self._arrays: dict[str, Array] = {
            name: np.zeros(spec.shape, spec.dtype) for name, spec in self.specs.items()
        }
        self._bindings: dict[str, tuple[ort.InferenceSession, ort.IOBinding]] = {}
        self._copy_back: dict[str, list[tuple[Array, Array]]] = {}

    def load(self, stage: str) -> None:
        """Make the session of ``stage`` and bind it, if that was not done yet.

        Raises:
            BundleError: ONNX Runtime refuses the file, or it has not the tensors that the manifest declares.
        """
        if stage in self._bindings:
            return
        with huge_pages():
            session = self._session(stage)
        release_freed()
        spec = self.stages[stage]
        self._check(stage, spec, session)
        binding, self._copy_back[stage] = self._bind(spec, session)
        self._bindings[stage] = session, binding

    def array(self, name: str) -> Array:
        """The live memory of tensor ``name``, not a copy."""
        self._spec(name)
        return self._arrays[name]

    def end_profile(self, stage: str) -> Path:
        """Stop recording ``stage``; the file with ONNX Runtime's trace events (JSON) of all its runs."""
        session, _ = self._bindings[stage]
        return Path(session.end_profiling())

    def _run(self, stage: str) -> None:
        self.load(stage)
        session, binding = self._bindings[stage]
        session.run_with_iobinding(binding)
        for source, target in self._copy_back[stage]:
            np.copyto(target, source)

    def _read(self, spec: TensorSpec) -> Array:
        return self._arrays[spec.name].copy()

    def _write(self, spec: TensorSpec, array: Array) -> None:
        np.copyto(self._arrays[spec.name], array)

    def _session(self, stage: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        if stage == "vq_decoder":
            # Its maps are hundreds of megabytes: laid out one by one, and given back after their last reader instead of
            # kept for the next map of the size, they need half of the memory, and the first image waits for less of it
            # to be touched.
            options.enable_mem_pattern = options.enable_mem_reuse = False
        if stage == "prefill":
            # An empty state is a constant, which would be made when the session is and held beside the state for good.
            options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "4096")
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile / stage)
        # Sessions take turns; one that keeps spinning steals the cores of the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INTEGER_PRODUCTS)
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", CHANNEL_BLOCK)
        path = self.bundle.stage_path(stage)
        try:
            return ort.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error

    def _check(self, stage: str, spec: StageSpec, session: ort.InferenceSession) -> None:
        for role, wanted, found in (
            ("input", spec.inputs, session.get_inputs()),
            ("output", spec.outputs, session.get_outputs()),
        ):
            held = {node.name: tuple(node.shape) for node in found}
            declared = {tensor.name: tensor.shape for tensor in wanted}
            if held != declared:
                names = sorted(
                    name for name in held.keys() | declared.keys() if held.get(name) != declared.get(name)
                )
                raise BundleError(
                    f"stage {stage} has not the {role}s that the manifest declares: {', '.join(names)}"
                )

    def _bind(
        self, spec: StageSpec, session: ort.InferenceSession
    ) -> tuple[ort.IOBinding, list[tuple[Array, Array]]]:
        binding = session.io_binding()
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, _value(self._arrays[tensor.name]))
        read = {tensor.name for tensor in spec.inputs}
        copies = []
        for tensor in spec.outputs:
            state = spec.updates.get(tensor.name, tensor.name)
            array = self._arrays[state]
            if state in read and state not in spec.in_place:
                beside = np.empty_like(array)
                copies.append((beside, array))
                array = beside
            binding.bind_ortvalue_output(tensor.name, _value(array))
        return binding, copies


def _value(array: Array) -> ort.OrtValue:
    """An OrtValue over the memory of ``array``."""
    return ort.OrtValue.ortvalue_from_numpy(array)
