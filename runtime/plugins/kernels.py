"""Compiled GPU kernels as a plan carries them, and their launch through the CUDA driver."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec


class CompiledKernel(msgspec.Struct, frozen=True):
    """One kernel for several GPUs.

    ``name``: of its entry point. ``warps``: of 32 threads each. ``shared_bytes``: dynamic shared memory. ``hidden``: pointers that
    follow its own parameters, all null. ``cubins``: machine code by compute capability (80 means 8.0). ``ptx``: for all
    later GPUs.
    """

    name: str
    warps: int
    shared_bytes: int
    hidden: int
    cubins: dict[int, bytes]
    ptx: bytes

    def image(self, capability: int) -> bytes:
        """What a GPU of this compute capability loads: its own machine code, or the text that its driver compiles."""
        # Machine code runs on later GPUs of the same generation.
        same = [sm for sm in self.cubins if sm // 10 == capability // 10 and sm <= capability]
        architecture_specific = {90, 100, 120}
        same = [sm for sm in same if sm == capability or sm not in architecture_specific]
        return self.cubins[max(same)] if same else self.ptx


class KernelSet(msgspec.Struct, frozen=True):
    """The kernels of a plugin by the names that it calls them."""

    kernels: dict[str, CompiledKernel]


class LoadedKernel:
    """A kernel on the current device, ready to be launched; unloaded with the object.

    Args:
        kernel: what to load.
        driver: ``cuda.bindings.driver``.
        capability: of the current device (80 means 8.0).

    Raises:
        RuntimeError: the driver refuses it.
    """

    def __init__(self, kernel: CompiledKernel, driver: Any, capability: int) -> None:
        self.kernel, self.driver = kernel, driver
        # The text must end with a zero.
        module = checked(driver, driver.cuModuleLoadData(kernel.image(capability) + b"\0"))
        # The end of the process unloads everything, in an order of its own.
        weakref.finalize(self, driver.cuModuleUnload, module).atexit = False
        self._function = checked(driver, driver.cuModuleGetFunction(module, kernel.name.encode()))
        if kernel.shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver, driver.cuFuncSetAttribute(self._function, attribute, kernel.shared_bytes))

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: ctypes._SimpleCData[Any]) -> None:
        """Launch on ``stream``; ``arguments`` are the kernel's own parameters as C values."""
        values: Sequence[Any] = [*arguments, *(ctypes.c_void_p(0) for _ in range(self.kernel.hidden))]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        checked(
            self.driver,
            self.driver.cuLaunchKernel(
                self._function,
                *grid,
                *(32 * self.kernel.warps, 1, 1),
                self.kernel.shared_bytes,
                stream,
                ctypes.addressof(pointers),
                0,
            ),
        )


class DeviceKernels:
    """The kernels of one plugin on the current device, and the small tables that they read.

    Args:
        driver: ``cuda.bindings.driver``.
    """

    def __init__(self, kernels: Mapping[str, LoadedKernel], driver: Any) -> None:
        self.driver = driver
        self._kernels = kernels
        self._tables: dict[tuple[int, ...], int] = {}
        weakref.finalize(self, _free_host, driver, self._tables).atexit = False

    def __getitem__(self, name: str) -> LoadedKernel:
        return self._kernels[name]

    def table(self, numbers: Sequence[int], address: int, stream: int) -> None:
        """Copy ``numbers`` to ``address`` on the device as int64, on ``stream``.

        They lie in page-locked memory that is never written again, so that a CUDA graph in which the copy was captured can be
        replayed at any time. Memory is allocated when numbers are new, which must not be while a graph is captured.

        Raises:
            RuntimeError: the driver refuses.
        """
        key = tuple(numbers)
        size = 8 * len(key)
        if key not in self._tables:
            host = int(checked(self.driver, self.driver.cuMemHostAlloc(size, 0)))
            ctypes.memmove(host, (ctypes.c_int64 * len(key))(*key), size)
            self._tables[key] = host
        checked(self.driver, self.driver.cuMemcpyHtoDAsync(address, self._tables[key], size, stream))


def _free_host(driver: Any, tables: Mapping[tuple[int, ...], int]) -> None:
    # The device may be gone already, and its memory with it: errors mean nothing here.
    for host in tables.values():
        driver.cuMemFreeHost(host)


def current_capability(driver: Any, device: Any) -> int:
    """Compute capability of ``device`` (80 means 8.0).

    Raises:
        RuntimeError: the driver does not know the device.
    """
    kind = driver.CUdevice_attribute
    major, minor = (
        checked(driver, driver.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(10 * major + minor)


def checked(driver: Any, result: Sequence[Any]) -> Any:
    """The value of a driver call.

    Raises:
        RuntimeError: the call failed; the message is the driver's.
    """
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA: {text.decode() if text else error}")
    return values[0] if len(values) == 1 else tuple(values) or None
