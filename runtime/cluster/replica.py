"""What Ray Serve runs on every machine: replicas of the server's app, and one place where they tell each other their metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from linert.runtime.backends.options import BackendOptions
from linert.runtime.cluster.scale import Room
from linert.runtime.cluster.worker import BundleCopy, check_version
from linert.runtime.errors import DeviceError
from linert.runtime.serving.app import LOG, LOG_FORMAT, Limits, Server
from linert.runtime.serving.metrics import by_replica
from linert.runtime.serving.models import EngineSettings, Models, check_names

TELLING = 1.0
"""Seconds between two times that a replica tells its metrics."""

FORGOTTEN = 10.0
"""Seconds after which metrics of a replica that tells no more are those of one that is gone."""


@dataclass(frozen=True)
class Served:
    """What every replica serves.

    ``bundles``: by folder, the variants that engines draw from. ``rows``: images that they draw at a time, of all engines. ``keys``:
    digests of those that clients may have. ``version``: of linert.
    """

    bundles: dict[Path, tuple[BundleCopy, ...]]
    rows: int
    settings: EngineSettings
    limits: Limits
    keys: tuple[bytes, ...] = ()
    version: str = field(default_factory=lambda: version("linert"))

    @staticmethod
    def of(paths: list[Path], settings: EngineSettings, limits: Limits, keys: tuple[bytes, ...]) -> Served:
        """What there is to serve of the bundles of this machine.

        Raises:
            LinertError: one cannot be opened, does not fit the settings, or two have one name.
        """
        check_names(paths)
        opened = {
            Path(os.path.abspath(path)): [bundle for bundle, _ in settings.open(path)] for path in paths
        }
        copies = {path: tuple(map(BundleCopy.of, bundles)) for path, bundles in opened.items()}
        rows = sum(bundle.manifest.images for bundles in opened.values() for bundle in bundles)
        return Served(copies, rows, settings, limits, keys)

    @property
    def room(self) -> Room:
        """What a replica has room for."""
        engines = sum(map(len, self.bundles.values()))
        return Room(self.rows, engines * self.settings.waiting)

    def with_options(self, options: BackendOptions) -> Served:
        """The same with other options of the backend."""
        return replace(self, settings=replace(self.settings, options=options))

    def open(self) -> Models:
        """The models, each of which has drawn an image.

        Raises:
            LinertError: this machine has other bundles or another linert, or an engine fails.
        """
        check_version(self.version)
        for copies in self.bundles.values():
            for copy in copies:
                copy.open()
        models = Models(list(self.bundles), self.settings)
        try:
            models.warm_up()
        except BaseException:
            models.close()
            raise
        return models


class MetricsBoard:
    """Where replicas tell their metrics, and read those of the others."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, list[Metric]]] = {}

    def exchange(self, replica: str, families: list[Metric]) -> dict[str, list[Metric]]:
        """Take the metrics of a replica; those of all that are there, by replica."""
        now = time.monotonic()
        self._told[replica] = now, families
        self._told = {name: told for name, told in self._told.items() if now - told[0] < FORGOTTEN}
        return {name: metrics for name, (_, metrics) in self._told.items()}


class Replica:
    """The server's app over engines of its own.

    Ray sends it requests once it has drawn an image with every engine, and starts another in its place when an engine fails.
    """

    def __init__(self, served: Served, board: Any) -> None:
        # Ray keeps what actors write to standard error among its logs.
        log = logging.StreamHandler()
        log.setFormatter(logging.Formatter(LOG_FORMAT))
        LOG.addHandler(log)
        LOG.setLevel(logging.INFO)
        self._board = board
        self._name = serve.get_replica_context().replica_id.unique_id
        self.models = served.open()
        self.server = Server(self.models, served.limits, served.keys, beside=self._beside)
        self._telling = asyncio.get_running_loop().create_task(self._tell())

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.server.app()

    def check_health(self) -> None:
        """Raise :class:`DeviceError` when a backend has failed: the replica is then replaced."""
        if not self.models.ready:
            errors = [
                f"{model.name}: {engine.error}" for model, _, engine in self.models.engines() if engine.error
            ]
            raise DeviceError("; ".join(errors) or "not ready")

    async def _beside(self, families: list[Metric]) -> list[Metric]:
        return by_replica(await self._board.exchange.remote(self._name, families))

    async def _tell(self) -> None:
        while True:
            # While the board is started anew there is nobody to tell.
            with contextlib.suppress(Exception):
                families = await run_in_threadpool(self.server.metrics.families)
                await self._board.exchange.remote(self._name, families)
            await asyncio.sleep(TELLING)

    def __del__(self) -> None:
        # There are none where the replica could not be made.
        if models := getattr(self, "models", None):
            models.close()
