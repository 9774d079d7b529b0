"""ONNX Runtime sessions over tensors that stay where they are, whatever the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnxruntime as ort

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.manifest import CONTRACT_KEY, StageSpec, TensorSpec
from linert.runtime.bundles.manifest_file import contract
from linert.runtime.errors import BundleError, DeviceError
from linert.runtime.text import size_text


class SessionBackend(Backend):
    """Every tensor is one OrtValue that all sessions are bound to once.

    A state that a stage may update in place is bound as input and output alike, so nothing is copied; one
    that it may not is written beside and copied back, by way of one place that all stages share. A session is made when its
    stage is loaded or first runs.
    """

    def __init__(self, bundle: Bundle, stages: Iterable[str]) -> None:
        super().__init__(bundle, stages)
        self._values: dict[str, ort.OrtValue] = {}
        self._beside: dict[str, ort.OrtValue] = {}
        self._bindings: dict[str, tuple[ort.InferenceSession, ort.IOBinding]] = {}
        self._copy_back: dict[str, list[tuple[ort.OrtValue, ort.OrtValue]]] = {}

    @abstractmethod
    def _allocate(self, spec: TensorSpec) -> ort.OrtValue:
        """Memory for a tensor."""

    @abstractmethod
    def _copy(self, source: ort.OrtValue, target: ort.OrtValue) -> None:
        """Copy one tensor over another, where they lie; it is done when this returns."""

    @abstractmethod
    def _options(self, stage: str) -> ort.SessionOptions:
        """Options of the stage's session, in addition to what all have."""

    @abstractmethod
    def _providers(self, stage: str) -> list[tuple[str, Mapping[str, str]]]:
        """Execution providers of the stage's session with their options."""

    disabled_optimizers: tuple[str, ...] = ()

    def value(self, name: str) -> ort.OrtValue:
        """The tensor ``name``. Its memory is taken when it is first asked for: before a stage is loaded nothing has compared the
        manifest's shapes with a graph's.

        Raises:
            RequestError: no stage has such a tensor.
            DeviceError: there is not so much memory.
        """
        spec = self._spec(name)
        if name not in self._values:
            self._values[name] = self._new(spec)
        return self._values[name]

    def _new(self, spec: TensorSpec) -> ort.OrtValue:
        try:
            return self._allocate(spec)
        except MemoryError as error:
            raise DeviceError(
                f"{spec.name} of {self.bundle.path} takes {size_text(spec.nbytes)}, which this machine has not free: export with a "
                "smaller --batch, or with fewer lines"
            ) from error

    def load(self, stage: str) -> None:
        """Make the session of ``stage`` and bind it, if that was not done yet.

        Raises:
            RequestError: the backend does not hold the stage.
            BundleError: ONNX Runtime refuses the file, or it has not the tensors that the manifest declares.
        """
        self._stage(stage)
        if stage in self._bindings:
            return
        session = self._session(stage)
        spec = self.stages[stage]
        check_tensors(stage, spec, session)
        check_contract(stage, self.bundle, session)
        binding, self._copy_back[stage] = self._bind(spec, session)
        self._bindings[stage] = session, binding

    def _close(self) -> None:
        self._bindings.clear()
        self._copy_back.clear()
        self._beside.clear()
        self._values.clear()

    def _run(self, stage: str) -> None:
        self.load(stage)
        self._execute(stage)

    def _execute(self, stage: str) -> None:
        """Run a session that was made."""
        session, binding = self._bindings[stage]
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            # ONNX Runtime raises RuntimeErrors of several kinds.
            raise DeviceError(f"ONNX Runtime {ort.__version__} failed in stage {stage}: {error}") from error
        for source, target in self._copy_back[stage]:
            self._copy(source, target)

    def _session(self, stage: str) -> ort.InferenceSession:
        options = self._options(stage)
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # What it calls errors is raised as well.
        options.log_severity_level = 4
        if stage in ("prefill", "admit"):
            # An empty state is a constant, which would be made when the session is and held beside the state for good.
            options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "4096")
        path = self.bundle.stage_path(stage)
        files = self.bundle.files_of(stage)
        self.bundle.require_unchanged(files)
        try:
            session = ort.InferenceSession(
                self._model(stage),
                options,
                providers=self._providers(stage),
                disabled_optimizers=list(self.disabled_optimizers),
            )
        except Exception as error:
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
        self.bundle.require_unchanged(files)
        return session

    def _model(self, stage: str) -> Path | bytes:
        """What ONNX Runtime makes the session of ``stage`` of: the bundle's file."""
        return self.bundle.stage_path(stage)

    def _bind(
        self, spec: StageSpec, session: ort.InferenceSession
    ) -> tuple[ort.IOBinding, list[tuple[ort.OrtValue, ort.OrtValue]]]:
        binding = session.io_binding()
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, self.value(tensor.name))
        read = {tensor.name for tensor in spec.inputs}
        copies = []
        for tensor in spec.outputs:
            state = spec.updates.get(tensor.name, tensor.name)
            value = self.value(state)
            if state in read and state not in spec.in_place:
                beside = self._beside.get(state) or self._new(self.specs[state])
                self._beside[state] = beside
                copies.append((beside, value))
                value = beside
            binding.bind_ortvalue_output(tensor.name, value)
        return binding, copies


def check_contract(stage: str, bundle: Bundle, session: ort.InferenceSession) -> None:
    """Raise :class:`BundleError` where a session's file is of another stage, or was made for another manifest."""
    meta = session.get_modelmeta()
    carried = meta.custom_metadata_map.get(CONTRACT_KEY)
    if meta.graph_name != stage or carried != contract(bundle.manifest):
        raise BundleError(
            f"{bundle.stage_path(stage)} is stage {meta.graph_name!r} of another manifest, not {stage} of this one: export the "
            "bundle again"
        )


def check_tensors(stage: str, spec: StageSpec, session: ort.InferenceSession) -> None:
    """Raise :class:`BundleError` where a session has not the tensors that the manifest declares."""
    for role, wanted, nodes in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        shapes = {node.name: tuple(node.shape) for node in nodes}
        declared = {tensor.name: tensor.shape for tensor in wanted}
        if shapes != declared:
            names = sorted(
                name for name in shapes.keys() | declared.keys() if shapes.get(name) != declared.get(name)
            )
            raise BundleError(
                f"stage {stage} has not the {role}s that the manifest declares: {', '.join(names)}"
            )
