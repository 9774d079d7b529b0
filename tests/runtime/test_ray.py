"""Runs and servers on a Ray cluster: the files of one machine, whatever dies meanwhile. Two workers of two nodes, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.cluster.session import Machine, Share, shares
from linert.runtime.errors import DeviceError, RequestError
from linert.runtime.files.array_files import read_arrays
from tests.conftest import ROOT, Result
from tests.exporter.test_captions import bundle as captions_bundle
from tests.exporter.test_captions import features, files
from tests.processes import descendants, lives, meanwhile, wait_until
from tests.runtime.test_serve import KEY, SECONDS, Running, serving

pytest.importorskip("ray")
openai = pytest.importorskip("openai")

__all__ = ["captions_bundle", "files"]

Linert = Callable[..., Result]

WORKER = "ray::DrawWorker"
REPLICA = "ray::ServeReplica:linert:images"


@pytest.fixture(scope="module", autouse=True)
def _folder_of_ray() -> Iterator[None]:
    """Ray's logs and sockets lie in a folder of these tests; names of sockets must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", folder)
    patch.delenv("RAY_ADDRESS", raising=False)
    yield
    patch.undo()
    shutil.rmtree(folder, ignore_errors=True)


CLUSTER = """
import sys, time
from linert.runtime.cluster.session import import_ray
import_ray()
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes, each with one CPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        try:
            process.wait(SECONDS)
        finally:
            process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


LONG = ("--classes", "0-4", "--num-images", 160)
BATCHES = 80
"""Of the run ``LONG``: long enough for something to happen meanwhile."""


@pytest.fixture(scope="module")
def long_run(linert: Linert, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one machine makes of it."""
    out = tmp_path_factory.mktemp("long") / "out"
    result = linert("run", tiny_bundle, *LONG, "--out", out)
    assert result.code == 0, result.err
    return contents(out)


def test_files_are_those_of_one_machine(
    cluster: str, windowed_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    """Pictures, maps, tokens and traces, to the last byte; the last batch is not full."""
    asked = ("--classes", "0-4", "--num-images", 9, "--eviction-map", "--window", "auto", "--json")
    made = []
    for name, more in (("one", ()), ("two", ("--ray", "--ray-address", cluster, "--workers", 2))):
        files = [tmp_path / f"{name}-{kind}.npz" for kind in ("trace", "tokens")]
        result = linert(
            *("run", windowed_bundle, *asked, *more, "--out", tmp_path / name),
            *("--record-trace", files[0], "--save-tokens", files[1]),
        )
        assert result.code == 0, result.err
        told = json.loads(result.out)
        made.append((contents(tmp_path / name), [path.read_bytes() for path in files]))
    assert made[0] == made[1]
    assert (told["workers"], told["batches_drawn"], told["batches_lost"]) == (2, 5, 0)
    assert "window of worker 1: " in result.err
    again = linert(
        *("run", windowed_bundle, "--replay-trace", tmp_path / "one-trace.npz", "--out", tmp_path / "again"),
        *("--ray", "--ray-address", cluster, "--workers", 2),
    )
    assert "tokens equal to the trace's: 100.00%" in again.err


def test_workers_draw_captions_that_they_have_not_read(
    cluster: str, captions_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    captions = features(tmp_path / "captions.npy")
    for name, more in (("one", ()), ("two", ("--ray", "--ray-address", cluster, "--workers", 2))):
        result = linert("run", captions_bundle, "--captions", captions, *more, "--out", tmp_path / name)
        assert result.code == 0, result.err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_worker_that_is_killed_loses_nothing_and_draws_nothing_twice(
    cluster: str, tiny_bundle: Path, long_run: dict[str, bytes], linert: Linert, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = []

    def kill(over: threading.Event) -> None:
        wait_until((out / "tokens.npz").exists, over)
        for process in descendants(WORKER)[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    with meanwhile(kill):
        result = linert(
            "run",
            tiny_bundle,
            *LONG,
            "--out",
            out,
            "--json",
            "--ray",
            "--ray-address",
            cluster,
            "--workers",
            2,
        )
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert len(killed) == 1
    assert f"process {killed[0]}" in " ".join(result.err.split())
    assert (told["batches_drawn"], told["batches_lost"]) == (BATCHES, 1)
    assert contents(out) == long_run


def test_a_run_goes_on_where_its_killed_driver_stopped(
    cluster: str, tiny_bundle: Path, long_run: dict[str, bytes], linert: Linert, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("run", tiny_bundle, *LONG, "--out", out, "--ray", "--ray-address", cluster, "--workers", 2)
    command = [sys.executable, "-m", "linert", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as driver:
        wait_until((out / "tokens.npz").exists)
        driver.kill()
    recorded = len(read_arrays(out / "tokens.npz")["tokens"])
    assert 0 < recorded < 2 * BATCHES
    result = linert(*arguments, "--resume", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["batches_drawn"] == BATCHES - recorded // 2
    assert contents(out) == long_run


def test_another_bundle_on_a_worker_is_refused(
    cluster: str, tiny_bundle: Path, many_bundle: Path, tmp_path: Path
) -> None:
    from linert.runtime.cluster.pool import worker_pool
    from linert.runtime.drawing.batches import BatchSettings
    from linert.runtime.drawing.conditioning import open_conditioner

    place = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, place)
    bundle = open_bundle(place)
    settings = BatchSettings(bundle.manifest.sampling, bundle.manifest.cache)
    shutil.rmtree(place)
    for there, words in ((None, "every machine of the cluster reads"), (many_bundle, "another one")):
        if there is not None:
            shutil.copytree(there, place)
        with (
            pytest.raises(Exception, match=words) as raised,
            worker_pool(cluster, 1, bundle, BackendOptions(), settings, open_conditioner(bundle), print),
        ):
            pass
        assert type(raised.value).__name__ == "BundleError"
        assert str(place) in str(raised.value)


def test_workers_that_die_again_and_again_are_given_up(
    cluster: str, tiny_bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    def kill(over: threading.Event) -> None:
        while not over.wait(0.01):
            for process in descendants(WORKER):
                os.kill(process, signal.SIGKILL)

    with meanwhile(kill):
        result = linert(
            *(
                "run",
                tiny_bundle,
                "--classes",
                "1",
                "--out",
                tmp_path / "out",
                "--ray",
                "--ray-address",
                cluster,
            )
        )
    assert result.code == 2
    assert "3 workers died while they opened the bundle" in result.err
    assert not (tmp_path / "out").exists()


@contextmanager
def replicated(*arguments: object) -> Iterator[Running]:
    """A server of two replicas on a cluster of its own."""
    with serving(*arguments, "--ray", "--replicas", 2) as running:
        yield running


def test_replicas_serve_as_one_server(tiny_bundle: Path, linert: Linert, tmp_path: Path) -> None:
    """The official client, plain and streaming; keys; health; metrics of all; one that dies; and an end that waits."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    alone = tmp_path / "alone"
    assert linert("run", tiny_bundle, "--classes", "2", "--seed", 5, "--out", alone).code == 0
    with replicated(tiny_bundle, "--api-key-file", keys, "--drain-seconds", 30) as running:
        client = running.client()
        asked = {"model": "bundle", "prompt": "2", "extra_body": {"seed": 5}}
        answers = [client.images.generate(**asked).data[0].b64_json for _ in range(6)]
        streamed = list(
            client.images.generate(
                model="bundle", prompt="2", stream=True, partial_images=2, extra_body={"seed": 5}
            )
        )
        assert streamed[0].type == "image_generation.partial_image"
        assert streamed[-1].type == "image_generation.completed"
        assert {*answers, streamed[-1].b64_json} == {answers[0]}
        assert (picture_of(answers[0]) == picture_of(next(alone.glob("class_0002*.png")))).all()
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        status, content, _ = running.post(b'{"prompt": "1", "colour": "red"}')
        assert (status, content["error"]["param"]) == (400, "colour")
        assert running.get("/health/ready") == (200, "ready\n")
        assert running.get("/-/healthz")[0] == 200
        # Replicas tell each other every second.
        wait_until(lambda: sum(drawn(running).values()) == 2 + len(answers) + 1)
        assert len(drawn(running)) == 2

        wait_until(lambda: go_away(running) or sum(told(running, "linert_cancelled_total").values()) > 0)
        wait_until(lambda: not sum(told(running, "linert_rows_busy").values()))

        os.kill(descendants(REPLICA)[0], signal.SIGKILL)
        wait_until(lambda: running.get("/health/ready")[0] == 200 and len(descendants(REPLICA)) == 2)
        wait_until(lambda: running.post(b'{"prompt": "1"}')[0] == 200)

        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(running.post(b'{"prompt": "1", "n": 10}')[0]))
            for _ in range(3)
        ]
        before = sum(drawn(running).values())
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(drawn(running).values()) > before)
        below = descendants("", running.process.pid)
        assert len(below) > 2
        running.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert running.process.wait(SECONDS) == 0
        assert statuses == [200] * 3
        wait_until(lambda: not any(map(lives, below)))


def picture_of(png: str | Path) -> np.ndarray:
    import base64
    import io

    import PIL.Image

    data = png.read_bytes() if isinstance(png, Path) else base64.b64decode(png)
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def go_away(running: Running) -> None:
    """Ask for many images, and hang up."""
    host, port = running.url.removeprefix("http://").split(":")
    body = b'{"prompt": "1", "n": 10}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.05)


def told(running: Running, name: str) -> dict[str, float]:
    """What replicas tell of one metric, by replica."""
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(running.get("/metrics")[1])
        for sample in family.samples
        if sample.name == name
    }


def drawn(running: Running) -> dict[str, float]:
    """Images that replicas drew."""
    return told(running, "linert_images_total")


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("run", ("--classes", 1, "--workers", 2), "--workers: only with --ray"),
        ("run", ("--classes", 1, "--ray-address", "auto"), "--ray-address: only with --ray"),
        ("run", ("--classes", 1, "--ray", "--preview"), "--preview shows the one batch"),
        ("run", ("--classes", 1, "--ray", "--ray-address", "here"), "--ray-address here: give the address"),
        ("run", ("--classes", 1, "--ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster could be joined"),
        ("serve", ("--replicas", 2, "--max-replicas", 3), "--replicas, --max-replicas: only with --ray"),
        ("serve", ("--ray", "--replicas", 2, "--max-replicas", 3), "leave --max-replicas out"),
        ("serve", ("--ray", "--min-replicas", 2), "say with --max-replicas"),
        ("serve", ("--ray", "--min-replicas", 3, "--max-replicas", 2), "is more than --max-replicas 2"),
        ("serve", ("--ray", "--ray-address", "127.0.0.1:1", "--port", 0), "--port 0"),
        ("serve", ("--ray", "--window", 3), "window of 3"),
    ],
)
def test_what_cannot_be_is_said_by_name(
    command: str,
    options: tuple[object, ...],
    words: str,
    windowed_bundle: Path,
    linert: Linert,
    tmp_path: Path,
) -> None:
    out = ("--out", tmp_path / "out") if command == "run" else ()
    result = linert(command, windowed_bundle, *options, *out)
    assert result.code == 2
    assert words in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "serve"])
def test_without_ray_it_says_what_to_install(
    command: str, windowed_bundle: Path, linert: Linert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ("--classes", 1, "--out", tmp_path / "out") if command == "run" else ()
    result = linert(command, windowed_bundle, "--ray", *options)
    assert result.code == 2
    assert "pip install 'linert[ray]'" in result.err


def test_workers_share_the_machines() -> None:
    """All that the smallest machine can give each of its workers; or one GPU."""
    two = [Machine(8, 0), Machine(6, 2)]
    assert shares(two, None, BackendOptions()) == (2, Share(6))
    assert shares(two, 4, BackendOptions()) == (4, Share(3))
    assert shares(two, 40, BackendOptions()) == (40, Share(1))
    assert shares(two, 4, BackendOptions(threads=2)) == (4, Share(2))
    assert shares(two, None, BackendOptions(BackendName.CUDA)) == (2, Share(3, 1))
    with pytest.raises(DeviceError, match="no machine of the Ray cluster has a GPU"):
        shares(two[:1], None, BackendOptions(BackendName.CUDA))
    with pytest.raises(RequestError, match="--threads 9"):
        shares(two, None, BackendOptions(threads=9))
