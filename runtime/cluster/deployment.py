"""The server on Ray Serve: how many replicas there are, what each may hold, and how they end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from linert.runtime.cluster.scale import Listening, Room, Scale
from linert.runtime.cluster.session import Cluster, Share, first_line
from linert.runtime.errors import DeviceError, RequestError

APP = "linert"
DEPLOYMENT = "images"

HEALTH_SECONDS = 5.0
"""Between two looks at whether a replica's engines draw."""

LOOK = 2.0
"""Seconds between two looks at the replicas."""

FLUSH = 0.3
"""Seconds for proxies to send what replicas have finished."""

RETRY_AFTER = 1
"""Seconds after which a client may come back that every replica was too full for."""


@contextlib.contextmanager
def deployed(
    cluster: Cluster,
    served: Any,
    listening: Listening,
    scale: Scale,
    room: Room,
    share: Share,
    drain_seconds: float,
) -> Iterator[None]:
    """Have Ray Serve run replicas; once the block is entered all are ready.

    At its end they get no more requests and finish what they are at, within ``drain_seconds``; then Ray Serve is shut down.

    Args:
        served: what they serve, a :class:`linert.runtime.cluster.replica.Served`.
        share: what each has of the cluster.

    Raises:
        RequestError: Ray Serve runs in the cluster already.
        DeviceError: no replica could be started.
    """
    from ray import serve

    from linert.runtime.cluster.replica import MetricsBoard, Replica

    refuse_running(cluster)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    scaling: dict[str, Any] = {"num_replicas": scale.least}
    if scale.least < scale.most:
        bounds = {"min_replicas": scale.least, "max_replicas": scale.most}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": room.rows}}
    replicas = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=room.requests,
        max_queued_requests=room.waiting,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER},
        graceful_shutdown_timeout_s=max(1.0, drain_seconds),
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=3,
        ray_actor_options=share.ray_options,
        logging_config=quiet,
        **scaling,
    )(serve.ingress()(Replica))
    board = serve.deployment(name="metrics", ray_actor_options={"num_cpus": 0}, logging_config=quiet)(
        MetricsBoard
    )
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": listening.host, "port": listening.port},
            logging_config=quiet,
        )
        try:
            serve.run(replicas.bind(served, board.bind()), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise DeviceError(f"no replica could be started: {failure(error)}") from error
        yield
        drain(serve, drain_seconds)
    finally:
        # All of a cluster of this process's own ends with it anyway.
        if not cluster.ours:
            serve.shutdown()


def refuse_running(cluster: Cluster) -> None:
    """Raise :class:`RequestError` where Ray Serve runs in the cluster: its address and its port are not ours to choose."""
    try:
        cluster.ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise RequestError(
        "Ray Serve runs in that cluster already, at an address of its own: give another --ray-address, or end it there with: serve shutdown"
    )


def failure(error: RuntimeError) -> str:
    """What kept replicas from starting, of all that Ray says of it."""
    from ray import serve

    app = serve.status().applications.get(APP)
    said = [deployment.message for deployment in app.deployments.values()] if app else []
    lines = [line.strip() for text in said for line in text.splitlines()]
    raised = [line for line in lines if line.startswith("linert.runtime.errors.")]
    return raised[-1].partition(": ")[2] if raised else first_line(error)


def drain(serve: Any, seconds: float) -> None:
    """Let replicas finish what they are at; what is new is refused."""
    serve.delete(APP, _blocking=False)
    end = time.monotonic() + seconds + LOOK
    while APP in serve.status().applications and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(FLUSH)


def running(serve: Any) -> int:
    """Replicas that take requests."""
    app = serve.status().applications.get(APP)
    if app is None or DEPLOYMENT not in app.deployments:
        return 0
    states = app.deployments[DEPLOYMENT].replica_states
    return sum(number for state, number in states.items() if str(state).endswith("RUNNING"))


def watch_until(stop: threading.Event, note: Callable[[str], object]) -> None:
    """Wait until ``stop`` is set; tells for people when there are more replicas, or fewer.

    Raises:
        DeviceError: the cluster is gone.
    """
    from ray import serve

    known = running(serve)
    while not stop.wait(LOOK):
        try:
            now = running(serve)
        except Exception as error:
            # Ray has many types for a cluster that does not answer.
            raise DeviceError(f"the Ray cluster does not answer any more: {first_line(error)}") from error
        if now != known:
            known = now
            note(f"replicas that take requests: {now}")
