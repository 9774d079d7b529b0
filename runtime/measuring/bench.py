"""Measure a bundle against the limit of the machine: the least time that reading and computing can take."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linert.runtime.backends.base import Backend
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import SLOT_POSITIONS, Manifest, Work
from linert.runtime.bundles.raster import Step
from linert.runtime.drawing.generator import Generator, Pixels, make_batch, picture
from linert.runtime.drawing.loop import Batch, begin, run_step
from linert.runtime.drawing.output import write_png
from linert.runtime.drawing.samples import Sample, list_samples
from linert.runtime.files.replacement import scratch_folder
from linert.runtime.machine import ReadBandwidth, peak_macs, resident_bytes

WARM_UP = 3


@dataclass(frozen=True)
class Limit:
    """The least time of one decode step, on this machine now.

    ``weight_bytes``, ``state_bytes``: what a step has to read. ``macs``: what it has to multiply. ``read_bandwidth``:
    bytes a second; on a GPU, of a copy. ``mac_rate``: a second, None where it was not measured. ``floor_ms``: the longer of
    reading and multiplying.
    """

    weight_bytes: int
    state_bytes: int
    macs: int
    read_bandwidth: float
    mac_rate: float | None

    @property
    def read_ms(self) -> float:
        return (self.weight_bytes + self.state_bytes) / self.read_bandwidth * 1e3

    @property
    def compute_ms(self) -> float:
        return self.macs / self.mac_rate * 1e3 if self.mac_rate else 0.0

    @property
    def floor_ms(self) -> float:
        return max(self.read_ms, self.compute_ms)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "read_ms": self.read_ms,
            "compute_ms": self.compute_ms,
            "floor_ms": self.floor_ms,
        }


@dataclass(frozen=True)
class Image:
    """Seconds of a whole batch of images, from the condition to PNG files, by where they went."""

    prefill: float
    decode: float
    line_ends: float
    vq_decoder: float
    png: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.line_ends + self.vq_decoder + self.png


@dataclass(frozen=True)
class Start:
    """Seconds from nothing to the first token: verifying the bundle's digests, then loading and the first step."""

    verify: float
    first_token: float


def step_work(manifest: Manifest) -> Work:
    """Of one decode step of a bundle. All of its buffer is read, whatever the budget; of a matrix a column, one."""
    return manifest.stages["decode" if manifest.sampling.filtered else "decode.unfiltered"].work


def limit_of(manifest: Manifest, read_bandwidth: float, mac_rate: float | None) -> Limit:
    """Of one decode step of a bundle."""
    work = step_work(manifest)
    return Limit(work.weight_bytes, work.state_bytes, work.macs, read_bandwidth, mac_rate)


class Passes(NamedTuple):
    """How a whole batch's tokens were drawn: decode steps, the condition's among them, line ends that ran, and seconds."""

    steps: int
    line_ends: int
    seconds: float


class Measured:
    """A bundle under measurement: one batch that can be stepped, and drawn as a whole.

    Args:
        path: the bundle's folder.
        cache: policy, budget and the rest; the bundle's defaults if None.
        options: where stages run.
        size: of the images, of those that the bundle draws.
    """

    def __init__(
        self, path: Path, cache: CacheSettings | None, options: BackendOptions, size: str | None = None
    ) -> None:
        begun = time.perf_counter()
        bundle = open_bundle(path, size)
        if cache is not None:
            bundle = bundle.fitting(cache)
        verified = time.perf_counter()
        self.generator = Generator(bundle, options)
        try:
            self.samples, self.batch = self._begun(cache)
        except BaseException:
            # Gigabytes of a device would stay taken as long as somebody holds the error.
            self.generator.close()
            raise
        self.start = Start(verified - begun, time.perf_counter() - verified)
        self.resident = resident_bytes()
        self._line = 0
        self._loaded = {self.batch.decode(1)}

    def _begun(self, cache: CacheSettings | None) -> tuple[Sequence[Sample], Batch]:
        """Samples and their batch, whose first token is drawn."""
        manifest, conditioner = self.manifest, self.generator.conditioner
        samples = list_samples(conditioner.usual(), manifest.images, seed=0)
        batch = make_batch(manifest, conditioner, samples, manifest.sampling, cache or manifest.cache)
        manifest.check_cache(batch.cache)
        begin(self.backend, batch)
        self.backend.synchronize()
        return samples, batch

    @property
    def manifest(self) -> Manifest:
        return self.generator.manifest

    @property
    def backend(self) -> Backend:
        return self.generator.backend

    def line(self, window: int = 1) -> list[float]:
        """Milliseconds of the decode steps of one line, with the buffer as full as it gets.

        Args:
            window: positions of every image that a step takes; a line's worth of steps is as many as fit it if all are accepted.
        """
        stage = self.batch.decode(window)
        if stage not in self._loaded:
            # What the state holds afterwards is undefined.
            self.backend.load(stage)
            self._loaded.add(stage)
            self._line = 0
        raster = self.manifest.raster
        if self._line == 0:
            self._fill()
        self._line += 1
        first = raster.prefix_len + (raster.lines - 1) * raster.line_width
        position = self.backend.specs["position"]
        self.backend.write("position", np.full(position.shape, first, np.int64))
        steps = max(1, (raster.line_width - 1) // window)
        run = partial(self.backend.run, stage)
        if not self.backend.asynchronous:
            return [milliseconds(run) for _ in range(steps)]

        def all_steps() -> None:
            for _ in range(steps):
                run()
            self.backend.synchronize()

        self.backend.synchronize()
        return [milliseconds(all_steps) / steps] * steps

    def line_end(self) -> float:
        """Milliseconds of one line end, which is due in every image."""
        raster = self.manifest.raster
        line = max(0, raster.lines - 2)
        for name, number in (
            ("line", line),
            ("position", raster.prefix_len + (line + 1) * raster.line_width),
        ):
            self.backend.write(name, np.full(self.backend.specs[name].shape, number, np.int64))
        self.backend.synchronize()
        return milliseconds(lambda: self._finished(lambda: self.backend.run(self.batch.stages["line_end"])))

    def vq_decode(self) -> float:
        """Milliseconds of decoding one image's pixels."""
        tokens = np.zeros((1, self.manifest.raster.image_tokens), np.int64)
        return milliseconds(lambda: self.generator.decoder(tokens))

    def image(self) -> Image:
        """Draw the whole batch."""
        spent: defaultdict[str, float] = defaultdict(float)

        def timed(name: str, action: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = self._finished(action)
            spent[name] += time.perf_counter() - start
            return result

        timed("prefill", lambda: begin(self.backend, self.batch))
        for stage, steps in itertools.groupby(self.manifest.raster.schedule(), lambda step: step.stage):
            timed(stage, partial(self._run_steps, list(steps)))
        tokens = self.backend.read("tokens")
        with scratch_folder() as folder:
            for index, row in enumerate(tokens):
                pixels = timed("vq_decoder", partial(self.generator.decoder, row[None]))[0]
                timed("png", partial(_write, folder / f"{index}.png", pixels))
        self._line = 0
        return Image(spent["prefill"], spent["decode"], spent["line_end"], spent["vq_decoder"], spent["png"])

    def passes(self, window: int) -> Passes:
        """Draw the whole batch by windows of so many positions."""
        stages = self.batch.decode(window), self.batch.stages["line_end"]
        before, begun = [self.backend.runs[stage] for stage in stages], time.perf_counter()
        self.generator.draw(self.samples, cache=self.batch.cache, window=window)
        seconds = time.perf_counter() - begun
        self._line = 0
        steps, line_ends = (self.backend.runs[stage] - ran for stage, ran in zip(stages, before, strict=True))
        return Passes(steps, line_ends, seconds)

    def _run_steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            run_step(self.backend, self.batch, step)

    def _finished(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, once everything that it asked of the backend is done."""
        result = action()
        self.backend.synchronize()
        return result

    def _fill(self) -> None:
        """Let every slot hold a position."""
        begin(self.backend, self.batch)
        fill_slots(self.backend)


def fill_slots(backend: Backend) -> None:
    """Let every slot of the line buffer hold a position, so that attention reads all of it."""
    for spec in backend.bundle.manifest.states_of(SLOT_POSITIONS):
        shape = backend.specs[spec.name].shape
        backend.write(spec.name, np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape))


@dataclass(frozen=True, kw_only=True)
class WindowTimings:
    """Of windows of one width: milliseconds of a decode step; and of drawing a whole batch's tokens, where that was measured,
    the steps and line ends that it takes, tokens that an image gains a step, and seconds an image as steps and line ends add up
    and as measured."""

    step_ms: float
    passes: int | None = None
    line_ends: int | None = None
    accepted: float | None = None
    expected_seconds: float | None = None
    seconds: float | None = None


@dataclass(kw_only=True)
class Timings:
    """Medians of what was measured of one bundle; milliseconds and seconds as the names say. ``windows``: by their widths, if the
    bundle has more than one."""

    limit: Limit
    start: Start
    decode_ms: float
    line_end_ms: float
    vq_decoder_ms: float
    windows: dict[int, WindowTimings]
    image: Image | None
    images: int
    line_width: int
    resident_bytes: int | None
    file_bytes: int
    state_bytes: int

    @property
    def over_limit(self) -> float:
        return self.decode_ms / self.limit.floor_ms

    @property
    def bandwidth_share(self) -> float:
        """Share of the read bandwidth that decode uses."""
        return self.limit.read_ms / self.decode_ms

    @property
    def compute_share(self) -> float:
        """Share of the float32 multiply-accumulate rate that decode uses; integers can exceed it."""
        return self.limit.compute_ms / self.decode_ms

    @property
    def seconds_per_image(self) -> float | None:
        return self.image.total / self.images if self.image else None

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds_per_image
        return {
            **asdict(self),
            "limit": self.limit.to_json(),
            "decode_over_limit": self.over_limit,
            "bandwidth_share": self.bandwidth_share,
            "compute_share": self.compute_share,
            "line_end_share": self.line_end_ms / (self.decode_ms * self.line_width),
            "seconds_per_image": seconds,
            "images_per_second": 1 / seconds if seconds else None,
            "tokens_per_second": self.images * 1e3 / self.decode_ms,
        }


def measure(
    under_test: Sequence[Measured],
    *,
    threads: int,
    rounds: int,
    image_rounds: int,
    each_round: Callable[[], None] = lambda: None,
    each_image: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timings]:
    """Measure bundles in turns, a line of steps each a round, beside the machine's bandwidth.

    Args:
        image_rounds: whole batches to draw with each.
        each_round, each_image: called once a round of steps or images, for what is to be measured beside.
        progress: called with rounds done and rounds in all.
    """
    bandwidth, rate = limits_of(under_test[0].backend, threads)
    reads: list[float] = []
    decode: list[list[float]] = [[] for _ in under_test]
    line_ends: list[list[float]] = [[] for _ in under_test]
    vq: list[list[float]] = [[] for _ in under_test]
    windows = [_Windows(measured) for measured in under_test]
    drawn: list[list[Image]] = [[] for _ in under_test]
    total = rounds + image_rounds
    for measured in under_test:
        measured.line()
        measured.vq_decode()
    for round_ in range(rounds):
        progress(round_, total)
        reads += [bandwidth() for _ in range(3)]
        for number, measured in enumerate(under_test):
            times = measured.line()
            decode[number] += times[min(WARM_UP, len(times) - 1) :]
            line_ends[number].append(measured.line_end())
            windows[number].time_steps()
            if round_ < 3:
                vq[number].append(measured.vq_decode())
        each_round()
    for round_ in range(image_rounds):
        progress(rounds + round_, total)
        for number, measured in enumerate(under_test):
            drawn[number].append(measured.image())
            windows[number].time_passes()
        each_image()
    progress(total, total)
    read = statistics.median(reads)
    return [
        Timings(
            limit=limit_of(measured.manifest, read, rate),
            start=measured.start,
            decode_ms=statistics.median(decode[number]),
            line_end_ms=statistics.median(line_ends[number]),
            vq_decoder_ms=statistics.median(vq[number]),
            windows=windows[number].timings(statistics.median(line_ends[number])),
            image=sorted(drawn[number], key=lambda image: image.total)[(len(drawn[number]) - 1) // 2]
            if drawn[number]
            else None,
            images=measured.manifest.images,
            line_width=measured.manifest.raster.line_width,
            resident_bytes=measured.resident,
            file_bytes=sum(record.bytes for record in measured.manifest.files.values()),
            state_bytes=measured.manifest.state_bytes,
        )
        for number, measured in enumerate(under_test)
    ]


class _Windows:
    """Measures every width of a bundle that has several, in turns."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        widths = measured.manifest.windows
        self._steps: dict[int, list[float]] = {width: [] for width in widths if len(widths) > 1}
        self._passes: dict[int, list[Passes]] = {width: [] for width in self._steps}

    def time_steps(self) -> None:
        """As many steps of each width as a line has of single ones, behind some that warm up."""
        wanted = WARM_UP + self._measured.manifest.raster.line_width
        for width, times in self._steps.items():
            taken: list[float] = []
            while len(taken) < wanted:
                taken += self._measured.line(width)
            times += taken[WARM_UP:]

    def time_passes(self) -> None:
        for width, passes in self._passes.items():
            passes.append(self._measured.passes(width))

    def timings(self, line_end_ms: float) -> dict[int, WindowTimings]:
        """Medians, beside a line end's milliseconds."""
        return {
            width: self._timings(statistics.median(times), line_end_ms, self._passes[width])
            for width, times in self._steps.items()
        }

    def _timings(self, step_ms: float, line_end_ms: float, drawn: Sequence[Passes]) -> WindowTimings:
        if not drawn:
            return WindowTimings(step_ms=step_ms)
        manifest = self._measured.manifest
        steps, line_ends, _ = drawn[0]
        return WindowTimings(
            step_ms=step_ms,
            passes=steps,
            line_ends=line_ends,
            accepted=(manifest.raster.image_tokens - 1) / steps,
            expected_seconds=(steps * step_ms + line_ends * line_end_ms) / 1e3 / manifest.images,
            seconds=statistics.median(passes.seconds for passes in drawn) / manifest.images,
        )


def limits_of(backend: Backend, threads: int) -> tuple[Callable[[], float], float | None]:
    """What measures bytes a second of the memory that ``backend`` uses, and multiply-accumulates a second where known.

    On a GPU bandwidth is that of a copy on the device, and the multiply-accumulate rate is not measured.
    """
    device = backend.device_memory()
    if device is None:
        return ReadBandwidth(threads).measure, peak_macs()
    return device.copy_bandwidth, None


@dataclass(frozen=True)
class NodeTime:
    """Milliseconds a step of a node, or of all nodes of a type (``count`` of them)."""

    name: str
    kind: str
    count: int
    ms: float


def profile(
    bundle: Bundle, batch: Batch, *, threads: int, steps: int = 50
) -> tuple[list[NodeTime], list[NodeTime]]:
    """Time of the decode stage by node type, and of its single nodes, the longest first.

    Recording costs a few microseconds a node, so that the sum is more than a step takes without.
    """
    from linert.runtime.backends.ort import OrtBackend

    with scratch_folder() as folder:
        backend = OrtBackend(bundle, batch.stages.values(), threads=threads, profile=folder)
        begin(backend, batch)
        raster, position = bundle.manifest.raster, backend.specs["position"]
        for step in range(steps):
            at = raster.prefix_len + step % raster.line_width
            backend.write("position", np.full(position.shape, at, np.int64))
            backend.run(batch.stages["decode"])
        events = json.loads(backend.end_profile(batch.stages["decode"]).read_text())
    kinds: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    nodes: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind, name = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
            kinds[kind].append((name, event["dur"]))
            nodes[name, kind].append(event["dur"])
    by_kind = [
        NodeTime(kind, kind, len({name for name, _ in times}), sum(t for _, t in times) / steps / 1e3)
        for kind, times in kinds.items()
    ]
    single = [NodeTime(name, kind, 1, sum(times) / steps / 1e3) for (name, kind), times in nodes.items()]

    def longest(times: list[NodeTime]) -> list[NodeTime]:
        return sorted(times, key=lambda time: -time.ms)

    return longest(by_kind), longest(single)


def _write(path: Path, pixels: Pixels) -> None:
    write_png(path, picture(pixels))


def milliseconds(action: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3
