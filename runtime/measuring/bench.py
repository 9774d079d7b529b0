"""Measure a bundle against the limit of the machine: the least time that reading and computing can take."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.manifest import Manifest, Work, decode_stage
from linert.runtime.machine import ReadBandwidth, peak_macs
from linert.runtime.measuring.measured import Image, Measured, Passes, Start

WARM_UP = 3


@dataclass(frozen=True)
class Limit:
    """The least time of one decode step, on this machine now.

    ``weight_bytes``, ``state_bytes``: what a step has to read. ``macs``: what it has to multiply. ``read_bandwidth``:
    bytes a second; on a GPU, of a copy. ``mac_rate``: a second, None where it was not measured. ``floor_ms``: the longer of
    reading and multiplying. ``steps``: of an image, where they differ, and the other numbers are their means.
    """

    weight_bytes: int
    state_bytes: int
    macs: int
    read_bandwidth: float
    mac_rate: float | None
    steps: tuple[Work, ...] = ()

    @property
    def read_ms(self) -> float:
        return (self.weight_bytes + self.state_bytes) / self.read_bandwidth * 1e3

    @property
    def compute_ms(self) -> float:
        return self.macs / self.mac_rate * 1e3 if self.mac_rate else 0.0

    @property
    def floor_ms(self) -> float:
        if self.steps:
            alone = [replace_work(self, work).floor_ms for work in self.steps]
            return sum(alone) / len(alone)
        return max(self.read_ms, self.compute_ms)

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if name != "steps"}
        return {
            **values,
            "read_ms": self.read_ms,
            "compute_ms": self.compute_ms,
            "floor_ms": self.floor_ms,
        }


def replace_work(limit: Limit, work: Work) -> Limit:
    """The limit of other work on the same machine."""
    return Limit(work.weight_bytes, work.state_bytes, work.macs, limit.read_bandwidth, limit.mac_rate)


def step_works(manifest: Manifest) -> list[Work]:
    """Of the decode steps of an image that differ: one of a raster, all of an image that is drawn in groups."""
    filtered = manifest.sampling.filtered
    if (groups := manifest.groups) is None:
        return [manifest.stages[decode_stage(1, filtered=filtered)].work]
    steps = groups.steps(groups.sizes_in(manifest.sampling.steps))
    return [manifest.stages[step.width.stage(filtered=filtered)].work for step in steps]


def step_work(manifest: Manifest) -> Work:
    """Of one decode step of a bundle, the mean where they differ. All of its buffer is read, whatever the budget; of a matrix a column, one."""
    works = step_works(manifest)
    return Work(
        *(sum(getattr(work, name) for work in works) // len(works) for name in Work.__struct_fields__)
    )


def limit_of(manifest: Manifest, read_bandwidth: float, mac_rate: float | None) -> Limit:
    """Of one decode step of a bundle."""
    work, works = step_work(manifest), step_works(manifest)
    steps = tuple(works) if len(works) > 1 else ()
    return Limit(work.weight_bytes, work.state_bytes, work.macs, read_bandwidth, mac_rate, steps)


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


@dataclass(frozen=True, kw_only=True)
class GroupTimings:
    """Of the decode stage of one width, in an image that is drawn in groups: how many ``steps`` it takes, and milliseconds of each."""

    steps: int
    step_ms: float


@dataclass(kw_only=True)
class Timings:
    """Medians of what was measured of one bundle; milliseconds and seconds as the names say. ``windows``: by their widths, if the
    bundle has more than one. ``groups``: by stage, if images are drawn in groups, whose ``decode_ms`` is that of a mean step and which
    end no lines. ``tokens_a_step``: of an image."""

    limit: Limit
    start: Start
    decode_ms: float
    line_end_ms: float | None
    vq_decoder_ms: float
    windows: dict[int, WindowTimings]
    groups: dict[str, GroupTimings]
    tokens_a_step: float
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

    @property
    def tokens_per_second(self) -> float:
        return self.images * self.tokens_a_step * 1e3 / self.decode_ms

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds_per_image
        return {
            **asdict(self),
            "limit": self.limit.to_json(),
            "decode_over_limit": self.over_limit,
            "bandwidth_share": self.bandwidth_share,
            "compute_share": self.compute_share,
            "line_end_share": self.line_end_ms and self.line_end_ms / (self.decode_ms * self.line_width),
            "seconds_per_image": seconds,
            "images_per_second": 1 / seconds if seconds else None,
            "tokens_per_second": self.tokens_per_second,
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
        measured.group_ms.clear()
        measured.vq_decode()
    for round_ in range(rounds):
        progress(round_, total)
        reads += [bandwidth() for _ in range(3)]
        for number, measured in enumerate(under_test):
            times = measured.line()
            decode[number] += times[min(WARM_UP, len(times) - 1) :]
            if measured.manifest.groups is None:
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
            line_end_ms=statistics.median(line_ends[number]) if line_ends[number] else None,
            vq_decoder_ms=statistics.median(vq[number]),
            windows=windows[number].timings(statistics.median(line_ends[number] or [0.0])),
            groups=_groups(measured),
            tokens_a_step=measured.manifest.raster.image_tokens / len(measured.batch.groups)
            if measured.batch.groups
            else 1.0,
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


def _groups(measured: Measured) -> dict[str, GroupTimings]:
    """Every stage's medians of all rounds, of an image that is drawn in groups."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for step, taken in zip(measured.batch.groups, zip(*measured.group_ms, strict=True), strict=False):
        times[measured.batch.group(step)] += taken
    rounds = len(measured.group_ms)
    return {
        stage: GroupTimings(steps=len(taken) // rounds, step_ms=statistics.median(taken))
        for stage, taken in times.items()
    }


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
