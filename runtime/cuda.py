"""One CUDA device through the driver API: memory, copies, a stream, captured graphs."""

from __future__ import annotations

import ctypes
import statistics
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.backend import Array
from runtime.errors import DeviceError
from runtime.plugins.kernels import checked, current_capability
from runtime.text import size_text

COPIES = 10
"""Copies that a measurement of bandwidth makes in a row."""


class CapturedGraph:
    """Work captured from a stream, to be launched as one.

    ``nodes``: how many operations it has, by the driver's names of their types.
    """

    def __init__(self, driver: Any, graph: Any) -> None:
        self._driver = driver
        self.nodes = _node_types(driver, graph)
        self._executable = checked(driver, driver.cuGraphInstantiate(graph, 0))
        checked(driver, driver.cuGraphDestroy(graph))
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)

    def launch(self, stream: int) -> None:
        checked(self._driver, self._driver.cuGraphLaunch(self._executable, stream))


class Device:
    """The current CUDA device, with one stream on which everything is done in order.

    Memory is freed with the object.

    Args:
        driver: ``cuda.bindings.driver``; imported if None.

    Raises:
        DeviceError: no driver, no device, or the driver refuses.
    """

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver if driver is not None else _driver()
        self._device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)
        kind = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = int(self._call("cuStreamCreate", kind))
        self._allocated: list[int] = []
        self._pinned: dict[int, tuple[int, int]] = {}
        weakref.finalize(self, _release, self.driver, self._allocated, self._pinned)

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return bytes(self._call("cuDeviceGetName", 128, self._device)).split(b"\0")[0].decode()

    @property
    def capability(self) -> int:
        """Compute capability; 80 means 8.0."""
        return current_capability(self.driver, self._device)

    def allocate(self, size: int) -> int:
        """The address of ``size`` zeroed bytes.

        Raises:
            DeviceError: there is not so much memory.
        """
        free, _ = self._call("cuMemGetInfo")
        try:
            address = int(self._call("cuMemAlloc", max(size, 1)))
        except DeviceError as error:
            raise DeviceError(
                f"{self.name} has {size_text(free)} of memory free, {size_text(size)} are needed"
            ) from error
        self._allocated.append(address)
        self._call("cuMemsetD8Async", address, 0, max(size, 1), self.stream)
        return address

    def upload(self, address: int, array: Array) -> None:
        """Copy ``array`` to ``address``, through page-locked memory that is kept for the next time."""
        values = np.ascontiguousarray(array)
        host = self._page_locked(address, values.nbytes)
        # The last copy from there has to be over.
        self.synchronize()
        ctypes.memmove(host, values.ctypes.data, values.nbytes)
        self._call("cuMemcpyHtoDAsync", address, host, values.nbytes, self.stream)

    def download(self, address: int, array: Array) -> None:
        """Fill ``array`` from ``address``, after everything that was asked before."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device."""
        self._call("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def synchronize(self) -> None:
        """Wait for everything that was asked."""
        self._call("cuStreamSynchronize", self.stream)

    @contextmanager
    def capturing(self) -> Iterator[list[CapturedGraph]]:
        """Record what is asked of the stream instead of doing it; the list holds the graph afterwards.

        Raises:
            DeviceError: something was asked that cannot be captured.
        """
        found: list[CapturedGraph] = []
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self.stream, mode)
        try:
            yield found
        except BaseException:
            # The stream must leave the mode; what it recorded is of no use.
            self.driver.cuStreamEndCapture(self.stream)
            raise
        graph = self._call("cuStreamEndCapture", self.stream)
        found.append(CapturedGraph(self.driver, graph))

    def copy_bandwidth(self, size: int = 256 << 20) -> float:
        """Bytes a second that a copy on the device reads and writes: the median of five measurements."""
        source, target = self.allocate(size), self.allocate(size)
        try:
            return statistics.median(2 * size / self._copy_seconds(target, source, size) for _ in range(5))
        finally:
            for address in (source, target):
                self._allocated.remove(address)
                self._call("cuMemFree", address)

    def _copy_seconds(self, target: int, source: int, size: int) -> float:
        self.copy(target, source, size)
        begun, ended = (self._call("cuEventCreate", 0) for _ in range(2))
        self._call("cuEventRecord", begun, self.stream)
        for _ in range(COPIES):
            self.copy(target, source, size)
        self._call("cuEventRecord", ended, self.stream)
        self.synchronize()
        milliseconds = float(self._call("cuEventElapsedTime", begun, ended))
        for event in (begun, ended):
            self._call("cuEventDestroy", event)
        return milliseconds / 1e3 / COPIES

    def _page_locked(self, address: int, size: int) -> int:
        held, host = self._pinned.get(address, (0, 0))
        if held < size:
            if host:
                self.synchronize()
                self._call("cuMemFreeHost", host)
            host = int(self._call("cuMemHostAlloc", max(size, 1), 0))
            self._pinned[address] = size, host
        return host

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return checked(self.driver, getattr(self.driver, name)(*arguments))
        except RuntimeError as error:
            raise DeviceError(f"{name}: {error}") from error


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"cuda-bindings cannot be loaded ({error}): pip install 'linert[rtx]'") from error
    try:
        checked(driver, driver.cuInit(0))
        count = checked(driver, driver.cuDeviceGetCount())
    except Exception as error:
        # Where there is no driver the bindings raise an error of their own.
        raise DeviceError(f"no CUDA device: {error}") from error
    if not count:
        raise DeviceError("no CUDA device: the driver finds none")
    return driver


def _node_types(driver: Any, graph: Any) -> dict[str, int]:
    _, count = checked(driver, driver.cuGraphGetNodes(graph, 0))
    nodes, _ = checked(driver, driver.cuGraphGetNodes(graph, count))
    types = [checked(driver, driver.cuGraphNodeGetType(node)).name for node in nodes[:count]]
    return {name: types.count(name) for name in sorted(set(types))}


def _release(driver: Any, allocated: list[int], pinned: dict[int, tuple[int, int]]) -> None:
    # The context may be gone already, and its memory with it: errors mean nothing here.
    for address in allocated:
        driver.cuMemFree(address)
    for _, host in pinned.values():
        driver.cuMemFreeHost(host)
