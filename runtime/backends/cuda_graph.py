"""A CUDA graph captured from a stream: its nodes, its copies, its launch."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

from linert.runtime.errors import DeviceError
from linert.runtime.plugins.kernels import checked


class CopyNode(NamedTuple):
    """A copy on the device that a graph holds: addresses and bytes."""

    target: int
    source: int
    size: int


class CapturedGraph:
    """Work captured from a stream, to be launched as one.

    ``nodes``: how many operations it has, by the driver's names of their types. ``copies``: those of them that copy from device
    memory to device memory.

    Args:
        driver: ``cuda.bindings.driver``.
        graph: what the driver captured; destroyed here, whatever happens.

    Raises:
        DeviceError: the driver refuses to make an executable graph of it.
    """

    def __init__(self, driver: Any, graph: Any) -> None:
        self._driver = driver
        try:
            nodes = _nodes(driver, graph)
            self.nodes = _types(driver, nodes)
            self.copies = _copies(driver, nodes)
            self._executable = checked(driver, driver.cuGraphInstantiate(graph, 0))
        except RuntimeError as error:
            raise DeviceError(f"the captured CUDA graph cannot be instantiated: {error}") from error
        finally:
            driver.cuGraphDestroy(graph)
        self._destroy = weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)
        # The end of the process gives everything back, in an order of its own.
        self._destroy.atexit = False

    def launch(self, stream: int) -> None:
        """Put the whole graph into ``stream``.

        Raises:
            DeviceError: the driver refuses.
        """
        try:
            checked(self._driver, self._driver.cuGraphLaunch(self._executable, stream))
        except RuntimeError as error:
            raise DeviceError(f"the CUDA graph cannot be launched: {error}") from error

    def close(self) -> None:
        """Give the graph back to the driver; it cannot be launched any more."""
        self._destroy()


def _nodes(driver: Any, graph: Any) -> list[Any]:
    _, count = checked(driver, driver.cuGraphGetNodes(graph, 0))
    nodes, _ = checked(driver, driver.cuGraphGetNodes(graph, count))
    return list(nodes[:count])


def _types(driver: Any, nodes: list[Any]) -> dict[str, int]:
    counts = Counter(checked(driver, driver.cuGraphNodeGetType(node)).name for node in nodes)
    return dict(sorted(counts.items()))


def _copies(driver: Any, nodes: list[Any]) -> tuple[CopyNode, ...]:
    copy, device = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY, driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copies = []
    for node in nodes:
        if checked(driver, driver.cuGraphNodeGetType(node)) != copy:
            continue
        told = checked(driver, driver.cuGraphMemcpyNodeGetParams(node))
        # Where the driver finds out for itself what an address is, it calls the memory unified.
        kinds = {device, driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED}
        if told.srcMemoryType in kinds and told.dstMemoryType in kinds:
            size = told.WidthInBytes * max(told.Height, 1) * max(told.Depth, 1)
            copies.append(CopyNode(int(told.dstDevice), int(told.srcDevice), size))
    return tuple(copies)
