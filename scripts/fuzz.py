"""Damage everything that people bring, and look at what happens: a refusal in one sentence, the same images, or a fault.

    python scripts/fuzz.py --minutes 10 --seed 1 --keep faults
    python scripts/fuzz.py --cases 300 --seed 1 --only manifest

Every case is a process of its own with limits on time and memory. The input of each fault is kept. Exit code 1 if there are any.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The package need not be installed.
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
from fuzzing.targets import TARGETS, Bases, Target
from fuzzing.workers import FAULTS, Running, Verdict, finish, in_process, start
from rich.console import Console
from rich.table import Table


class Campaign:
    """Cases of all targets in turn, a few at a time.

    Args:
        targets: what is damaged.
        folder: where inputs are written; those of faults go to ``keep``.
        jobs: cases at a time.
    """

    def __init__(self, targets: list[Target], folder: Path, keep: Path, jobs: int) -> None:
        self.targets, self.folder, self.keep, self.jobs = targets, folder, keep, jobs
        self.counts: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
        self.faults: list[tuple[str, str, Verdict]] = []
        self.usual = {target.name: self._fingerprint(target) for target in targets}

    def _fingerprint(self, target: Target) -> str:
        """What comes of the undamaged input."""
        place = self.folder / f"intact {target.name}"
        place.mkdir()
        target.intact(place)
        verdict = in_process(lambda: target.use(place), 1 << 30)
        if verdict.kind != "loaded":
            raise RuntimeError(f"the undamaged {target.name} is {verdict.kind}: {verdict.text}")
        return verdict.fingerprint

    def run(self, seed: int, *, cases: int | None, seconds: float | None) -> None:
        """Try so many cases, or as many as fit the time. A case depends on the seed and its number alone."""
        begun, number = time.monotonic(), 0
        running: list[Running] = []
        while running or self._more(number, cases, begun, seconds):
            while len(running) < self.jobs and self._more(number, cases, begun, seconds):
                running.append(self._start(seed, number))
                number += 1
            for one in list(running):
                verdict = finish(one, wait=0.02)
                if verdict is not None:
                    running.remove(one)
                    self._judge(one.case, verdict)

    @staticmethod
    def _more(number: int, cases: int | None, begun: float, seconds: float | None) -> bool:
        if cases is not None:
            return number < cases
        return seconds is not None and time.monotonic() - begun < seconds

    def _start(self, seed: int, number: int) -> Running:
        target = self.targets[number % len(self.targets)]
        place = self.folder / f"{number}"
        place.mkdir()
        said = target.damage(place, random.Random(f"{seed} {number}"))
        size = sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())
        return start((target, place, said), lambda: target.use(place), size)

    def _judge(self, case: tuple[Any, ...], verdict: Verdict) -> None:
        target, place, said = case
        kind = verdict.kind
        if kind == "loaded":
            same = verdict.fingerprint == self.usual[target.name]
            free = target.any_content or "free: " in said
            kind = "same" if same else "otherwise, by right" if free else "otherwise"
        self.counts[target.name][kind] += 1
        if kind in FAULTS:
            self.faults.append((target.name, said, verdict))
            self.keep.mkdir(parents=True, exist_ok=True)
            kept = self.keep / f"{target.name} {place.name}".replace(" ", "_")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept, symlinks=True)
            (kept / "what_happened.txt").write_text(f"{said}\n{kind}\n{verdict.text}\n")
        shutil.rmtree(place, ignore_errors=True)


@click.command(help=__doc__)
@click.option("--minutes", type=float, help="How long to go on.")
@click.option("--cases", type=int, help="How many to try instead.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(sorted(TARGETS)), help="Repeatable; default: all.")
@click.option("--keep", type=click.Path(path_type=Path), default=Path("faults"), show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Cases at a time.")
def main(
    minutes: float | None, cases: int | None, seed: int, only: tuple[str, ...], keep: Path, jobs: int
) -> None:
    console = Console(highlight=False)
    if (minutes is None) == (cases is None):
        raise click.UsageError("say --minutes or --cases")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bases").mkdir()
        bases = Bases(Path(folder) / "bases")
        targets = [TARGETS[name](bases) for name in only or TARGETS]
        campaign = Campaign(targets, Path(folder), keep, jobs)
        begun = time.monotonic()
        campaign.run(seed, cases=cases, seconds=None if minutes is None else 60 * minutes)
    report(console, campaign, time.monotonic() - begun)
    sys.exit(bool(campaign.faults))


def report(console: Console, campaign: Campaign, seconds: float) -> None:
    """One row a target; faults with their first line."""
    kinds = ("refused", "same", "otherwise, by right")
    table = Table("input", "tried", *kinds, "faults")
    for name, counts in campaign.counts.items():
        faults = sum(counts[kind] for kind in FAULTS)
        table.add_row(name, str(counts.total()), *(str(counts[kind]) for kind in kinds), str(faults))
    console.print(table)
    total = sum(counts.total() for counts in campaign.counts.values())
    console.print(f"{total} cases in {seconds:.0f} s, {len(campaign.faults)} faults")
    for name, said, verdict in campaign.faults[:40]:
        kind = "otherwise" if verdict.kind == "loaded" else verdict.kind
        console.print(
            f"{name}: {said}: {kind}: {verdict.text.splitlines()[0] if verdict.text else ''}", markup=False
        )


if __name__ == "__main__":
    main()
