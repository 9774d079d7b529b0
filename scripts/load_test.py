#!/usr/bin/env python3
"""Load a running `linert serve` as clients would, and say what they got.

    linert serve bundle --port 8000 --queue 256 &
    python scripts/load_test.py http://127.0.0.1:8000 --bundle bundle --out load

First as many requests are kept open as keep every row busy: how many images a second that gives is the capacity. Then requests come
at random (Poisson) at shares of it. Some are cancelled, some connections are dropped, some requests are bad. With --bundle every
image is compared with the one that the bundle draws by itself.

With --whole-batches the same requests at the same times are drawn here too, without a server, by whole batches of the bundle: what waits
when a batch is done makes the next one. That is what is to be beaten.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
import PIL.Image
from rich.console import Console
from rich.table import Table

from linert import Generator
from linert.runtime.backends.options import BackendOptions
from linert.runtime.drawing.generator import picture
from linert.runtime.drawing.samples import ClassLabel, Condition, Prompt, Sample

SECONDS = 600


@dataclass(frozen=True)
class Asked:
    """A request: ``label`` of a class or a prompt, a seed, and what the client does: wait, cancel, drop or ask badly. ``partial``: images
    that it wants to see before the whole."""

    label: str
    seed: int
    conduct: str
    patience: float
    partial: int = 0


@dataclass
class Got:
    """What came of a request: its HTTP status, 0 where the client went away; seconds to the first line and to the image."""

    asked: Asked
    status: int
    first_line: float | None = None
    whole: float | None = None
    digest: str = ""


@dataclass
class Phase:
    """Requests at one rate. ``share``: of the capacity; 0 keeps all rows busy instead."""

    share: float
    seconds: float
    images: int
    statuses: dict[int, int]
    first_line: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory_mb: float | None = None
    descriptors: int | None = None

    @property
    def rate(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Client:
    """Talks to the server."""

    host: str
    port: int
    model: str | None
    classes: bool

    def ask(self, asked: Asked) -> Got:
        """Send one request as a stream, and read what comes of it."""
        body: dict[str, Any] = {
            "stream": True,
            "partial_images": asked.partial,
            "seed": asked.seed,
            "model": self.model,
        }
        body["class_id" if self.classes else "prompt"] = int(asked.label) if self.classes else asked.label
        if asked.conduct == "bad":
            body["nonsense"] = True
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        begun = time.monotonic()
        got = Got(asked, 0)
        try:
            connection.request(
                "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
            )
            going_away = asked.conduct in ("cancel", "drop")
            if going_away and connection.sock is not None:
                connection.sock.settimeout(asked.patience)
            answer = connection.getresponse()
            if answer.status != 200:
                answer.read()
                got.status = answer.status
                return got
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                data = json.loads(line[6:])
                if data["type"] == "image_generation.partial_image":
                    got.first_line = got.first_line or time.monotonic() - begun
                elif data["type"] == "image_generation.completed":
                    got.whole, got.status = time.monotonic() - begun, 200
                    got.digest = digest(PIL.Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))
                else:
                    got.status = 500
        except (TimeoutError, ConnectionError, http.client.HTTPException):
            pass
        finally:
            if asked.conduct == "drop" and connection.sock is not None:
                # Closed without a word: what the other side sends then is reset.
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        return got


class WholeBatches:
    """Draws what is asked for by whole batches, in a thread of its own: the simplest server, as :class:`Client` sees one.

    What goes away before its batch has begun is not drawn.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        self.generator = Generator(bundle, BackendOptions(threads=threads))
        self._waiting: list[tuple[Asked, Future[str]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def ask(self, asked: Asked) -> Got:
        """Wait for one image."""
        if asked.conduct == "bad":
            return Got(asked, 400)
        begun, done = time.monotonic(), Future[str]()
        with self._changed:
            self._waiting.append((asked, done))
            self._changed.notify()
        try:
            drawn = done.result(asked.patience if asked.conduct in ("cancel", "drop") else SECONDS)
        except TimeoutError:
            done.cancel()
            return Got(asked, 0)
        return Got(asked, 200, None, time.monotonic() - begun, drawn)

    def close(self) -> None:
        """Draw no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.generator.close()

    def _work(self) -> None:
        size = self.generator.manifest.images
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                taken, self._waiting = self._waiting[:size], self._waiting[size:]
            batch = [(asked, done) for asked, done in taken if done.set_running_or_notify_cancel()]
            if not batch:
                continue
            tokens = self.generator.draw([Sample(condition(asked.label), asked.seed) for asked, _ in batch])
            for (_, done), row in zip(batch, tokens, strict=True):
                drawn = picture(self.generator.decoder(row[None])[0])
                # A server would send it encoded.
                drawn.save(io.BytesIO(), format="PNG")
                done.set_result(digest(drawn))


def condition(label: str) -> Condition:
    """A class's number, or a prompt."""
    return ClassLabel(int(label)) if label.isdigit() else Prompt(label)


def digest(image: PIL.Image.Image) -> str:
    """Of an image's pixels."""
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


@click.command(help=__doc__)
@click.argument("url")
@click.option("--model", help="Default: the server's first.")
@click.option(
    "--shares", default="0.5,0.8", show_default=True, help="Of the capacity, at which requests come."
)
@click.option("--requests", default=200, show_default=True, help="Of each phase.")
@click.option("--cancelled", default=0.1, show_default=True, help="Share of clients that cancel.")
@click.option("--dropped", default=0.05, show_default=True, help="Share of connections that are dropped.")
@click.option("--bad", default=0.01, show_default=True, help="Share of requests that are bad.")
@click.option("--watching", default=0.1, show_default=True, help="Share of clients that see every line.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="What is served, to compare every image with."
)
@click.option("--pid", type=int, help="The server's process, to watch its memory and file descriptors.")
@click.option(
    "--whole-batches", is_flag=True, help="Also draw by whole batches of --bundle, to compare with."
)
@click.option("--threads", default=0, help="Of that. Default: one a core.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for load.json.")
def main(
    url: str,
    model: str | None,
    shares: str,
    requests: int,
    cancelled: float,
    dropped: float,
    bad: float,
    watching: float,
    bundle: Path | None,
    pid: int | None,
    whole_batches: bool,
    threads: int,
    seed: int,
    out: Path,
) -> None:
    if whole_batches and bundle is None:
        raise click.UsageError("--whole-batches draws from --bundle: give it too")
    place = urlsplit(url)
    assert place.hostname
    chance = random.Random(seed)
    described, rows = about(place.hostname, place.port or 80, model)
    labels = (
        [str(number) for number in range(min(10, described["classes"]))]
        if described["classes"]
        else ["a red apple", "a fox", "a rocket", "an old house"]
    )
    client = Client(place.hostname, place.port or 80, described["id"], bool(described["classes"]))
    shown, phases, every = Console(), [], []

    def made(count: int, away: float) -> list[Asked]:
        conducts = ("wait", "cancel", "drop", "bad")
        weights = (1 - cancelled - dropped - bad, cancelled, dropped, bad) if away else (1, 0, 0, 0)
        return [
            Asked(
                chance.choice(labels),
                chance.randrange(1000),
                chance.choices(conducts, weights)[0],
                chance.uniform(0.001, max(away, 0.002)),
                described["parts"] - 1 if away and chance.random() < watching else 0,
            )
            for _ in range(count)
        ]

    # Every row busy.
    got, seconds = closed(client, made(requests, 0), 2 * rows)
    phases.append(phase(0, got, seconds, pid))
    every += got
    capacity = phases[0].rate
    alone, _ = closed(client, made(5, 0), 1)
    lone = float(np.median([g.whole for g in alone if g.whole]))
    every += alone
    whole = WholeBatches(bundle, threads) if bundle and whole_batches else None
    beside: list[Phase] = []
    for number, share in enumerate(map(float, shares.split(","))):
        asked = made(requests, 2 * lone)
        got, seconds = at_random(client, asked, share * capacity, random.Random(seed + number))
        phases.append(phase(share, got, seconds, pid))
        every += got
        if whole is not None:
            got, seconds = at_random(whole, asked, share * capacity, random.Random(seed + number))
            beside.append(phase(share, got, seconds, None))
            every += got
    if whole is not None:
        whole.close()
    wrong = compare(bundle, every) if bundle else None
    lost = sum(g.status == 0 and g.asked.conduct in ("wait", "bad") for g in every)
    table = Table(title=f"{described['id']}: {rows} rows; a lone image takes {lone:.3f} s")
    for column in (
        "load",
        "images/s",
        "first line p50",
        "image p50",
        "p95",
        "p99",
        "statuses",
        "MB",
        "files",
    ):
        table.add_column(column)
    for name, p in [("", p) for p in phases] + [(", whole batches", p) for p in beside]:
        table.add_row(
            (f"{p.share:.0%}" if p.share else "all rows busy") + name,
            f"{p.rate:.2f}",
            *(
                f"{value:.3f}"
                for value in (percentile(p.first_line, 50), *(percentile(p.whole, q) for q in (50, 95, 99)))
            ),
            ", ".join(f"{status}: {count}" for status, count in sorted(p.statuses.items())),
            "" if p.memory_mb is None else f"{p.memory_mb:.0f}",
            "" if p.descriptors is None else str(p.descriptors),
        )
    shown.print(table)
    shown.print(
        f"lost: {lost}; images that are not the bundle's: {'not compared' if wrong is None else wrong}"
    )
    out.mkdir(parents=True, exist_ok=True)
    told = {
        "rows": rows,
        "lone_seconds": lone,
        "lost": lost,
        "wrong": wrong,
        "phases": [{**asdict(p), "images_per_second": p.rate} for p in phases],
        "whole_batches": [{**asdict(p), "images_per_second": p.rate} for p in beside],
    }
    (out / "load.json").write_text(json.dumps(told, indent=1))


def about(host: str, port: int, model: str | None) -> tuple[dict[str, Any], int]:
    """The model as the server lists it, and the rows of its batch."""

    def get(path: str) -> bytes:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        connection.request("GET", path)
        return connection.getresponse().read()

    listed = json.loads(get("/v1/models"))["data"]
    described = next(entry for entry in listed if model in (None, entry["id"]))
    named = f'linert_rows{{model="{described["id"]}"'
    row = next(line for line in get("/metrics").decode().splitlines() if line.startswith(named))
    return described, int(float(row.split()[-1]))


def closed(
    client: Client | WholeBatches, asked: Sequence[Asked], open_at_once: int
) -> tuple[list[Got], float]:
    """So many requests are open at every moment."""
    begun = time.monotonic()
    with ThreadPoolExecutor(open_at_once) as pool:
        got = list(pool.map(client.ask, asked))
    return got, time.monotonic() - begun


def at_random(
    client: Client | WholeBatches, asked: Sequence[Asked], rate: float, chance: random.Random
) -> tuple[list[Got], float]:
    """Requests come at random, on average so many a second."""
    got: list[Got] = []
    lock, threads = threading.Lock(), []

    def one(request: Asked) -> None:
        result = client.ask(request)
        with lock:
            got.append(result)

    begun = due = time.monotonic()
    for request in asked:
        due += chance.expovariate(rate)
        time.sleep(max(0.0, due - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(request,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return got, time.monotonic() - begun


def phase(share: float, got: Sequence[Got], seconds: float, pid: int | None) -> Phase:
    waited = [g for g in got if g.status == 200]
    memory = files = None
    if pid:
        status = Path(f"/proc/{pid}/status").read_text()
        memory = next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmRSS"))
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Phase(
        share,
        seconds,
        len(waited),
        dict(Counter(g.status for g in got)),
        [g.first_line for g in waited if g.first_line is not None],
        [g.whole for g in waited if g.whole is not None],
        memory,
        files,
    )


def percentile(values: Sequence[float], which: float) -> float:
    return float(np.percentile(values, which)) if values else float("nan")


def compare(bundle: Path, every: Sequence[Got]) -> int:
    """How many images are not those that the bundle draws by itself."""
    wanted = list(dict.fromkeys((g.asked.label, g.asked.seed) for g in every if g.digest))

    with Generator(bundle) as generator:
        samples = [Sample(condition(label), seed) for label, seed in wanted]
        drawn = [
            digest(picture(pixels))
            for group in generator.batches(samples)
            for pixels in generator.decoder(generator.draw(group))
        ]
    digests = dict(zip(wanted, drawn, strict=True))
    return sum(g.digest != digests[g.asked.label, g.asked.seed] for g in every if g.digest)


if __name__ == "__main__":
    main()
