"""What the machine can do: read bandwidth, multiply-accumulate rate, memory of this process."""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

READ_BYTES = 1 << 29
PRODUCT_SIDE = 1024


class ReadBandwidth:
    """Measures how fast ``threads`` threads read memory, over a buffer far larger than any cache."""

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self.measure()

    def measure(self) -> float:
        """Bytes a second."""
        start = time.perf_counter()
        # The largest of integers: numpy releases the interpreter lock, and the reading costs more than the comparing.
        list(self._pool.map(np.max, self._parts))
        return READ_BYTES / (time.perf_counter() - start)


def peak_macs() -> float:
    """Multiply-accumulates a second in float32, of the product of two large matrices by numpy's BLAS on all its threads."""
    matrix = np.ones((PRODUCT_SIDE, PRODUCT_SIDE), np.float32)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, PRODUCT_SIDE**3 / (time.perf_counter() - start))
    return best


def default_threads() -> int:
    """Threads that a backend uses when it is told none: the cores that this process may run on, and may use at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(CGROUPS))))


CGROUPS = Path("/sys/fs/cgroup")


def _quota(root: Path) -> float:
    """Cores that the control group of this process, a container's for example, may use at a time. Infinite where it may use all.

    Follows https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``), and ``cpu.cfs_quota_us`` of the first version.
    """
    quotas = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        if quota > 0:
            quotas.append(quota / period)
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        (own,) = (line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        # In a container the group's own name may stand for nothing: its root is what bounds.
        for folder in (root / own, *(root / own).parents):
            with contextlib.suppress(OSError, ValueError):
                text, length = (folder / "cpu.max").read_text().split()
                quotas.append(int(text) / int(length))
            if folder == root:
                break
    return min(quotas)


def available_bytes() -> int | None:
    """Memory that this process could still take without swapping; None where the system does not say (other than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * mmap.PAGESIZE


def peak_resident_bytes() -> int | None:
    """Most memory that this process had, since it began or since :func:`forget_peak`; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        try:
            # Only systems of the Unix kind have it.
            resource = importlib.import_module("resource")
        except ModuleNotFoundError:
            return None
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Let :func:`peak_resident_bytes` start again from now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
