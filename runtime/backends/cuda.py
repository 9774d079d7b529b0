"""One CUDA device through the driver API: memory, copies, a stream, captured graphs."""

from __future__ import annotations

import ctypes
import statistics
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from linert.runtime.backends.base import Array
from linert.runtime.backends.cuda_graph import CapturedGraph
from linert.runtime.closing import Closing
from linert.runtime.errors import DeviceError
from linert.runtime.plugins.kernels import checked, current_capability
from linert.runtime.text import size_text

COPIES = 10
"""Copies that a measurement of bandwidth makes in a row."""


class HostBuffer(NamedTuple):
    """Page-locked memory: where it is, and how many bytes."""

    address: int
    size: int


@dataclass
class _Owned:
    """What a :class:`Device` took from the driver: device memory, page-locked memory by the device address that it is uploaded
    to, the stream, and the primary context."""

    driver: Any
    device: Any
    context: Any
    stream: int | None = None
    allocated: set[int] = field(default_factory=set)
    pinned: dict[int, HostBuffer] = field(default_factory=dict)

    def release(self) -> None:
        """Give everything back. Errors mean nothing: the context may be gone already, and everything with it."""
        driver = self.driver
        driver.cuCtxSetCurrent(self.context)
        if self.stream is not None:
            driver.cuStreamSynchronize(self.stream)
        for address in self.allocated:
            driver.cuMemFree(address)
        for buffer in self.pinned.values():
            driver.cuMemFreeHost(buffer.address)
        if self.stream is not None:
            driver.cuStreamDestroy(self.stream)
        driver.cuDevicePrimaryCtxRelease(self.device)


class Device(Closing):
    """The current CUDA device, with one stream on which everything is done in order.

    Memory, stream and context are given back by :meth:`close`, at the end of a ``with`` block, or with the object.

    Args:
        driver: ``cuda.bindings.driver``; imported if None.

    Raises:
        DeviceError: no driver, no device, or the driver refuses.
    """

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver if driver is not None else _driver()
        self._device = self._call("cuDeviceGet", 0)
        self._owned = _Owned(self.driver, self._device, self._call("cuDevicePrimaryCtxRetain", self._device))
        self._release = weakref.finalize(self, self._owned.release)
        # The end of the process gives everything back, in an order of its own.
        self._release.atexit = False
        self._call("cuCtxSetCurrent", self._owned.context)
        kind = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self._owned.stream = int(self._call("cuStreamCreate", kind))

    def close(self) -> None:
        """Give everything back to the driver, once it is done; the object is of no use afterwards."""
        self._release()

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
        self._owned.allocated.add(address)
        self._call("cuMemsetD8Async", address, 0, max(size, 1), self.stream)
        return address

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` gave, and the page-locked memory that was uploaded there from."""
        self._owned.allocated.remove(address)
        self._call("cuMemFree", address)
        if address in self._owned.pinned:
            self._call("cuMemFreeHost", self._owned.pinned.pop(address).address)

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
        captured: list[CapturedGraph] = []
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self.stream, mode)
        try:
            yield captured
        except BaseException:
            # The stream must leave the mode; what it recorded is of no use.
            _, graph = self.driver.cuStreamEndCapture(self.stream)
            if graph:
                self.driver.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", self.stream)
        captured.append(CapturedGraph(self.driver, graph))

    def copy_bandwidth(self, size: int = 256 << 20) -> float:
        """Bytes a second that a copy on the device reads and writes: the median of five measurements."""
        source, target = self.allocate(size), self.allocate(size)
        try:
            return statistics.median(2 * size / self._copy_seconds(target, source, size) for _ in range(5))
        finally:
            for address in (source, target):
                self.free(address)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """How long the device takes for what ``work`` asks of the stream, by events before and behind it."""
        begun, ended = (self._call("cuEventCreate", 0) for _ in range(2))
        try:
            self._call("cuEventRecord", begun, self.stream)
            work()
            self._call("cuEventRecord", ended, self.stream)
            self.synchronize()
            return float(self._call("cuEventElapsedTime", begun, ended))
        finally:
            for event in (begun, ended):
                self._call("cuEventDestroy", event)

    def _copy_seconds(self, target: int, source: int, size: int) -> float:
        def copies() -> None:
            for _ in range(COPIES):
                self.copy(target, source, size)

        self.copy(target, source, size)
        return self.milliseconds(copies) / 1e3 / COPIES

    def _page_locked(self, address: int, size: int) -> int:
        pinned = self._owned.pinned
        buffer = pinned.get(address)
        if buffer is None or buffer.size < size:
            if buffer is not None:
                self.synchronize()
                self._call("cuMemFreeHost", pinned.pop(address).address)
            buffer = pinned[address] = HostBuffer(int(self._call("cuMemHostAlloc", max(size, 1), 0)), size)
        return buffer.address

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
