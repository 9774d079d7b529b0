"""What TensorRT's builder calls back: a progress monitor, and a writer of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO


def make_monitor(trt: Any, on_progress: Callable[[str, int, int], None]) -> Any:
    """A progress monitor that passes on a phase's name, the step done and the steps of the phase."""

    class Monitor(trt.IProgressMonitor):
        """Phases nest; each has its own number of steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            on_progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_progress(phase_name, step + 1, self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 0)
            on_progress(phase_name, steps, steps)

    return Monitor()


def make_writer(trt: Any, file: BinaryIO, on_failure: Callable[[OSError], None]) -> Any:
    """Writes a plan to ``file`` while it is serialised, so that it is never whole in memory.

    TensorRT takes no notice of what cannot be written: whether anything failed is known by ``on_failure`` alone.
    """

    class Writer(trt.IStreamWriter):
        """Gets the plan in parts of 64 MiB."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                on_failure(error)
                return 0

    return Writer()
