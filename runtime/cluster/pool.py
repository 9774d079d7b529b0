"""Workers of a Ray cluster that share the batches of a run.

Every batch is given to one worker, and to another if that one dies: what a dead worker had not sent is drawn anew, what it had sent is
not.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.closing import Closing
from linert.runtime.cluster.session import Share, first_line, local_cpus, ray_cluster, shares, with_share
from linert.runtime.cluster.worker import DrawWorker, Features, Opening, Place
from linert.runtime.drawing.batches import BatchSettings, BatchTask, Finished, OnLines
from linert.runtime.drawing.captions import CaptionConditioner
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.errors import DeviceError, LinertError

MOST_TRIES = 3
"""Workers that may die of one batch, or one after another while they open the bundle."""

REFRESH = 0.5
"""Seconds between two looks at how far workers are."""

PATIENCE = 20.0
"""Seconds without any worker after which that is said."""


@dataclass
class _Worker:
    """An actor. ``opening`` and ``drawing``: what it is at, as Ray's references; ``lines``: the answer to how far it is."""

    number: int
    actor: Any
    opening: Any
    place: Place | None = None
    task: BatchTask | None = None
    drawing: Any = None
    lines: Any = None
    window: str | None = None

    @property
    def awaited(self) -> Any:
        """What it is at; None if it has nothing to do."""
        return self.opening if self.place is None else self.drawing


class WorkerPool(Closing):
    """Draws the batches of a run with ``count`` workers, in a ``with`` block or until it is closed.

    Args:
        ray: Ray's module, connected.
        opening: what every worker is opened with.
        count: of the workers.
        share: what each has of the cluster.
        conditioner: what tells the features of captions.
        note: told for people when a worker dies, and when none starts.

    Attributes:
        drawn: batches that workers drew.
        lost: batches that a worker was at when it died.

    Raises:
        LinertError: the first worker cannot be opened.
    """

    def __init__(
        self,
        ray: Any,
        opening: Opening,
        count: int,
        share: Share,
        conditioner: Conditioner,
        note: Callable[[str], object],
    ) -> None:
        self._ray, self._count, self._conditioner, self._note = ray, count, conditioner, note
        self.drawn = self.lost = 0
        self._tries: Counter[int] = Counter()
        self._dead_openings = 0
        self._actors = ray.remote(
            **share.ray_options, concurrency_groups={"progress": 1}, scheduling_strategy="SPREAD"
        )(DrawWorker)
        self._opened = ray.put(opening)
        self._workers: list[_Worker] = []
        try:
            self._workers += [self._start(number) for number in range(count)]
            self._wait_for_one(share)
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> list[Place]:
        """Where the workers are that are open."""
        return [worker.place for worker in self._workers if worker.place is not None]

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self._workers:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor)
        self._workers.clear()

    def notes(self) -> list[str]:
        """Which windows were quickest, where that was measured."""
        measured = [(worker.number, worker.window) for worker in self._workers if worker.window is not None]
        return [f"window of worker {number + 1}: {text}" for number, text in measured]

    def counts(self) -> dict[str, int]:
        return {
            "workers": self._count,
            "batches_drawn": self.drawn,
            "batches_lost": self.lost,
        }

    def draw(self, tasks: Iterable[BatchTask], on_lines: OnLines) -> Iterator[Sequence[Finished]]:
        """Draw all tasks; yields those that are finished, as they are, in whatever order.

        Raises:
            LinertError: what a worker says that no other worker would do better.
            DeviceError: one batch, or opening the bundle, killed several workers.
        """
        coming, again = iter(tasks), deque[BatchTask]()
        while True:
            self._give_out(coming, again)
            if self._done():
                return
            drawn = []
            for worker in self._ready(REFRESH):
                finished, lost = self._collect(worker)
                drawn += finished
                again.extend(lost)
            # Nobody waits for work while files are written.
            self._give_out(coming, again)
            self._look_at_lines(on_lines)
            if drawn:
                yield drawn

    def _done(self) -> bool:
        """Whether nothing is left: a worker has nothing to do and no other has anything either."""
        idle = any(worker.place is not None and worker.task is None for worker in self._workers)
        return idle and not any(worker.task for worker in self._workers)

    def _start(self, number: int) -> _Worker:
        actor = self._actors.remote()
        return _Worker(number, actor, actor.open.remote(self._opened))

    def _wait_for_one(self, share: Share) -> None:
        begun, told = time.monotonic(), False
        while not self.places:
            for worker in self._ready(REFRESH):
                self._collect(worker)
            if not told and not self.places and time.monotonic() - begun > PATIENCE:
                told = True
                self._note(
                    f"no worker has started yet: each needs {share.cpus} CPUs and {share.gpus} GPUs that nobody else has"
                )

    def _ready(self, seconds: float) -> list[_Worker]:
        """Workers that have finished what they were at, or died; waits for one so long."""
        awaited = {worker.awaited: worker for worker in self._workers if worker.awaited is not None}
        if not awaited:
            return []
        ready, _ = self._ray.wait(list(awaited), timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        return [awaited[reference] for reference in ready]

    def _give_out(self, coming: Iterator[BatchTask], again: deque[BatchTask]) -> None:
        for worker in self._workers:
            if worker.place is None or worker.task is not None:
                continue
            task = again.popleft() if again else next(coming, None)
            if task is None:
                return
            worker.task, worker.drawing = task, worker.actor.draw.remote(task, self._features(task))

    def _features(self, task: BatchTask) -> Features:
        if not isinstance(self._conditioner, CaptionConditioner):
            return {}
        return self._conditioner.features(sample.condition for sample in task.samples)

    def _collect(self, worker: _Worker) -> tuple[list[Finished], list[BatchTask]]:
        """What a worker has finished; and what is to be drawn anew, if it died."""
        try:
            answer = self._ray.get(worker.awaited)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LinertError):
                raise error.cause from error
            raise DeviceError(
                f"a worker failed: {type(error.cause).__name__}: {first_line(error.cause)}"
            ) from error
        except self._ray.exceptions.RayError as error:
            return [], self._replace(worker, error)
        task = worker.task
        if task is None:
            worker.place, self._dead_openings = answer, 0
            return [], []
        drawn, worker.window = answer
        worker.task = worker.drawing = worker.lines = None
        self.drawn += 1
        # Arrays of Ray's are views of its store, which they would fill.
        slots = None if drawn.slots is None else drawn.slots.copy()
        return [(task, replace(drawn, tokens=drawn.tokens.copy(), slots=slots))], []

    def _replace(self, worker: _Worker, error: Exception) -> list[BatchTask]:
        """Start another worker in the place of one that died; what that one was at."""
        # It may be alive, and what it sent be lost with another machine.
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker.actor)
        task, where = worker.task, worker.place
        self._workers[self._workers.index(worker)] = self._start(worker.number)
        if task is None:
            self._dead_openings += 1
            if self._dead_openings >= MOST_TRIES:
                raise DeviceError(
                    f"{MOST_TRIES} workers died while they opened the bundle: {first_line(error)}"
                ) from error
            return []
        self.lost += 1
        self._tries[task.number] += 1
        if self._tries[task.number] >= MOST_TRIES:
            raise DeviceError(
                f"{MOST_TRIES} workers died while they drew batch {task.number + 1}: {first_line(error)}; what is drawn is kept, and "
                "--resume goes on"
            ) from error
        self._note(
            f"a worker died ({where.text if where else 'not open yet'}): batch {task.number + 1} is drawn by another. {first_line(error)}"
        )
        return [task]

    def _look_at_lines(self, on_lines: OnLines) -> None:
        """Tell how far workers are, as far as they have answered, and ask anew."""
        for worker in self._workers:
            if worker.task is None:
                continue
            if worker.lines is not None:
                if not self._ray.wait([worker.lines], timeout=0)[0]:
                    continue
                # Of one that died, what it was at is told by that.
                with contextlib.suppress(self._ray.exceptions.RayError):
                    number, lines = self._ray.get(worker.lines)
                    if number == worker.task.number:
                        on_lines(number, lines)
            worker.lines = worker.actor.lines.options(concurrency_group="progress").remote()


@contextlib.contextmanager
def worker_pool(
    address: str | None,
    workers: int | None,
    bundle: Bundle,
    options: BackendOptions,
    settings: BatchSettings,
    conditioner: Conditioner,
    note: Callable[[str], object],
) -> Iterator[WorkerPool]:
    """Workers of the cluster at ``address``, see :func:`linert.runtime.cluster.session.ray_cluster`.

    Args:
        workers: how many; one a machine if None, or one a GPU.

    Raises:
        LinertError: there is no such cluster, or its workers cannot draw from the bundle.
    """
    with ray_cluster(address, local_cpus(workers or 1, options)) as cluster:
        count, share = shares(cluster.machines(), workers, options)
        opening = Opening.of(bundle, with_share(options, share), settings)
        with WorkerPool(cluster.ray, opening, count, share, conditioner, note) as pool:
            note(f"{count} workers of {share.cpus} CPUs{f' and {share.gpus} GPU' if share.gpus else ''}")
            yield pool
