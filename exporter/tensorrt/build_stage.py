"""Build one stage's plan, in a process of its own: ``python -m linert.exporter.tensorrt.build_stage JOB``.

TensorRT ends the process where it finds a fault in itself, holds its memory until the process ends, and reads the library path
when the process starts. JOB is a :class:`Job` as JSON; events go to standard output, a JSON object a line.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from linert.exporter.tensorrt.callbacks import make_monitor, make_writer
from linert.runtime.backends.trt_flavour import FLAVOURS, make_logger
from linert.runtime.bundles.engines import Layer
from linert.runtime.errors import ExportError
from linert.runtime.files.atomic_files import output_error
from linert.runtime.plugins import NAMESPACE
from linert.runtime.plugins.base import Launch, Operation
from linert.runtime.plugins.kernels import KernelSet
from linert.runtime.plugins.trt import register

MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
"""What TensorRT logs of an engine's device memory."""


class Job(msgspec.Struct, frozen=True):
    """What to build: ``capabilities`` empty for the GPU at hand, ``plugin`` whether linert's operations are plugins."""

    flavour: str
    onnx: str
    plan: str
    capabilities: tuple[int, ...]
    plugin: bool


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Progress (``phase``, ``step`` of ``steps``), a failure (``error``), or the end (the rest).

    ``operations``, ``aliases``, the bytes and ``user_allocation`` are those of :class:`linert.runtime.bundles.engines.Plan`.
    """

    phase: str = ""
    step: int = 0
    steps: int = 0
    error: str = ""
    seconds: float = 0.0
    layers: tuple[Layer, ...] = ()
    operations: dict[str, int] = {}
    aliases: dict[str, str] = {}
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    user_allocation: bool = False


def emit(event: Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


def build(job: Job) -> Event:
    """Build and write the plan; the event of its end, or of its failure."""
    trt = FLAVOURS[job.flavour].load()
    messages: list[str] = []
    memory: dict[str, int] = {}

    def listen(message: str, is_error: bool) -> None:
        if is_error:
            messages.append(message)
        for kind, size in MEMORY.findall(message):
            memory[kind] = int(size)

    begun = time.perf_counter()
    logger = make_logger(trt, listen)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if job.plugin:
        from linert.exporter.tensorrt.compile import kernels_of

        capabilities = job.capabilities or (capability_at_hand(),)

        @functools.cache
        def compiled(_: Operation, launch: Launch) -> KernelSet:
            try:
                return kernels_of(launch, capabilities)
            except ExportError as error:
                # TensorRT says only that a plugin failed.
                messages.insert(0, str(error))
                raise

        register(trt, compiled, capabilities)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        text = "; ".join(f"{fault.node_name()} ({fault.node_operator()}): {fault.desc()}" for fault in faults)
        return Event(error=f"TensorRT cannot read {job.onnx}: {text}")
    config = builder.create_builder_config()
    config.progress_monitor = make_monitor(trt, lambda phase, step, steps: emit(Event(phase, step, steps)))
    # What is float32 is computed in float32: whoever wants less exports in less.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if job.capabilities:
        config.num_compute_capabilities = len(job.capabilities)
        for index, capability in enumerate(job.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    # A plan of TensorRT for RTX that allocates memory while it runs cannot be captured as a CUDA graph. TensorRT has no such flag.
    allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if allocation is not None:
        config.set_flag(allocation)
    layers, aliases = described(trt, network)
    failures: list[OSError] = []
    built = False
    try:
        with Path(job.plan).open("wb") as file:
            writer = make_writer(trt, file, failures.append)
            built = builder.build_serialized_network_to_stream(network, config, writer)
    except OSError as error:
        failures.append(error)
    if failures:
        return Event(error=str(output_error(Path(job.plan), failures[0])))
    if not built:
        return Event(error=f"TensorRT cannot build {job.onnx}: {'; '.join(messages) or 'no reason given'}")
    return Event(
        seconds=time.perf_counter() - begun,
        layers=layers,
        operations=operations_of(Path(job.onnx)),
        aliases=aliases,
        weights_bytes=memory.get("Weights"),
        activation_bytes=memory.get("Activation"),
        user_allocation=allocation is not None and config.get_flag(allocation),
    )


def operations_of(onnx_file: Path) -> dict[str, int]:
    """How many nodes of linert's own operations a file has, by type."""
    import onnx

    nodes = onnx.load(onnx_file, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes if node.domain == NAMESPACE))


def described(trt: Any, network: Any) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The network's layers, and its outputs that lie where an input lies: those of plugins, and TensorRT's own cache updates."""
    layers, aliases = [], {}
    # Older versions have no such layer.
    cache_update = getattr(trt.LayerType, "KV_CACHE_UPDATE", None)
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        outputs = tuple(
            f"{tensor.name}: {tensor.dtype.name} {list(tensor.shape)}"
            for tensor in (layer.get_output(index) for index in range(layer.num_outputs))
        )
        plugin = ""
        if layer.type == trt.LayerType.PLUGIN_V3:
            plugin_layer = layer
            plugin_layer.__class__ = trt.IPluginV3Layer
            plugin = plugin_layer.plugin.plugin_name
            for index in range(layer.num_outputs):
                source = plugin_layer.plugin.get_aliased_input(index)
                if source >= 0:
                    aliases[layer.get_output(index).name] = layer.get_input(source).name
        elif layer.type == cache_update:
            aliases[layer.get_output(0).name] = layer.get_input(0).name
        layers.append(Layer(layer.name, layer.type.name, outputs, plugin))
    ends = {network.get_output(index).name for index in range(network.num_outputs)}
    return tuple(layers), {name: _first_of(aliases, name) for name in aliases if name in ends}


def _first_of(aliases: Mapping[str, str], name: str) -> str:
    """Where a tensor lies that may have been handed on several times."""
    while name in aliases:
        name = aliases[name]
    return name


def capability_at_hand() -> int:
    """Of the GPU at hand.

    Raises:
        RuntimeError: there is none.
    """
    from cuda.bindings import driver

    from linert.runtime.plugins.kernels import checked, current_capability

    checked(driver, driver.cuInit(0))
    return current_capability(driver, checked(driver, driver.cuDeviceGet(0)))


def end_with_parent() -> None:
    """End this process at once when whoever started it has: a killed build must not go on writing."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    emit(build(msgspec.json.decode(arguments[0], type=Job)))


if __name__ == "__main__":
    main(sys.argv[1:])
