"""Put large allocations on huge pages, and give freed ones back.

A decode step streams every weight once. On 4 KiB pages that is a page walk every 64 cache lines, and the hardware
prefetcher stops at each page's end: huge pages are worth a seventh of the step. Linux gives them on request
(``madvise``), and the request can be made for memory that another library allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE = 2 << 20
LEAST_BYTES = 2 * HUGE_PAGE
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25
"""Linux 6.1: copy what is already there to huge pages now. Older kernels refuse, and do it in the background."""

MAPS = Path("/proc/self/maps")


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Ask for huge pages under the large private allocations made inside the block. Does nothing but on Linux."""
    before = _allocations()
    yield
    for start, end in _allocations() - before:
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if last > first:
            _madvise(first, last - first)


def release_freed() -> None:
    """Hand freed memory back to the system (glibc only).

    Loading a session makes and frees copies of its weights, which the allocator would keep: four fifths of a quantised
    model's size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _allocations() -> set[tuple[int, int]]:
    """Private, writable, anonymous memory of this process in pieces of at least ``LEAST_BYTES``."""
    if sys.platform != "linux" or not MAPS.exists():
        return set()
    spans = set()
    # Names of mapped files are any bytes, and may hold what ends a line of text.
    for line in MAPS.read_bytes().rstrip(b"\n").split(b"\n"):
        fields = line.split()
        start, end = (int(part, 16) for part in fields[0].split(b"-"))
        anonymous = len(fields) == 5
        if anonymous and fields[1].startswith(b"rw-p") and end - start >= LEAST_BYTES:
            spans.add((start, end))
    return spans


def _madvise(start: int, length: int) -> None:
    """A refusal is no error: the memory then stays on small pages."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(start, length, MADV_HUGEPAGE) == 0:
        madvise(start, length, MADV_COLLAPSE)
