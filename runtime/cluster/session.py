"""A Ray cluster to work on: one that runs already, or one of this machine alone that lasts as long as it is used."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.errors import DeviceError, LinertError, RequestError
from linert.runtime.machine import default_threads

LOCAL, AUTO = "local", "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"

CONNECTING = 10.0
"""Seconds to reach a cluster's head."""

OBJECT_BYTES = 256 << 20
"""Of a local cluster's store of objects: a few batches' pictures on their way."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
}
"""Ray tells nobody of its use, and leaves the devices of actors that asked for none as they are."""


@dataclass(frozen=True)
class Share:
    """What one worker or replica has of a cluster: whole CPUs and GPUs."""

    cpus: int
    gpus: int = 0

    @property
    def ray_options(self) -> dict[str, int]:
        """For Ray's actors."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@dataclass(frozen=True)
class Machine:
    """What a machine of a cluster has."""

    cpus: int
    gpus: int


def shares(machines: list[Machine], count: int | None, options: BackendOptions) -> tuple[int, Share]:
    """How many workers there are, and what each has: ``count`` of them, or one a machine, on a GPU backend one a GPU.

    A worker has as many CPUs as ``options`` say threads, or all that the smallest machine can give each of those that it gets.

    Raises:
        DeviceError: the cluster has no GPU for a GPU backend.
        RequestError: no machine has so many CPUs.
    """
    gpus = sum(machine.gpus for machine in machines)
    on_gpu = options.name is not BackendName.CPU
    if on_gpu and not gpus:
        raise DeviceError(f"--backend {options.name}: no machine of the Ray cluster has a GPU")
    usable = [machine for machine in machines if machine.gpus or not on_gpu]
    workers = count or (gpus if on_gpu else len(usable))
    least, most = min(m.cpus for m in usable), max(m.cpus for m in usable)
    if options.threads > most:
        raise RequestError(
            f"--threads {options.threads}: the largest machine of the Ray cluster has {most} CPUs"
        )
    each = max(1, least // -(-workers // len(usable)))
    return workers, Share(options.threads or each, int(on_gpu))


def local_cpus(workers: int, options: BackendOptions) -> int:
    """CPUs of a cluster of this machine alone: its own, or as many as ``workers`` take."""
    return max(default_threads(), workers * max(1, options.threads))


def with_share(options: BackendOptions, share: Share) -> BackendOptions:
    """``options`` with the threads of a share."""
    return replace(options, threads=share.cpus)


def import_ray(name: str = "ray") -> Any:
    """A module of Ray's.

    Raises:
        LinertError: it is not installed, or not with what it needs.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LinertError(
            f"--ray needs {error.name}, which is not installed: pip install 'linert[ray]'"
        ) from error


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process works on. ``ours``: whether it was started for that, and ends with it."""

    ray: Any
    ours: bool

    def machines(self) -> list[Machine]:
        """Those that are there and have CPUs to give."""
        found = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [
            Machine(int(held["CPU"]), int(held.get("GPU", 0))) for held in found if held.get("CPU", 0) >= 1
        ]


def check_address(address: str) -> None:
    """Say at once what Ray would try for minutes.

    Raises:
        RequestError: ``address`` is none of a machine and a port.
        DeviceError: nothing listens there.
    """
    found = re.fullmatch(r"\[?([^\[\]/]+?)\]?:([0-9]{1,5})", address)
    if found is None:
        raise RequestError(
            f"--ray-address {address}: give the address of a cluster's head, as 10.0.0.1:6379, or auto on a machine of the cluster"
        )
    try:
        with socket.create_connection((found[1], int(found[2])), CONNECTING):
            pass
    except (OSError, OverflowError) as error:
        raise DeviceError(f"no Ray cluster could be joined at {address}: {error}") from error


def joined_address(address: str | None) -> str | None:
    """Where the cluster is that is to be joined; None if one of this machine is to be started."""
    where = address or os.environ.get(ADDRESS_VARIABLE)
    return None if where == LOCAL else where


@contextlib.contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[Cluster]:
    """Join the cluster at ``address``, or of the variable ``RAY_ADDRESS``; without either start one of this machine.

    A process that is connected already uses that cluster, and stays connected.

    Args:
        address: as ``10.0.0.1:6379``; ``auto`` is the cluster of this machine.
        cpus: of a cluster that is started.

    Raises:
        LinertError: Ray is not installed.
        DeviceError: there is no cluster, or one of another version of Ray or Python.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield Cluster(ray, ours=False)
        return
    where = joined_address(address) or LOCAL
    if where not in (LOCAL, AUTO):
        check_address(where)
    ours = where == LOCAL
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": cpus, "object_store_memory": OBJECT_BYTES}
    with handlers_kept():
        try:
            ray.init(
                address=where,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if ours else {}),
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
            ray.shutdown()
            what = "no Ray could be started here" if ours else f"no Ray cluster could be joined at {where}"
            raise DeviceError(f"{what}: {first_line(error)}") from error
    # Ray prints what happens to processes, in a thread of its own: what matters of it is told by those who work on the cluster.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield Cluster(ray, ours)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Leave the handlers of signals as they are: Ray sets its own, which end the process at once."""
    # Only the main thread may set any.
    names = ("SIGINT", "SIGTERM") if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
