"""Phase kernels: the operations' kernels as a plan carries them, from machine code and from text, eager and captured."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

from gpu_phases.cases import FILE, Case, Prepared, read_carried
from gpu_phases.outcome import Check, NotRunError, Outcome, Recorder
from gpu_phases.place import ROOT, Place

FORMS = ("machine code", "text")
TOOLS = ("memcheck", "racecheck")


def checks(place: Place) -> Iterator[tuple[str, Check]]:
    """Every case in both forms."""
    for case in read_carried(place.prepared(FILE), Case):
        for form in FORMS:
            yield f"{case.name}, {form}", lambda case=case, form=form: run_case(place, case, form)


def run_case(place: Place, case: Case, form: str) -> Outcome:
    """Launch once as a plugin does, then twice from a captured graph, from the same inputs each time."""
    prepared = Prepared(place, case, form)
    try:
        prepared.upload()
        prepared.enqueue()
        errors = [prepared.compare()]
        with place.device.capturing() as captured:
            prepared.enqueue()
        [graph] = captured
        for _ in range(2):
            prepared.upload()
            graph.launch(place.device.stream)
            errors.append(prepared.compare())
        graph.close()
    finally:
        prepared.free()
    figures = {"errors": errors, "nodes": graph.nodes}
    return Outcome("", "passed", f"largest error {max(errors):.1e}, of {case.tolerance:.0e}", figures)


def sanitized(place: Place, recorder: Recorder) -> Iterator[tuple[str, Check]]:
    """The same cases under compute-sanitizer's tools."""
    for tool in TOOLS:
        yield tool, lambda tool=tool: sanitize(place, tool, recorder.remaining)


def sanitize(place: Place, tool: str, seconds: float) -> Outcome:
    """Run the phase ``kernels`` in a process of its own under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotRunError("compute-sanitizer is not installed")
    place.prepared(FILE)
    out = place.out / tool
    out.mkdir(exist_ok=True)
    command = [
        *(program, "--tool", tool, "--error-exitcode", "99", sys.executable),
        *(str(ROOT / "scripts" / "gpu_check.py"), "--phase", "kernels", "--inside"),
        *("--carried", str(place.carried), "--out", str(out), *(["--rehearse"] if place.rehearsal else [])),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotRunError(f"{tool} took longer than the {seconds:.0f} seconds that were left") from error
    (out / "log").write_text(done.stdout + done.stderr)
    summaries = [line.strip(" =") for line in done.stdout.splitlines() if " SUMMARY: " in line]
    if done.returncode or not summaries:
        raise AssertionError(
            f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:] or 'no output'}"
        )
    return Outcome("", "passed", "; ".join(summaries))
