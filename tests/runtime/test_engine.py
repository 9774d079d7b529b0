"""The engine: whatever joins and leaves beside it, an image is the one that a batch of its own draws."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from linert import Generator
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.sampling_settings import GuidanceSchedule, SamplingSettings
from linert.runtime.drawing.generator import make_batch
from linert.runtime.drawing.loop import begin
from linert.runtime.drawing.samples import ClassLabel, Condition, Prompt, Sample
from linert.runtime.errors import BundleError, DeviceError, RequestError
from linert.runtime.serving.engine import Engine, EngineClosedError, QueueFullError
from linert.runtime.serving.handle import (
    Admitted,
    Cancelled,
    CancelledError,
    Done,
    Failed,
    Handle,
    PartDrawn,
)
from tests.conftest import run_linert
from tests.text_models import write_tiny_janus

SECONDS = 60
"""Longer than any of it takes."""


def settings(chance: random.Random, usual: SamplingSettings) -> SamplingSettings:
    """Any that a request may have."""
    return msgspec.structs.replace(
        usual,
        guidance=chance.choice([1.0, 2.0, 3.5]),
        guidance_interval=chance.choice([-1, 4]),
        temperature=chance.choice([0.7, 1.0]),
        top_k=chance.choice([0, 0, 5]),
        top_p=chance.choice([1.0, 1.0, 0.8]),
        greedy=chance.random() < 0.1,
    )


def in_groups(chance: random.Random, sampling: SamplingSettings) -> SamplingSettings:
    """The same, with any that a request of images in groups may have beyond."""
    return msgspec.structs.replace(
        sampling, steps=chance.choice([0, 3]), guidance_schedule=chance.choice(list(GuidanceSchedule))
    )


@pytest.fixture(scope="module")
def engine(windowed_bundle: Path) -> Iterator[Engine]:
    with Engine(open_bundle(windowed_bundle), waiting=1000) as engine:
        assert engine.wait_until_ready(SECONDS)
        yield engine


def finished(handles: list[Handle]) -> None:
    for handle in handles:
        assert list(handle)[-1]


def drawn_alone(bundle: Path, asked: list[tuple[Sample, SamplingSettings]]) -> list[np.ndarray]:
    with Generator(bundle) as generator:
        return [generator.draw([sample], sampling)[0] for sample, sampling in asked]


@pytest.fixture(scope="module")
def prompts_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    checkpoint = write_tiny_janus(folder / "janus", {"vision_config": {"image_size": 16}})
    out = folder / "bundle"
    options = ("--batch", 3, "--budget-lines", 2, "--recent-lines", 0, "--anchor-tokens", 1)
    result = run_linert("export", checkpoint, *options, "--prompt-tokens", 24, "--out", out)
    assert result.code == 0, result.err
    return out


def conditions_of(bundle: Path) -> list[Condition]:
    if "prompts" in str(bundle):
        return [Prompt("a"), Prompt("a bowl of oranges"), Prompt("a table", "oranges"), Prompt("on a table")]
    return [ClassLabel(0), ClassLabel(1), ClassLabel(2)]


@pytest.mark.parametrize("kind", ["classes", "windows of classes", "prompts", "groups"])
@pytest.mark.parametrize("seed", [0, 1])
def test_company_and_moment_of_arrival_change_nothing(
    kind: str, seed: int, windowed_bundle: Path, prompts_bundle: Path, grouped_bundle: Path
) -> None:
    bundle = {"prompts": prompts_bundle, "groups": grouped_bundle}.get(kind, windowed_bundle)
    chance = random.Random(seed)
    window = 4 if kind.startswith("windows") else 1
    with Engine(open_bundle(bundle), window=window) as engine:
        asked = [
            (
                Sample(chance.choice(conditions_of(bundle)), chance.randrange(9)),
                settings(chance, engine.manifest.sampling),
            )
            for _ in range(24)
        ]
        if engine.manifest.groups is not None:
            asked = [(sample, in_groups(chance, sampling)) for sample, sampling in asked]
        wanted = drawn_alone(bundle, asked)
        handles, cancelled = [], []
        for sample, sampling in asked:
            handles.append(engine.submit(sample, sampling, parts=chance.random() < 0.5))
            if chance.random() < 0.25:
                cancelled.append(engine.submit(sample, sampling))
            if cancelled and chance.random() < 0.5:
                cancelled[-1].cancel()
            time.sleep(chance.choice([0, 0.001, 0.01]))
        for handle in cancelled:
            handle.cancel()
        for handle, tokens in zip(handles, wanted, strict=True):
            assert (handle.result(SECONDS).tokens == tokens).all()
        finished(cancelled)
        counts = engine.counts
        assert counts.submitted == counts.done + counts.cancelled == len(handles) + len(cancelled)
        assert engine.busy == engine.queued == 0
        if kind == "classes":
            # All reach the ends of their lines at once.
            assert counts.line_ends <= counts.steps / engine.manifest.raster.line_width + 1


def test_events_tell_what_happens_in_order(engine: Engine) -> None:
    sample, raster = Sample(ClassLabel(1), 4), engine.manifest.raster
    handle = engine.submit(sample, parts=True)
    events = list(handle)
    assert [type(event) for event in events] == [Admitted, *[PartDrawn] * raster.lines, Done]
    image = handle.result(0)
    for number, event in enumerate(events[1:-1], 1):
        assert isinstance(event, PartDrawn)
        assert event.parts == number
        whole = number * raster.line_width
        assert (event.tokens[:whole] == image.tokens[:whole]).all()
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)

    async def again() -> list[type]:
        other = engine.submit(sample)
        return [type(event) async for event in other]

    assert asyncio.run(again()) == [Admitted, Done]


def test_groups_are_told_as_they_are_drawn(grouped_bundle: Path) -> None:
    with Engine(open_bundle(grouped_bundle)) as engine:
        handle = engine.submit(Sample(ClassLabel(1), 4), parts=True)
        handle.result(SECONDS)
        parts = [event for event in handle if isinstance(event, PartDrawn)]
        assert [event.parts for event in parts] == [1, 2, 3, 4, 5]
        assert [int(event.drawn.sum()) for event in parts] == [1, 3, 7, 12, 16]
        tokens = handle.result(0).tokens
        assert all((event.tokens[event.drawn] == tokens[event.drawn]).all() for event in parts)


def test_admission_leaves_other_rows_bit_identical(windowed_bundle: Path) -> None:
    bundle = open_bundle(windowed_bundle)
    manifest = bundle.manifest
    stages = [name for name in manifest.stages if name != "vq_decoder"]
    with Generator(bundle) as generator, OrtBackend(bundle, stages) as backend:
        samples = [Sample(ClassLabel(number % 3), number) for number in range(manifest.images)]
        batch = make_batch(manifest, generator.conditioner, samples, manifest.sampling, manifest.cache)
        begin(backend, batch)
        for _ in range(4):
            backend.run("decode")
        names = [spec.name for spec in manifest.state]
        before = {name: backend.read(name) for name in names}
        admitted = np.zeros(manifest.images, np.int64)
        admitted[0] = 1
        backend.write("admitted", admitted)
        backend.run("admit")
        for spec in manifest.state:
            axis = next(n for n, name in enumerate(spec.axes) if name in ("image", "sequence", "row"))
            branches = 1 if spec.axes[axis] == "image" else manifest.branches
            mine = np.zeros(spec.shape[axis], bool)
            mine.reshape(branches, manifest.images, -1)[:, 0] = True
            now, then = (
                np.moveaxis(values, axis, 0) for values in (backend.read(spec.name), before[spec.name])
            )
            assert (now[~mine] == then[~mine]).all(), spec.name
            if spec.kind in ("position", "slot_pos", "tokens"):
                assert (now[mine] != then[mine]).any(), spec.name


def test_what_does_not_fit_is_refused(windowed_bundle: Path, engine: Engine) -> None:
    with pytest.raises(RequestError, match="class 99 out of range"):
        engine.submit(Sample(ClassLabel(99), 0))
    with pytest.raises(RequestError, match="guidance"):
        engine.submit(
            Sample(ClassLabel(0), 0), msgspec.structs.replace(engine.manifest.sampling, guidance=-1.0)
        )
    with Engine(open_bundle(windowed_bundle), waiting=2) as small:
        handles: list[Handle] = []
        with pytest.raises(QueueFullError, match="2 images are waiting"):
            handles.extend(small.submit(Sample(ClassLabel(0), number)) for number in range(100))
        assert small.counts.refused == 1
        for handle in handles:
            handle.result(SECONDS)


def test_draining_finishes_what_there_is(windowed_bundle: Path) -> None:
    with Engine(open_bundle(windowed_bundle)) as engine:
        handles = [engine.submit(Sample(ClassLabel(0), number)) for number in range(7)]
        assert engine.drain(SECONDS)
        assert not engine.ready
        with pytest.raises(EngineClosedError):
            engine.submit(Sample(ClassLabel(0), 0))
        assert all(isinstance(list(handle)[-1], Done) for handle in handles)


def test_closing_cancels(windowed_bundle: Path) -> None:
    engine = Engine(open_bundle(windowed_bundle))
    handles = [engine.submit(Sample(ClassLabel(0), number)) for number in range(40)]
    engine.close()
    assert {type(list(handle)[-1]) for handle in handles} <= {Done, Cancelled}
    with pytest.raises(CancelledError):
        handles[-1].result(0)


def test_a_backend_that_fails_fails_all(windowed_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(open_bundle(windowed_bundle)) as engine:
        assert engine.wait_until_ready(SECONDS)
        engine.submit(Sample(ClassLabel(0), 0)).result(SECONDS)

        def broken(self: OrtBackend, stage: str) -> None:
            raise DeviceError("the device fell off")

        monkeypatch.setattr(OrtBackend, "_run", broken)
        handles = [engine.submit(Sample(ClassLabel(0), number)) for number in range(5)]
        for handle in handles:
            last = list(handle)[-1]
            assert isinstance(last, Failed)
            assert "fell off" in str(last.error)
        assert not engine.ready
        with pytest.raises(EngineClosedError, match="fell off"):
            engine.submit(Sample(ClassLabel(0), 0))


def test_a_row_that_a_cancelled_image_spoiled_is_not_used_again(
    windowed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its caches hold would fail the next image; it waits until the whole state is laid out anew."""
    bundle = open_bundle(windowed_bundle)
    asked = [(Sample(ClassLabel(number % 3), number), bundle.manifest.sampling) for number in range(5)]
    wanted = drawn_alone(windowed_bundle, asked)
    read, run = OrtBackend._read, OrtBackend._run
    spoilt: list[bool] = []
    admitted: list[list[int]] = []

    def spoiled(self: OrtBackend, spec: object) -> np.ndarray:
        values = read(self, spec)  # type: ignore[arg-type]
        if spec.name == "logits" and spoilt == [True]:  # type: ignore[attr-defined]
            values[0] = np.nan
        return values

    def noted(self: OrtBackend, stage: str) -> None:
        if stage == "prefill":
            spoilt.clear()
        if stage == "admit":
            admitted.append(self.read("admitted").tolist())
        run(self, stage)

    monkeypatch.setattr(OrtBackend, "_read", spoiled)
    monkeypatch.setattr(OrtBackend, "_run", noted)
    with Engine(bundle) as engine:
        first = engine.submit(*asked[0])
        while not admitted:
            time.sleep(0.001)
        assert admitted.pop() == [1, 0]
        spoilt.append(True)
        first.cancel()
        handles = [engine.submit(sample, sampling) for sample, sampling in asked]
        for handle, tokens in zip(handles, wanted, strict=True):
            assert (handle.result(SECONDS).tokens == tokens).all()
        assert not spoilt


def test_logits_that_are_no_numbers_fail_one_image_alone(
    windowed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is not used again before the whole state is laid out anew; the others are drawn on."""
    bundle = open_bundle(windowed_bundle)
    asked = [(Sample(ClassLabel(number % 3), number), bundle.manifest.sampling) for number in range(6)]
    wanted = drawn_alone(windowed_bundle, asked)
    read, spoilt = OrtBackend._read, []

    def once(self: OrtBackend, spec: object) -> np.ndarray:
        values = read(self, spec)  # type: ignore[arg-type]
        if spec.name == "logits" and not spoilt:  # type: ignore[attr-defined]
            spoilt.append(1)
            values[0, 0] = np.nan
        return values

    monkeypatch.setattr(OrtBackend, "_read", once)
    with Engine(bundle) as engine:
        handles = [engine.submit(sample, sampling) for sample, sampling in asked]
        lasts = [list(handle)[-1] for handle in handles]
        [failed] = [event for event in lasts if isinstance(event, Failed)]
        assert isinstance(failed.error, BundleError)
        assert "not finite" in str(failed.error)
        for event, tokens in zip(lasts, wanted, strict=True):
            assert event is failed or (isinstance(event, Done) and (event.image.tokens == tokens).all())
        # Once nothing is drawn, all rows are used again.
        again = [engine.submit(sample, sampling) for sample, sampling in asked]
        for handle, tokens in zip(again, wanted, strict=True):
            assert (handle.result(SECONDS).tokens == tokens).all()
