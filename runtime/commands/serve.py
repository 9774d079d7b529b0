"""``linert serve``: images over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import uvicorn
from rich.console import Console

from linert.runtime.backends.options import BackendOptions
from linert.runtime.commands.backend_options import backend_options
from linert.runtime.commands.ray_options import ReplicasRequest, replicas_options
from linert.runtime.commands.settings_options import cache_options
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.errors import RequestError
from linert.runtime.serving.app import LOG_FORMAT, Limits, Server, key_digest
from linert.runtime.serving.engine import WAITING
from linert.runtime.serving.models import EngineSettings, Models

LOOPBACK = "127.0.0.1"


class SignalledServer(uvicorn.Server):
    """A server that SIGTERM and SIGINT stop: what is running is finished, and the process ends well.

    ``server``: the app's, which refuses what is new from then on. ``listening``: called once clients can connect.
    ``stopped``: when it was told to stop, or was made, by the monotonic clock.
    """

    def __init__(self, config: uvicorn.Config, server: Server, listening: Callable[[], object]) -> None:
        super().__init__(config)
        self.server, self.listening = server, listening
        self.stopped = time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        # A second signal does not wait.
        self.force_exit = self.should_exit
        self.stopped = time.monotonic()
        self.should_exit = self.server.draining = True


@click.command()
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Keys that clients may have, one a line. Default: none is needed.",
)
@click.option(
    "--window",
    default=1,
    show_default=True,
    help="Positions of every image that a decode step takes, of those that the bundles have.",
)
@click.option(
    "--queue",
    default=WAITING,
    show_default=True,
    type=click.IntRange(1),
    help="Images of each bundle that may wait for a row.",
)
@click.option(
    "--most-images", default=10, show_default=True, type=click.IntRange(1), help="Images of a request."
)
@click.option(
    "--most-bytes",
    default=1 << 16,
    show_default=True,
    type=click.IntRange(1),
    help="Bytes of a request's body.",
)
@click.option(
    "--most-seconds",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="That a request may take.",
)
@click.option(
    "--drain-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="To finish what is running, once the server is told to stop.",
)
@click.option("--log-prompts", is_flag=True, help="Log what is asked for.")
@cache_options()
@backend_options()
@replicas_options()
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    window: int,
    queue: int,
    most_images: int,
    most_bytes: int,
    most_seconds: float,
    drain_seconds: float,
    log_prompts: bool,
    cache: CacheRequest,
    options: BackendOptions,
    ray: ReplicasRequest,
) -> None:
    """Serve images of BUNDLEs over HTTP, as OpenAI's clients ask for them, and a page to look at.

    An image begins as soon as a row of the batch is free, and is the one that linert run draws with its seed. The cache options hold for
    all images.
    """
    ray.check()
    keys = tuple(key_digest(key) for key in read_keys(api_key_file))
    settings = EngineSettings(options, cache, window, queue)
    limits = Limits(most_images, most_bytes, most_seconds, log_prompts)
    console = Console(stderr=True, highlight=False)
    note = partial(console.print, soft_wrap=True)
    if ray.wanted:
        from linert.runtime.cluster.scale import Listening
        from linert.runtime.commands.serve_ray import serve_on_ray

        serve_on_ray(list(bundles), settings, limits, keys, Listening(host, port), ray, drain_seconds, note)
    else:
        serve_here(bundles, settings, limits, keys, host, port, drain_seconds, note)


def serve_here(
    bundles: Sequence[Path],
    settings: EngineSettings,
    limits: Limits,
    keys: Sequence[bytes],
    host: str,
    port: int,
    drain_seconds: float,
    note: Callable[[str], object],
) -> None:
    """Serve from this process until a signal says to stop."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
    models = Models(bundles, settings)
    try:
        server = Server(models, limits, keys)
        config = uvicorn.Config(
            server.app(),
            host=host,
            port=port,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
        )
        with contextlib.closing(config.bind_socket()) as bound:
            address, number = bound.getsockname()[:2]
            named = f"[{address}]" if ":" in address else address
            told = f"{', '.join(models.by_name)}: http://{named}:{number}"
            signalled = SignalledServer(config, server, lambda: note(told))
            asyncio.run(signalled.serve([bound]))
        if not models.drain(max(0.0, signalled.stopped + drain_seconds - time.monotonic())):
            note(f"not all images were finished within {drain_seconds:g} s")
    finally:
        models.close()


def read_keys(path: Path | None) -> list[str]:
    """The keys in a file, one a line.

    Raises:
        RequestError: there is no such file, or no key in it.
    """
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    if not keys:
        raise RequestError(f"{path} holds no key")
    return keys
