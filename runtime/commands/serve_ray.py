"""``linert serve --ray``: replicas of the server on a Ray cluster."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from linert.runtime.cluster.deployment import deployed, watch_until
from linert.runtime.cluster.scale import Listening, Scale
from linert.runtime.cluster.session import (
    import_ray,
    joined_address,
    local_cpus,
    ray_cluster,
    shares,
    with_share,
)
from linert.runtime.commands.ray_options import ReplicasRequest
from linert.runtime.errors import RequestError
from linert.runtime.serving.app import Limits
from linert.runtime.serving.models import EngineSettings


def serve_on_ray(
    paths: list[Path],
    settings: EngineSettings,
    limits: Limits,
    keys: tuple[bytes, ...],
    listening: Listening,
    ray: ReplicasRequest,
    drain_seconds: float,
    note: Callable[[str], object],
) -> None:
    """Serve from a Ray cluster until a signal says to stop.

    Raises:
        LinertError: there is no such cluster, or no replica can be started there.
    """
    import_ray("ray.serve")
    from linert.runtime.cluster.replica import Served

    joined = joined_address(ray.address)
    if listening.port == 0 and joined:
        raise RequestError(
            "--port 0 takes a free port of one machine, and on a cluster all listen on the same: name one"
        )
    most = ray.max_replicas or ray.replicas
    scale = None if most is None else Scale(ray.replicas or ray.min_replicas or 1, most)
    options = settings.options
    # What cannot be served is said before a cluster is started.
    served = Served.of(paths, settings, limits, keys)
    found = listening if joined else with_port(listening)
    with ray_cluster(ray.address, local_cpus(most or 1, options)) as cluster:
        count, share = shares(cluster.machines(), most, options)
        served = served.with_options(with_share(options, share))
        scale = scale or Scale(count, count)
        with (
            stopped_by_signals() as stop,
            deployed(cluster, served, found, scale, served.room, share, drain_seconds),
        ):
            replicas = f"{scale.least} to {scale.most}" if scale.least < scale.most else f"{scale.least}"
            names = ", ".join(path.name for path in served.bundles)
            host = f"[{found.host}]" if ":" in found.host else found.host
            note(f"{names}: http://{host}:{found.port} ({replicas} replicas of {share.cpus} CPUs)")
            watch_until(stop, note)


def with_port(listening: Listening) -> Listening:
    """``listening`` with a port that nobody on this machine has, if it names none.

    Raises:
        OSError: somebody has the one that it names.
    """
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind((listening.host, listening.port))
        number = tried.getsockname()[1]
    return Listening(listening.host, number)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. A second signal does not wait for what is running."""
    stop = threading.Event()

    def told(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, told) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
