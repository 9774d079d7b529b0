"""TensorRT plans of a bundle: what they were built from, and whether they still belong to it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from linert.runtime.bundles.bundle import Bundle, file_sha256
from linert.runtime.errors import BundleError
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.files.replacement import recover
from linert.runtime.plugins import CONTENTS

ENGINES_FOLDER = "engines"
RECORD_NAME = "engine.json"
SCHEMA = 3


class Layer(msgspec.Struct, frozen=True):
    """A layer of the network that a plan was built from: ``plugin`` is the plugin's name, empty for TensorRT's own."""

    name: str
    kind: str
    outputs: tuple[str, ...]
    plugin: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's plan.

    ``operations``: how many nodes of linert's own operations the ONNX file has, by type. ``aliases``: outputs that lie where an
    input lies. ``weights_bytes`` and ``activation_bytes``: of device memory, as TensorRT told; None where it did not.
    ``user_allocation``: whether TensorRT was told that the plan must not allocate memory while it runs, which TensorRT for RTX
    asks for where a run is captured as a CUDA graph.
    """

    file: str
    sha256: str
    bytes: int
    seconds: float
    layers: tuple[Layer, ...]
    operations: dict[str, int]
    aliases: dict[str, str]
    weights_bytes: int | None
    activation_bytes: int | None
    user_allocation: bool

    @property
    def plugins(self) -> dict[str, int]:
        """How many layers are plugins, by name."""
        return dict(Counter(layer.plugin for layer in self.layers if layer.plugin))


class Engines(msgspec.Struct, frozen=True):
    """The record of a build.

    ``flavour``: ``rtx`` or ``tensorrt``. ``version``: of TensorRT. ``capabilities``: of the GPUs it was built for (80 means 8.0).
    ``plugin_version``: of LineAttention, empty where the plans hold the function's body instead; ``kernels``: digest of its
    kernels' source, likewise. ``bundle``: digest of the manifest, which covers every file.
    """

    schema: int
    flavour: str
    version: str
    capabilities: tuple[int, ...]
    plugin_version: str
    kernels: str
    bundle: str
    plans: dict[str, Plan]

    @property
    def made_for(self) -> str:
        """The GPUs, for people."""
        return ", ".join(f"SM{number}" for number in self.capabilities) or "the GPU at hand"


def built_flavours(bundle: Bundle) -> list[str]:
    """The flavours that ``bundle`` has plans for, whether they still belong to it or not."""
    records = sorted((bundle.path / ENGINES_FOLDER).glob(f"*/{RECORD_NAME}"))
    folders = [record.parent.name.partition(".") for record in records]
    return [flavour for flavour, _, variant in folders if variant == bundle.variant]


def engines_folder(bundle: Bundle, flavour: str) -> Path:
    """Where the plans of a flavour lie."""
    return bundle.path / ENGINES_FOLDER / (f"{flavour}.{bundle.variant}" if bundle.variant else flavour)


def build_again(bundle: Bundle, flavour: str) -> str:
    """What to do about plans that do not fit."""
    size = f" --size {bundle.size}" if bundle.size else ""
    return f"build them with: linert build {bundle.path} --target {flavour}{size}"


def read_engines(bundle: Bundle, flavour: str, *, digests: bool = True) -> Engines:
    """The plans of ``bundle`` for ``flavour``.

    Args:
        digests: compare the sha256 of every plan.

    Raises:
        BundleError: there are none, they were built from another export, or a file is missing or changed; the message says
            what to build again.
    """
    folder = engines_folder(bundle, flavour)
    recover(folder)
    again = build_again(bundle, flavour)
    try:
        engines = read_record(folder / RECORD_NAME, Engines)
    except FileNotFoundError:
        raise BundleError(f"{bundle.path} has no {flavour} plans; {again}") from None
    except RecordError as error:
        raise BundleError(f"{folder / RECORD_NAME} cannot be read ({error}); {again}") from error
    if engines.schema != SCHEMA or engines.flavour != flavour:
        raise BundleError(f"the plans in {folder} are of another linert; {again}")
    if engines.bundle != bundle.manifest.sha256:
        raise BundleError(f"the plans in {folder} were built from another export; {again}")
    for stage, plan in engines.plans.items():
        path = folder / plan.file
        if not path.is_file() or path.stat().st_size != plan.bytes:
            raise BundleError(f"the plan of {stage}, {path}, is missing or incomplete; {again}")
        if digests and file_sha256(path) != plan.sha256:
            raise BundleError(f"the plan of {stage}, {path}, was changed; {again}")
    return engines


def missing_plugins(bundle: Bundle, engines: Engines) -> list[str]:
    """What the plans should hold as plugins and do not, by what is in the files: ``decode: 3 of 12``.

    Nothing is missing from plans that were built without plugins.
    """
    if not engines.plugin_version:
        return []
    faults = []
    for stage, plan in engines.plans.items():
        data = (engines_folder(bundle, engines.flavour) / plan.file).read_bytes()
        stored, wanted = data.count(CONTENTS.encode()), sum(plan.operations.values())
        if stored < wanted or plan.plugins != plan.operations:
            faults.append(f"{stage}: {min(stored, sum(plan.plugins.values()))} of {wanted}")
    return faults
