"""Build TensorRT plans for a bundle's stages, with no GPU present where the flavour allows that."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx
from onnx import helper

from linert.exporter.bundle_folder import PLANS
from linert.exporter.tensorrt.build_stage import Event, Job
from linert.runtime import plugins
from linert.runtime.backends.trt_flavour import Flavour
from linert.runtime.bundles.bundle import Bundle, file_sha256
from linert.runtime.bundles.engines import RECORD_NAME, SCHEMA, Engines, Plan, engines_folder, read_engines
from linert.runtime.errors import BundleError, ExportError
from linert.runtime.files.replacement import new_folder, scratch_folder
from linert.runtime.plugins import OPERATIONS, tuning
from linert.runtime.plugins.base import Launch, TensorKind

PLUGIN_SOURCES = (
    *sorted(Path(__file__).parent.glob("*_kernels.py")),
    *sorted(Path(plugins.__file__).parent.glob("*.py")),
    tuning.FILE,
)
"""What decides how the plugins in a plan run."""

Progress = Callable[[str, Event], None]
"""Called with a stage's name and an event of its build."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    ``capabilities``: GPUs (80 means 8.0), empty for the one at hand. ``plugin``: linert's operations as plugins, not as the
    functions' bodies.
    """

    bundle: Bundle
    flavour: Flavour
    capabilities: tuple[int, ...]
    plugin: bool

    def __post_init__(self) -> None:
        if self.flavour.name == "tensorrt" and self.capabilities:
            raise ExportError("TensorRT builds for the GPU at hand alone: leave --sm out")
        if self.capabilities:
            known = self.flavour.load().ComputeCapability.__members__
            if unknown := [f"SM{sm}" for sm in self.capabilities if f"SM{sm}" not in known]:
                able = ", ".join(name for name in known if name.startswith("SM"))
                raise ExportError(
                    f"TensorRT for RTX has no {', '.join(unknown)}, only {able}; for other GPUs build with "
                    "--target tensorrt, on them"
                )
        if self.plugin:
            if importlib.util.find_spec("triton") is None:
                raise ExportError(
                    "plugins are compiled by Triton: pip install 'linert[build]', or build with --no-plugin"
                )
            try:
                self.launches()
            except ValueError as error:
                raise ExportError(f"{error}; build with --no-plugin") from error

    def launches(self) -> list[Launch]:
        """How linert's operations run in decode steps of every width, in the order of the graphs; a step of a group has none.

        Raises:
            ValueError: a kernel cannot do a shape; the message says what it can.
        """
        found = []
        for stage in self.bundle.manifest.stages:
            if not stage.startswith("decode"):
                continue
            graph = onnx.load(self.bundle.stage_path(stage), load_external_data=False).graph
            kinds = {value.name: _kind(value) for value in (*graph.input, *graph.value_info, *graph.output)}
            for node in graph.node:
                if node.domain == plugins.NAMESPACE:
                    operation = OPERATIONS[node.op_type](**_attributes(node))
                    found.append(operation.launch([kinds[name] for name in node.input], self.capabilities))
        return found

    def built(self) -> Engines | None:
        """The plans that are there, if they are what this would build."""
        try:
            engines = read_engines(self.bundle, self.flavour.name)
        except BundleError:
            return None
        same = (
            engines.version == self.version
            and engines.capabilities == self.capabilities
            and (engines.plugin_version, engines.kernels) == self.plugin_identity
        )
        return engines if same else None

    @property
    def plugin_identity(self) -> tuple[str, str]:
        """Version of the plugin and digest of its kernels; empty without it."""
        if not self.plugin:
            return "", ""
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in PLUGIN_SOURCES))
        return plugins.VERSION, digest.hexdigest()

    @property
    def version(self) -> str:
        """Of the flavour that is installed."""
        return str(self.flavour.load().__version__)


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    """The numbers among the attributes of a node."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _kind(value: onnx.ValueInfoProto) -> TensorKind:
    tensor = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorKind(dtype, tuple(side.dim_value for side in tensor.shape.dim))


def build(request: BuildRequest, progress: Progress) -> Engines:
    """Build every stage's plan into the bundle's folder, all or none.

    Raises:
        ExportError: TensorRT refuses a stage; the message has its reason.
        OutputError: the plans cannot be written.
        LinertError: the flavour is not installed.
    """
    manifest = request.bundle.manifest
    plans = {}
    target = engines_folder(request.bundle, request.flavour.name)
    with new_folder(target, PLANS, force=True) as folder, environment_of(request.flavour) as environment:
        # What TensorRT may refuse comes before what takes long.
        for stage, spec in sorted(manifest.stages.items(), key=lambda item: item[0].startswith("decode")):
            file = f"{stage}.plan"
            job = Job(
                request.flavour.name,
                str(request.bundle.file(spec.file).resolve()),
                str((folder / file).resolve()),
                request.capabilities,
                request.plugin,
            )
            try:
                end = run_job(job, environment, lambda event, stage=stage: progress(stage, event))
            except ExportError as error:
                raise ExportError(f"{error}{_remedy(request, stage)}") from error
            path = folder / file
            plans[stage] = Plan(
                file=file,
                sha256=file_sha256(path),
                bytes=path.stat().st_size,
                seconds=end.seconds,
                layers=end.layers,
                operations=end.operations,
                aliases=end.aliases,
                weights_bytes=end.weights_bytes,
                activation_bytes=end.activation_bytes,
                user_allocation=end.user_allocation,
            )
            if request.plugin and plans[stage].plugins != end.operations:
                raise ExportError(
                    f"TensorRT made plugins of {plans[stage].plugins} and not of {end.operations} in {stage}"
                )
        plans = {stage: plans[stage] for stage in manifest.stages}
        engines = Engines(
            SCHEMA,
            request.flavour.name,
            request.version,
            request.capabilities,
            *request.plugin_identity,
            manifest.sha256,
            plans,
        )
        record = msgspec.json.format(msgspec.json.encode(engines), indent=1)
        (folder / RECORD_NAME).write_bytes(record + b"\n")
    return engines


def _remedy(request: BuildRequest, stage: str) -> str:
    """What to do where a stage is one that TensorRT is known to refuse."""
    precision = request.bundle.manifest.precision
    if stage == "vq_decoder" and precision.image_decoder == "int8":
        return ". Convolutions in int8 are for ONNX Runtime: export with --image-decoder-precision fp16"
    if stage.startswith("decode") and precision.parts.get("embedding", "").startswith("int"):
        return ". Embedding tables in integers are for ONNX Runtime: export without --keep embedding"
    return ""


def run_job(job: Job, environment: dict[str, str], report: Callable[[Event], None]) -> Event:
    """Run ``job`` in a process of its own; stopped with this one.

    Raises:
        ExportError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "linert.exporter.tensorrt.build_stage",
        msgspec.json.encode(job).decode(),
    ]
    with tempfile.TemporaryFile() as log:
        # It ends when its standard input does, which this process holds open, however this process ends.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        )
        last = Event(error="")
        try:
            for line in process.stdout or ():
                last = msgspec.json.decode(line, type=Event)
                report(last)
            process.wait()
        finally:
            process.kill()
            process.wait()
        if last.error or process.returncode != 0 or not last.layers:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-5:]
            raise ExportError(last.error or f"TensorRT failed on {job.onnx}: {' / '.join(said)}")
    return last


@contextmanager
def environment_of(flavour: Flavour) -> Iterator[dict[str, str]]:
    """The environment in which the flavour finds its own shared object, under a name that its wheel may lack."""
    environment = dict(os.environ)
    # The interpreter is for tests of the kernels: here they are compiled.
    environment.pop("TRITON_INTERPRET", None)
    file = flavour.shared_object()
    with scratch_folder() as folder:
        if file is not None:
            (folder / flavour.soname).symlink_to(file)
            inherited = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), inherited)))
        yield environment


def parse_capabilities(text: str) -> tuple[int, ...]:
    """``80,86,89,120``, or ``current`` for the GPU at hand (empty).

    Raises:
        ExportError: not numbers.
    """
    if text == "current":
        return ()
    parts: Sequence[str] = [part.strip().removeprefix("sm").replace(".", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ExportError(f"--sm {text}: say compute capabilities as 80,86,89,120, or current")
    return tuple(sorted({int(part) for part in parts}))
