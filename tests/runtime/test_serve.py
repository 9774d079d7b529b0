"""The server, as clients meet it: the official client of OpenAI's API, a reader of Prometheus' text, and signals."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from prometheus_client.parser import text_string_to_metric_families

from linert import Generator
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.eviction_map import MapKind, Residency, draw_map
from linert.runtime.drawing.generator import picture as generator_picture
from linert.runtime.drawing.samples import ClassLabel, Prompt, Sample
from linert.runtime.errors import RequestError
from linert.runtime.serving.api import ApiError
from linert.runtime.serving.models import EngineSettings, Models, check_names, model_name
from tests.conftest import Result, run_linert
from tests.runtime.test_engine import SECONDS, prompts_bundle
from tests.text_models import write_lumina

openai = pytest.importorskip("openai")

__all__ = ["prompts_bundle"]

KEY = "a secret key"


@dataclass
class Running:
    """A server's process, and where it listens."""

    process: subprocess.Popen[str]
    url: str

    def client(self, key: str = KEY) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, body: bytes, key: str = KEY) -> tuple[int, dict[str, Any], dict[str, str]]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.url}/v1/images/generations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), dict(error.headers)

    def until_ready(self) -> float:
        begun = time.monotonic()
        while self.get("/health/ready")[0] != 200:
            assert time.monotonic() - begun < SECONDS
            time.sleep(0.02)
        return time.monotonic() - begun

    def metrics(self) -> dict[str, float]:
        """Samples by name, summed over models."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found


@contextmanager
def serving(*arguments: object) -> Iterator[Running]:
    command = [sys.executable, "-m", "linert", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert process.stderr is not None
    try:
        found = None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        assert found, "".join(lines)
        log = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        log.start()
        running = Running(process, found.group())
        running.log = lines  # type: ignore[attr-defined]
        yield running
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(
    windowed_bundle: Path,
    prompts_bundle: Path,
    grouped_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    keys = folder / "keys"
    keys.write_text(f"another\n{KEY}\n")
    (folder / "classes").symlink_to(windowed_bundle)
    bundles = []
    for name, bundle in (("classes", windowed_bundle), ("words", prompts_bundle), ("groups", grouped_bundle)):
        copied = folder / "bundles" / name
        copied.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", bundle, copied], check=True)
        bundles.append(copied)
    with serving(
        *bundles, "--api-key-file", keys, "--queue", 6, "--most-images", 4, "--most-bytes", 4000
    ) as running:
        running.until_ready()
        yield running


def picture(b64: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(b64))))


def test_images_are_those_that_run_draws(server: Running, windowed_bundle: Path) -> None:
    answer = server.client().images.generate(
        model="classes", prompt="2", n=3, extra_body={"seed": 5, "guidance": 2.0, "top_k": 7}
    )
    with Generator(windowed_bundle) as generator:
        import msgspec

        sampling = msgspec.structs.replace(generator.manifest.sampling, guidance=2.0, top_k=7)
        wanted = generator.generate([ClassLabel(2)], num_images=3, seed=5, sampling=sampling)
    assert [
        (picture(image.b64_json) == np.asarray(w.picture())).all()
        for image, w in zip(answer.data, wanted, strict=True)
    ] == [True] * 3
    tokens = 3 * generator.manifest.raster.image_tokens
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert answer.size == generator.manifest.size


def test_prompts_are_read(server: Running, prompts_bundle: Path) -> None:
    answer = server.client().images.generate(
        model="words",
        prompt="a bowl of oranges",
        output_format="webp",
        output_compression=80,
        response_format="b64_json",
        extra_body={"seed": 3, "negative_prompt": "a table"},
    )
    assert base64.b64decode(answer.data[0].b64_json)[8:12] == b"WEBP"
    assert answer.usage.input_tokens > 4
    again = server.client().images.generate(model="words", prompt="a bowl of oranges", extra_body={"seed": 3})
    with Generator(prompts_bundle) as generator:
        [wanted] = generator.generate(["a bowl of oranges"], seed=3)
    assert (picture(again.data[0].b64_json) == np.asarray(wanted.picture())).all()


def test_streamed_pictures_grow_line_by_line(server: Running) -> None:
    events = list(
        server.client().images.generate(
            model="classes", prompt="1", stream=True, partial_images=2, extra_body={"seed": 9}
        )
    )
    assert events[-1].type == "image_generation.completed"
    whole = picture(events[-1].b64_json)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert partial
    for event in partial:
        shown = picture(event.b64_json)
        rows = whole.shape[0] * event.parts // 6
        assert (shown[rows:] == 128).all()
    assert events[-1].usage.output_tokens == 36


def test_groups_are_drawn_in_as_many_steps_as_are_asked_for(server: Running, grouped_bundle: Path) -> None:
    with Generator(grouped_bundle) as generator:
        import msgspec

        for steps in (0, 5, 3):
            answer = server.client().images.generate(
                model="groups", prompt="1", n=2, extra_body={"seed": 5, "steps": steps}
            )
            sampling = msgspec.structs.replace(generator.manifest.sampling, steps=steps)
            wanted = generator.generate([ClassLabel(1)], num_images=2, seed=5, sampling=sampling)
            for image, drawn in zip(answer.data, wanted, strict=True):
                assert (picture(image.b64_json) == np.asarray(drawn.picture())).all()


def test_what_the_cache_kept_is_told(server: Running, windowed_bundle: Path) -> None:
    """The map is the one that run draws."""
    status, content, _ = server.post(
        b'{"model": "classes", "class_id": 1, "seed": 3, "n": 2, "eviction_map": true}'
    )
    assert status == 200
    with Generator(windowed_bundle) as generator:
        samples = [Sample(ClassLabel(1), seed) for seed in (3, 4)]
        residency = Residency(generator.manifest)
        tokens = generator.draw(samples, watcher=residency)
        for number, image in enumerate(content["data"]):
            drawn = generator_picture(generator.decoder(tokens[number : number + 1])[0])
            wanted = draw_map(drawn, residency.image(number), generator.manifest, MapKind.AVERAGED)
            assert (picture(image["eviction_map_b64_json"]) == np.asarray(wanted)).all()


def test_models_are_listed(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["classes", "words", "groups"]
    assert client.models.retrieve("words").id == "words"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


BAD = {
    "no JSON": (b"{", 400, None),
    "an unknown field": (b'{"prompt": "1", "colour": "red"}', 400, "colour"),
    "a wrong type": (b'{"prompt": 1}', 400, "prompt"),
    "no prompt": (b'{"model": "words"}', 400, "prompt"),
    "no class": (b'{"model": "classes", "prompt": "a fox"}', 400, "class_id"),
    "a class that is none": (b'{"model": "classes", "class_id": 99}', 400, "class_id"),
    "a class of words": (b'{"model": "words", "prompt": "a", "class_id": 1}', 400, "class_id"),
    "no such model": (b'{"model": "x", "prompt": "a"}', 404, "model"),
    "no such size": (b'{"prompt": "1", "size": "1x1"}', 400, "size"),
    "too many": (b'{"prompt": "1", "n": 5}', 400, "n"),
    "none": (b'{"prompt": "1", "n": 0}', 400, "n"),
    "a URL": (b'{"prompt": "1", "response_format": "url"}', 400, "response_format"),
    "many streamed": (b'{"prompt": "1", "n": 2, "stream": true}', 400, "n"),
    "a negative guidance": (b'{"prompt": "1", "guidance": -1}', 400, "guidance"),
    "steps of a raster": (b'{"prompt": "1", "steps": 4}', 400, "steps"),
    "steps that no image has": (b'{"model": "groups", "prompt": "1", "steps": 4}', 400, "steps"),
    "a number that is none": (b'{"prompt": "1", "temperature": 1e999}', 400, "temperature"),
    "a long prompt": (json.dumps({"model": "words", "prompt": "a " * 500}).encode(), 400, "prompt"),
    "a long body": (json.dumps({"prompt": "a" * 5000}).encode(), 413, None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_by_name(server: Running, name: str) -> None:
    body, status, param = BAD[name]
    got, content, _ = server.post(body)
    assert (got, content["error"]["param"]) == (status, param), content
    assert content["error"]["type"] == "invalid_request_error"
    assert content["error"]["message"]


def test_keys_are_needed(server: Running) -> None:
    for key in ("wrong", "", KEY + "x"):
        status, content, _ = server.post(b'{"prompt": "1"}', key)
        assert (status, content["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert server.get("/nothing")[0] == 404
    assert server.get("/health/live")[0] == 200


def test_a_full_queue_is_told_with_when_to_come_back(server: Running) -> None:
    answers: list[tuple[int, dict[str, Any], dict[str, str]]] = []

    def ask() -> None:
        answers.append(server.post(b'{"model": "classes", "prompt": "1", "n": 4}'))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}, answers
    for status, content, headers in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert content["error"]["code"] == "rate_limit_exceeded"
        else:
            assert len(content["data"]) == 4


def test_metrics_are_what_prometheus_reads(server: Running) -> None:
    before = server.metrics()
    server.client().images.generate(model="classes", prompt="1", n=2)
    after = server.metrics()
    assert after["linert_images_total"] - before["linert_images_total"] == 2
    assert after["linert_tokens_total"] - before["linert_tokens_total"] == 72
    for name in ("waiting", "first_line", "image"):
        assert after[f"linert_{name}_seconds_count"] - before[f"linert_{name}_seconds_count"] == 2
    assert after["linert_rows"] == 2 + 3 + 3
    assert after["linert_state_bytes"] > 0
    assert after["linert_rows_busy"] == after["linert_queued"] == 0


def test_a_model_is_called_as_its_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "fox").symlink_to("bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    names = [model_name(Path(path)) for path in ("../fox", "..", ".", "../bundle/")]
    assert names == ["fox", tmp_path.name, "bundle", "bundle"]
    with pytest.raises(RequestError, match="two bundles are called bundle"):
        check_names([Path("."), Path("../bundle")])


def test_every_size_of_a_bundle_has_an_engine(tmp_path: Path) -> None:
    checkpoint, vqgan = write_lumina(tmp_path / "lumina")
    bundle = tmp_path / "sizes"
    options = ("--size", "128x256,64x256", "--budget-lines", "1/4", "--batch", 2, "--prompt-tokens", 64)
    result = run_linert("export", checkpoint, "--vq", vqgan, *options, "--out", bundle)
    assert result.code == 0, result.err
    settings = EngineSettings(BackendOptions(threads=1), CacheRequest(), window=1, waiting=8)
    with contextlib.closing(Models([bundle], settings)) as models:
        model = models.by_name["sizes"]
        assert list(model.engines) == ["128x256", "64x256"]
        asked = [(size, Sample(Prompt("a red fox"), seed)) for seed in (3, 4) for size in model.engines]
        handles = [model.engine(size)[1].submit(sample) for size, sample in asked]
        drawn = [handle.result(SECONDS) for handle in handles]
        with pytest.raises(ApiError, match="draws 128x256, 64x256, not 1x1"):
            model.engine("1x1")
    for (size, sample), image in zip(asked, drawn, strict=True):
        with Generator(open_bundle(bundle, size)) as generator:
            assert (generator.draw([sample])[0] == image.tokens).all()
        width, height = map(int, size.split("x"))
        assert image.pixels.shape == (3, height, width)


def test_who_goes_away_frees_the_rows(server: Running) -> None:
    before = server.metrics()["linert_cancelled_total"]
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"model": "classes", "prompt": "1", "n": 4}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(4):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.005)
    end = time.monotonic() + SECONDS
    while (now := server.metrics())["linert_rows_busy"] + now["linert_queued"] > 0:
        assert time.monotonic() < end
    assert now["linert_cancelled_total"] > before
    assert server.client().images.generate(model="classes", prompt="1").data


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    status, text = server.get("/")
    assert status == 200
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)


def test_a_signal_finishes_what_is_running(windowed_bundle: Path) -> None:
    with serving(windowed_bundle, "--drain-seconds", 30) as running:
        running.until_ready()
        answers: list[int] = []
        body = b'{"prompt": "1", "n": 10}'
        threads = [threading.Thread(target=lambda: answers.append(running.post(body)[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        while running.metrics()["linert_rows_busy"] == 0:
            pass
        running.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert running.process.wait(30) == 0
        assert answers == [200] * 3


def test_what_cannot_be_served_is_said(
    linert: Callable[..., Result], windowed_bundle: Path, tmp_path: Path
) -> None:
    for arguments, words in (
        ((windowed_bundle, windowed_bundle), "two bundles are called"),
        ((tmp_path / "none",), "none"),
        ((windowed_bundle, "--window", 3), "window of 3"),
        ((windowed_bundle, "--api-key-file", tmp_path / "no"), "cannot be read"),
        ((windowed_bundle, "--policy", "rkv"), "rkv"),
    ):
        result = linert("serve", *arguments)
        assert result.code != 0
        assert words in result.err
