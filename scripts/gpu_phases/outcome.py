"""What a check found, written down as soon as it is known."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What one check found.

    ``status``: ``passed``, ``failed``, ``measured`` (there is no bar), or ``not run``, with the reason in ``text``.
    """

    name: str
    status: str
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class NotRunError(Exception):
    """A check that cannot be run here; the message says why."""


Check = Callable[[], Outcome]


class Recorder:
    """Runs a phase's checks one after another and appends what each found to a file, a JSON object a line.

    A phase that is cut leaves what it found so far.

    Args:
        file: where outcomes are appended.
        seconds: how long the phase may take; checks that would begin later are listed as not run.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._file = file
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that the phase still has."""
        return self._end - time.monotonic()

    def run(self, checks: Iterable[tuple[str, Check]]) -> None:
        """Run checks by name; whatever one raises is its outcome."""
        for name, check in checks:
            if self.remaining <= 0:
                self.write(Outcome(name, "not run", f"the phase's {self._seconds:.0f} seconds were over"))
                continue
            self.write(run(name, check))

    def write(self, outcome: Outcome) -> None:
        """Append one outcome."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def run(name: str, check: Check) -> Outcome:
    """Run one check under ``name``; whatever it raises is its outcome."""
    begun = time.perf_counter()
    try:
        outcome = check()
    except NotRunError as reason:
        outcome = Outcome(name, "not run", str(reason))
    except Exception as error:
        outcome = Outcome(name, "failed", f"{type(error).__name__}: {error}")
        outcome.figures["traceback"] = traceback.format_exc()
    outcome.name = name
    outcome.seconds = time.perf_counter() - begun
    return outcome


def read_outcomes(file: Path) -> list[Outcome]:
    """What was recorded in ``file``; a last line that was cut is left out."""
    outcomes = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except json.JSONDecodeError:
            break
    return outcomes
