"""A worker of a run: an actor of Ray that draws whole batches with a generator of its own."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.drawing.batches import BatchDrawer, BatchSettings, BatchTask, DrawnBatch
from linert.runtime.drawing.captions import CaptionConditioner
from linert.runtime.drawing.generator import Generator
from linert.runtime.errors import BundleError, LinertError

Features = Mapping[str, NDArray[np.float32]]
"""Of captions ``[length, feature_dim]``, by their digest."""


@dataclass(frozen=True)
class BundleCopy:
    """A variant of a bundle as every machine of a cluster must have it: under the same path, and the same."""

    path: str
    size: str
    variant: str
    sha256: str

    @staticmethod
    def of(bundle: Bundle) -> BundleCopy:
        """Of a bundle of this machine."""
        return BundleCopy(str(bundle.path.resolve()), bundle.size, bundle.variant, bundle.manifest.sha256)

    def open(self) -> Bundle:
        """Open this machine's copy.

        Raises:
            BundleError: there is none, it is damaged, or it is another bundle.
        """
        try:
            bundle = open_bundle(self.path, self.size or None).other(self.variant)
        except LinertError as error:
            raise BundleError(
                f"on {platform.node()}: {error} (every machine of the cluster reads the bundle under the same path)"
            ) from error
        self.check(bundle)
        return bundle

    def check(self, bundle: Bundle) -> None:
        """Raise :class:`BundleError` unless ``bundle`` is the one that was meant."""
        if bundle.manifest.sha256 != self.sha256:
            raise BundleError(
                f"the bundle {self.path} on {platform.node()} is another one (sha256 {bundle.manifest.sha256[:16]}) than on the machine "
                f"that gives out the work ({self.sha256[:16]}): copy that one there"
            )


def check_version(wanted: str) -> None:
    """Raise :class:`LinertError` unless this machine has the linert that the one has that gives out the work."""
    here = version("linert")
    if here != wanted:
        raise LinertError(
            f"linert {here} is installed on {platform.node()}, and {wanted} on the machine that gives out the work: install the same"
        )


@dataclass(frozen=True)
class Opening:
    """What a worker needs before its first batch. ``version``: of linert."""

    bundle: BundleCopy
    options: BackendOptions
    settings: BatchSettings
    version: str

    @staticmethod
    def of(bundle: Bundle, options: BackendOptions, settings: BatchSettings) -> Opening:
        return Opening(BundleCopy.of(bundle), options, settings, version("linert"))


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    machine: str
    process: int

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.machine}, process {self.process}"


class DrawWorker:
    """Draws batches, one at a time. While it does, :meth:`lines` answers from another thread."""

    def __init__(self) -> None:
        self._reached = (-1, 0)
        self._drawer: BatchDrawer | None = None

    def open(self, opening: Opening) -> Place:
        """Open this machine's copy of the bundle; where that is.

        Raises:
            BundleError: it is not there, damaged, or another one.
            LinertError: linert is of another version here.
        """
        check_version(opening.version)
        self._drawer = BatchDrawer(Generator(opening.bundle.open(), opening.options), opening.settings)
        return Place(platform.node(), os.getpid())

    def draw(self, task: BatchTask, features: Features) -> tuple[DrawnBatch, str | None]:
        """Draw a batch, and tell which window is quickest so far, if that is measured.

        Args:
            features: of the captions among its samples, which only the machine that gives out the work has read.
        """
        if self._drawer is None:
            raise RuntimeError("a worker that was not opened")
        conditioner = self._drawer.generator.conditioner
        if isinstance(conditioner, CaptionConditioner):
            conditioner.keep(features)

        def note(lines: int) -> None:
            self._reached = task.number, lines

        return self._drawer(task, note), self._drawer.window_text

    def lines(self) -> tuple[int, int]:
        """The number of the batch, and how many of its lines are drawn."""
        return self._reached
