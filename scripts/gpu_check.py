"""Check linert on a machine with a GPU, in a quarter of an hour and without network: driver, kernels, speed, backends.

    python scripts/gpu_prepare.py --out carried                   # beforehand, where PyTorch and Triton are; no GPU
    python scripts/gpu_check.py --carried carried --out checked   # there
    python scripts/gpu_check.py --phase kernels --carried carried --out checked
    python scripts/gpu_check.py --rehearse --carried carried --out rehearsed   # here, on an emulated driver

Every phase is a process of its own with a limit of its own, and writes what it finds as it finds it: OUT/PHASE.jsonl, OUT/PHASE.log.
Then everything stands in OUT/gpu_check.json. What could not be run is listed with the reason. The exit code is 1 when something
that ran failed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if "--rehearse" in sys.argv:
    # Triton asks once, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import click
from gpu_phases import driver, kernels, onnxruntime, plans, speeds, tests
from gpu_phases.outcome import Check, Outcome, Recorder, read_outcomes
from gpu_phases.place import Place
from rich.console import Console
from rich.table import Table

Checks = Callable[[Place, Recorder], Iterable[tuple[str, Check]]]


@dataclass(frozen=True)
class Phase:
    """One phase: its checks, how many seconds it may take, and what it shows."""

    checks: Checks
    seconds: float
    shows: str


PHASES = {
    "driver": Phase(lambda place, _: driver.checks(place), 30, "memory, copies, captured graphs"),
    "kernels": Phase(
        lambda place, _: kernels.checks(place), 60, "carried kernels against PyTorch, eager and captured"
    ),
    "sanitizer": Phase(kernels.sanitized, 120, "the same under compute-sanitizer"),
    "tests": Phase(tests.checks, 120, "the kernels' tests, compiled by the Triton at hand"),
    "speeds": Phase(speeds.checks, 90, "kernels against copy bandwidth; the best layout as a table"),
    "onnxruntime": Phase(onnxruntime.checks, 360, "ONNX Runtime's CUDA backend: the demo, then LlamaGen-XL"),
    "plans": Phase(plans.checks, 600, "TensorRT for RTX and TensorRT: parity and speed of the demos"),
}
"""In this order. All but ``plans``, which exports and builds, fit a quarter of an hour with 2 minutes to spare."""

PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "cuda-bindings",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13",
    "tensorrt",
)
GRACE = 10
"""Seconds behind a phase's limit at which its process is ended: checks that would begin later are left out by itself."""


@click.command(help=__doc__)
@click.option("--carried", type=click.Path(path_type=Path), required=True, help="What gpu_prepare.py made.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for what is found.")
@click.option(
    "--phase", "chosen", multiple=True, type=click.Choice(list(PHASES)), help="Repeatable; default: all."
)
@click.option("--limit", type=float, help="Seconds for each phase, instead of its own limit.")
@click.option(
    "--rehearse", is_flag=True, help="On the CPU: an emulated driver, interpreted kernels, small sizes."
)
@click.option(
    "--inside", is_flag=True, help="Run the phase in this process, as gpu_check.py does for itself."
)
def main(
    carried: Path, out: Path, chosen: Sequence[str], limit: float | None, rehearse: bool, inside: bool
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    place = Place(carried, out, rehearse)
    if inside:
        for name in chosen:
            phase = PHASES[name]
            recorder = Recorder(out / f"{name}.jsonl", limit or phase.seconds)
            recorder.run(_listed(phase, place, recorder))
        return
    console = Console(highlight=False)
    outcomes = {}
    begun = time.perf_counter()
    for name in chosen or PHASES:
        started = time.perf_counter()
        seconds = limit or PHASES[name].seconds
        outcomes[name] = run_phase(name, seconds, place)
        took = time.perf_counter() - started
        console.print(f"{name}: {_count(outcomes[name])}; {took:.1f} of {seconds:.0f} s")
        told = {phase: [asdict(outcome) for outcome in results] for phase, results in outcomes.items()}
        report = {"packages": _versions(), "rehearsal": rehearse, "phases": told}
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    summary(console, outcomes)
    console.print(f"{time.perf_counter() - begun:.1f} s in all; everything found: {out / 'gpu_check.json'}")
    if any(outcome.status == "failed" for results in outcomes.values() for outcome in results):
        sys.exit(1)


def _listed(phase: Phase, place: Place, recorder: Recorder) -> list[tuple[str, Check]]:
    """A phase's checks by name; one check that says so where they cannot even be listed."""
    try:
        return list(phase.checks(place, recorder))
    except Exception as error:
        reason = error

        def unlisted() -> Outcome:
            raise reason

        return [("everything", unlisted)]


def run_phase(name: str, seconds: float, place: Place) -> list[Outcome]:
    """Run one phase in a process of its own, which is ended when its time is over; what it found until then stands."""
    records, log = place.out / f"{name}.jsonl", place.out / f"{name}.log"
    records.unlink(missing_ok=True)
    command = [
        *(sys.executable, str(Path(__file__)), "--phase", name, "--inside", "--limit", str(seconds)),
        *("--carried", str(place.carried), "--out", str(place.out)),
        *(["--rehearse"] if place.rehearsal else []),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever the phase started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcomes = read_outcomes(records)
    if code is None:
        outcomes.append(
            Outcome("the whole phase", "failed", f"was ended after {seconds + GRACE:.0f} seconds")
        )
    elif code:
        said = log.read_text(errors="replace").strip().splitlines()[-3:]
        outcomes.append(Outcome("the whole phase", "failed", f"exit code {code}: {' / '.join(said)}"))
    return outcomes


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _count(outcomes: Sequence[Outcome]) -> str:
    states = [outcome.status for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing found"


def summary(console: Console, outcomes: dict[str, list[Outcome]]) -> None:
    """Everything that ran in a table, and what did not by its reasons."""
    table = Table("check", "", "result", title="GPU check", title_justify="left")
    reasons: dict[str, list[str]] = {}
    for phase, results in outcomes.items():
        for outcome in results:
            name = f"{phase}: {outcome.name}"
            if outcome.status == "not run":
                reasons.setdefault(outcome.text, []).append(name)
            else:
                table.add_row(name, outcome.status, outcome.text)
    console.print(table)
    for reason, names in reasons.items():
        console.print(f"not run ({reason}):")
        for name in names:
            console.print(f"  {name}")


if __name__ == "__main__":
    main()
