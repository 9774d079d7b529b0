"""The rows of a batch: which images have them, and the stages that let these begin and move them on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.bundles.setting import stage_inputs
from linert.runtime.drawing.conditioner import Conditioner, Inputs
from linert.runtime.drawing.generator import Tokens, make_batch
from linert.runtime.drawing.loop import lay_out, not_finite, sampling_inputs
from linert.runtime.drawing.orders import Cells
from linert.runtime.drawing.samples import Sample
from linert.runtime.serving.handle import Admitted, Cancelled, Failed, Handle, PartDrawn


@dataclass
class Counts:
    """What an engine has done since it was opened.

    ``admissions``: runs of the stage that lets images begin; ``steps``: of decode; ``line_ends``: of theirs. ``tokens``: drawn.
    """

    submitted: int = 0
    refused: int = 0
    admitted: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    admissions: int = 0
    steps: int = 0
    line_ends: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Beginning:
    """An image that is to have a row. ``inputs``: its condition, as of a batch of one. ``first``: the position that is fed first. ``order``: the
    cell of the token of every rank, of an image that is drawn in groups."""

    handle: Handle
    inputs: Inputs
    first: int
    order: Cells | None = None


@dataclass
class Row:
    """An image in a row. ``shown``: parts of it that are drawn, lines or groups."""

    handle: Handle
    shown: int = 0
    begun: float = field(default_factory=time.monotonic)


class Rows(ABC):
    """The rows of a backend's batch, in one thread; others may ask how many are :attr:`busy`.

    Args:
        manifest: of the bundle that is drawn.
        counts: of what is done.
        finish: called with an image's handle and tokens when they are drawn.

    Attributes:
        taken: the image that each row has, if any.
        image_seconds: that the last image took from its beginning.
    """

    def __init__(self, manifest: Manifest, counts: Counts, finish: Callable[[Handle, Tokens], None]) -> None:
        self.manifest, self.raster = manifest, manifest.raster
        self.taken: list[Row | None] = [None] * manifest.images
        self.counts, self.finish = counts, finish
        self.image_seconds = 0.0
        self._spoiled: set[int] = set()
        self._left: set[int] = set()
        self._filtered = False

    @property
    def busy(self) -> int:
        """Rows that an image has."""
        return sum(row is not None for row in self.taken)

    def open(
        self, backend: Backend, conditioner: Conditioner, cache: CacheSettings | None, window: int
    ) -> None:
        """Lay out the state on ``backend``, and feed ``window`` positions of a raster a step from then on."""
        self.backend, self.window = backend, window
        manifest = self.manifest
        usual = [Sample(conditioner.usual()[0], 0)]
        batch = make_batch(manifest, conditioner, usual, manifest.sampling, cache)
        self.batch = replace(batch, window=window)
        inputs: dict[str, NDArray[np.generic]] = {
            **self.batch.conditions,
            **sampling_inputs(manifest, manifest.sampling),
        }
        if self.batch.orders is not None:
            inputs["order"] = self.batch.orders
        self._inputs = {name: values for name, values in inputs.items() if name in backend.specs}
        for stage in (*self.stages(), "admit"):
            backend.load(stage)
        self.reset()

    def reset(self) -> None:
        """Lay out the state with every row idle."""
        lay_out(self.backend, self.batch)
        self._spoiled.clear()
        self._left.clear()

    @abstractmethod
    def stages(self) -> Iterator[str]:
        """The stages that move images on."""

    @abstractmethod
    def row_of(self, beginning: Beginning) -> Row:
        """The row of an image that begins."""

    @abstractmethod
    def wait(self, beginning: Beginning, chosen: Collection[Beginning]) -> int:
        """Steps until an image may begin, where a row is free and those that are ``chosen`` begin now; 0 is at once."""

    @abstractmethod
    def advance(self, most: int, interrupted: Callable[[], bool]) -> None:
        """Run decode steps until there is something to tell, at most so many, and no more once ``interrupted``."""

    @abstractmethod
    def logits(self) -> NDArray[np.float32] | None:
        """Those of the last decode step, ``[B, ...]``; None where there was none."""

    @abstractmethod
    def drawn(self, row: Row, tokens: Tokens) -> NDArray[np.bool_]:
        """Which of an image's ``tokens [N]``, as the state has them, are drawn."""

    @abstractmethod
    def part(self, row: Row) -> str:
        """What of an image was drawn last, for people."""

    def images(self) -> Iterator[tuple[int, Row]]:
        """The rows that an image has, by number."""
        for number, row in enumerate(self.taken):
            if row is not None:
                yield number, row

    def drop_cancelled(self) -> None:
        """Free the rows of images that were cancelled."""
        for number, row in list(self.images()):
            if row.handle.cancelled:
                self.taken[number] = None
                self._left.add(number)
                self.drop(row.handle)

    def drop(self, handle: Handle) -> None:
        """Tell that an image was cancelled."""
        self.counts.cancelled += 1
        handle.tell(Cancelled)

    def free(self) -> list[int]:
        """Rows that an image may have. One whose numbers are not finite is not among them before the whole state is laid out anew,
        which is done when no image has any row: what its caches hold would be no number for ever."""
        if self._left:
            # Rows of cancelled images are fed on, and nobody looked at them since.
            finite = self._finite()
            self._spoiled |= {number for number in self._left if not finite[number]}
        if self._spoiled and not self.busy:
            self.reset()
        return [n for n, row in enumerate(self.taken) if row is None and n not in self._spoiled]

    def begin(self, beginnings: Mapping[int, Beginning]) -> None:
        """Give rows to images, by number, and lay them out."""
        backend = self.backend
        for number, beginning in beginnings.items():
            handle = beginning.handle
            # They have their rows before anything can fail: whatever fails is told to all who have one.
            self.taken[number] = self.row_of(beginning)
            self._left.discard(number)
            mine = {
                **{name: values[0] for name, values in beginning.inputs.items()},
                **stage_inputs(handle.sampling, self.raster),
                "order": beginning.order,
            }
            self.batch.noise.begin(number, handle.sample.seed)
            for name, array in self._inputs.items():
                array[number] = mine[name]
        for name, array in (*self._inputs.items(), ("noise", self.batch.noise.table)):
            backend.write(name, array)
        backend.write("admitted", np.array([n in beginnings for n in range(len(self.taken))], np.int64))
        backend.run("admit")
        self.counts.admissions += 1
        self.counts.admitted += len(beginnings)
        for beginning in beginnings.values():
            beginning.handle.tell(Admitted)
        self._filtered = any(row.handle.sampling.filtered for _, row in self.images())

    def _finite(self) -> NDArray[np.bool_]:
        """Of which images ``[I]`` the last logits are finite."""
        manifest, logits = self.manifest, self.logits()
        if logits is None:
            return np.ones(manifest.images, bool)
        by_image = logits.reshape(manifest.branches, manifest.images, -1)
        return np.asarray(np.isfinite(by_image).all((0, 2)))

    def show(self, rows: Mapping[int, Row]) -> None:
        """Look at images that have drawn a part: whether their numbers are finite, and whether they are done."""
        finite = self._finite()
        parts = self.manifest.parts
        told = any(row.handle.parts or row.shown == parts(row.handle.sampling) for row in rows.values())
        tokens = cast("Tokens", self.backend.read("tokens")) if told else None
        for number, row in rows.items():
            handle = row.handle
            if not finite[number]:
                self.taken[number] = None
                self._spoiled.add(number)
                self.counts.failed += 1
                where = f"{self.part(row)} of the image of {handle.sample.label}"
                handle.tell(partial(Failed, error=not_finite(self.manifest, where)))
            elif tokens is not None:
                drawn, mine = self.drawn(row, tokens[number]), tokens[number].clip(min=0)
                if handle.parts:
                    handle.tell(partial(PartDrawn, parts=row.shown, tokens=mine, drawn=drawn))
                if row.shown == parts(handle.sampling):
                    self.image_seconds = time.monotonic() - row.begun
                    self.taken[number] = None
                    self.finish(handle, mine)
