"""What interpreted kernels load, store and reckon: every address checked, every number counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


class WatchedMemory:
    """What kernels may touch, and how much they did.

    ``moved``: numbers loaded and stored so far, those that are masked out left aside. ``reckoned``: results of additions, comparisons
    and the like.
    """

    def __init__(self) -> None:
        self.moved = self.reckoned = 0
        self._begins: list[int] = []
        self._ends: list[int] = []

    def allow(self, address: int, size: int) -> None:
        """Let kernels touch ``size`` bytes at ``address``."""
        self._begins.append(address)
        self._ends.append(address + size)

    def touch(self, pointers: Any, mask: Any) -> None:
        """Count an access.

        Raises:
            AssertionError: some lie in none of the allowed ranges.
        """
        addresses = pointers.data[mask.data.astype(bool)].astype(np.uint64).ravel()
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        begins, ends = np.array(self._begins, np.uint64), np.array(self._ends, np.uint64)
        order = np.argsort(begins)
        begins, ends = begins[order], ends[order]
        # The range that begins last before an address; the first where there is none, which the address is not in either.
        number = np.maximum(np.searchsorted(begins, addresses, side="right") - 1, 0)
        inside = (addresses >= begins[number]) & (addresses + np.uint64(size) <= ends[number])
        if not inside.all():
            raise AssertionError(f"{(~inside).sum()} of {len(addresses)} addresses lie in no buffer")
        self.moved += len(addresses)


@contextmanager
def watched() -> Iterator[WatchedMemory]:
    """Watch what interpreted kernels do in this block."""
    memory, builder = WatchedMemory(), interpreter.interpreter_builder
    load, store, reckon = builder.create_masked_load, builder.create_masked_store, builder.binary_op

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(pointers, mask)
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(pointers, mask)
        return store(pointers, value, mask, *rest)

    def watched_reckoning(left: Any, right: Any, operation: Any) -> Any:
        result = reckon(left, right, operation)
        memory.reckoned += result.data.size
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "binary_op", watched_reckoning)
        yield memory
