"""Inspect captured CUDA graphs for the kernels, and for copies that TensorRT put there without being asked."""

from __future__ import annotations

from dataclasses import dataclass

from linert.runtime.backends.cuda_graph import CopyNode
from linert.runtime.backends.trt import TrtBackend
from linert.runtime.text import size_text


@dataclass(frozen=True)
class StageGraph:
    """The captured graph of a stage.

    ``nodes``: operations by the driver's names of their types. ``copied_back``: bytes of the states that the backend copies back
    because TensorRT did not write them in place. ``unasked``: TensorRT's own copies on the device, in words; of a state that a
    plugin updates in place there should be none, and each costs its bytes twice a step.
    """

    stage: str
    nodes: dict[str, int]
    copied_back: int
    unasked: tuple[str, ...]


def captured_graphs(backend: TrtBackend) -> list[StageGraph]:
    """Run every stage of ``backend`` once, over tensors of zeros, capture it and say what the graph holds.

    Raises:
        BundleError: a plan does not belong to this machine or bundle.
        DeviceError: the driver or TensorRT refuses.
    """
    graphs = []
    for stage in backend.stages:
        backend.run(stage)
        graph, own = backend.capture(stage), backend.copies(stage)
        unasked = [copy for copy in graph.copies if copy not in own]
        graphs.append(
            StageGraph(
                stage,
                graph.nodes,
                sum(copy.size for copy in own),
                tuple(_in_words(backend, copy) for copy in unasked),
            )
        )
    return graphs


def _in_words(backend: TrtBackend, copy: CopyNode) -> str:
    source, target = (
        backend.tensor_at(address) or "its own memory" for address in (copy.source, copy.target)
    )
    where = "onto itself" if copy.source == copy.target else f"to {target}"
    return f"{source} {where}, {size_text(copy.size)}"
