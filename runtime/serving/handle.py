"""What becomes of an image that was asked for: events, in the order in which they happen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.eviction_map import Shares
from linert.runtime.drawing.generator import Image, Tokens
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import LinertError


class CancelledError(LinertError):
    """An image was cancelled by whoever asked for it, or by the end of the engine."""


@dataclass(frozen=True)
class Event:
    """``seconds``: since the request was submitted."""

    seconds: float


@dataclass(frozen=True)
class Admitted(Event):
    """The image has a row, and its condition is fed."""


@dataclass(frozen=True)
class PartDrawn(Event):
    """So many ``parts``, lines or groups, are drawn: ``tokens [N]`` int64, 0 where they are still to come, and which of them are ``drawn [N]``."""

    parts: int
    tokens: Tokens
    drawn: NDArray[np.bool_]


@dataclass(frozen=True)
class Done(Event):
    """The image is drawn and decoded. ``kept [lines - 1, layers, N]``: what was in the cache behind each line, if that was asked for
    (:func:`linert.runtime.drawing.eviction_map.resident_shares`)."""

    image: Image
    kept: Shares | None = None


@dataclass(frozen=True)
class Failed(Event):
    """There will be no image; ``error`` says why."""

    error: LinertError


@dataclass(frozen=True)
class Cancelled(Event):
    """There will be no image, for it was cancelled."""


Last = (Done, Failed, Cancelled)
"""Events behind which there are none."""


@dataclass(eq=False)
class Handle:
    """An image that was asked for. Iterating over it, with ``for`` or ``async for``, gives its events, from the first one on and however
    often; the last is one of :data:`Last`. Threads may share it.

    ``parts``: whether :class:`PartDrawn` is wanted. ``kept``: what the cache kept, where that is.
    """

    sample: Sample
    sampling: SamplingSettings
    parts: bool = False
    kept: Shares | None = None
    _wake: Callable[[], object] = lambda: None
    _begun: float = field(default_factory=time.monotonic)
    _events: list[Event] = field(default_factory=list)
    _changed: Condition = field(default_factory=Condition)
    _listeners: list[Callable[[], object]] = field(default_factory=list)
    _cancelled: bool = False

    def cancel(self) -> None:
        """Draw no further; a row that the image has falls free at the next step. What is drawn already stays so."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    @property
    def over(self) -> bool:
        """Whether there are no more events to come."""
        with self._changed:
            return bool(self._events) and isinstance(self._events[-1], Last)

    def tell(self, make: Callable[[float], Event]) -> None:
        """Add the event that is made of the seconds since the request, unless the last one was told already."""
        with self._changed:
            if self._events and isinstance(self._events[-1], Last):
                return
            self._events.append(make(time.monotonic() - self._begun))
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def result(self, timeout: float | None = None) -> Image:
        """Wait for the image.

        Raises:
            TimeoutError: it takes longer than so many seconds.
            CancelledError: it was cancelled.
            LinertError: it failed.
        """
        with self._changed:
            over = self._changed.wait_for(
                lambda: self._events and isinstance(self._events[-1], Last), timeout
            )
            if not over:
                raise TimeoutError(f"no image of {self.sample.label} after {timeout} s")
            last = self._events[-1]
        if isinstance(last, Done):
            return last.image
        if isinstance(last, Failed):
            raise last.error
        raise CancelledError(f"the image of {self.sample.label} was cancelled")

    def __iter__(self) -> Iterator[Event]:
        number = 0
        while True:
            with self._changed:
                while len(self._events) <= number:
                    self._changed.wait()
                event = self._events[number]
            yield event
            if isinstance(event, Last):
                return
            number += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            # A loop that is closed waits for nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(listener)
        try:
            number = 0
            while True:
                with self._changed:
                    events = self._events[number:]
                for event in events:
                    number += 1
                    yield event
                    if isinstance(event, Last):
                        return
                if not events:
                    await changed.wait()
                    changed.clear()
        finally:
            with self._changed:
                self._listeners.remove(listener)
