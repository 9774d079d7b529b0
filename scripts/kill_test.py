#!/usr/bin/env python3
"""Kill linert with `kill -9` at random moments, start it again, and check that nothing is lost, half-written or left over.

    python scripts/kill_test.py --kills 200 --seed 1
    python scripts/kill_test.py --kills 20 --command export --whole
    python scripts/kill_test.py --kills 20 --command run --at operation

A third of the kills come at a random moment, a third at a random operation on a file (found by Python's audit events, so
that every gap between two of them is hit), and a third while SIGTERM is being obeyed. After each kill nothing may stand
half-written under its name. After a few, a start is let through to its end: nothing may be there but what an undisturbed
run writes, and everything must be equal to that bit for bit. The exit code is 1 where anything did not hold.

A start in three replaces folders in two steps, as on systems that cannot exchange them in one. Processes are forked from
one that has imported everything. What takes long and writes nothing, tracing and TensorRT's own work, is done once and
remembered; `--whole` does it every time. A model is made of random numbers for the purpose.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Forking is safe where there is one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import click
from kill_processes import (
    Patch,
    Place,
    Started,
    linert,
    living,
    make_bundle,
    remembered_plans,
    remembered_stages,
    steady_previews,
)
from kill_scenes import SCENES, Scene
from rich.console import Console
from rich.table import Table

from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.cli import COMMANDS, INTERRUPTED

MOMENT, OPERATION, ENDING = "moment", "operation", "ending"
WAYS = (MOMENT, OPERATION, ENDING)
IN_A_ROW = 4
"""Most kills before a start is let through to its end."""


@dataclass
class Tally:
    """What became of the kills of one command."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    finished: int = 0
    half_written: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    outlived: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        return [*self.half_written, *self.stray, *self.changed, *self.outlived, *self.failed]


def campaign(
    scene: Scene, kills: int, ways: Sequence[str], rng: random.Random, progress: Callable[[int], object]
) -> Tally:
    """Kill a command so many times, in these ways."""
    tally = Tally()
    begun = time.perf_counter()
    seconds, operations = scene.learn()
    scene.reset()
    in_a_row = 0
    while sum(tally.kills.values()) < kills or in_a_row:
        through = in_a_row >= IN_A_ROW or sum(tally.kills.values()) >= kills
        before = set(scene.files()) | {path.name for path in scene.work.iterdir()}
        unfinished, arguments = scene.unfinished(), [scene.command, *scene.arguments(rng)]
        two_steps = rng.random() < 1 / 3
        if through:
            code = Started(scene.place, arguments, two_steps=two_steps).wait()
        else:
            way = rng.choice(ways)
            kill_at = rng.randint(1, operations) if way == OPERATION else None
            process = Started(scene.place, arguments, kill_at=kill_at, two_steps=two_steps)
            kinds = (signal.SIGTERM, signal.SIGKILL) if way == ENDING else (signal.SIGKILL,)
            code = process.wait() if way == OPERATION else process.kill_after(rng.random() * seconds, kinds)
        if outlived := living(scene.place.root):
            tally.outlived += outlived
        # Before it listens to signals the first one kills it.
        if code in (-signal.SIGKILL, -signal.SIGTERM, INTERRUPTED) and not through:
            if code == INTERRUPTED and not unfinished:
                # It had obeyed before it was killed.
                tally.stray += [f"{scene.command} interrupted: {name}" for name in scene.unfinished()]
            tally.kills[way] += 1
            in_a_row += 1
            faults = [f"{scene.command} killed ({way}): {fault}" for fault in scene.left(before)]
            tally.half_written += faults
            progress(sum(tally.kills.values()))
            continue
        if code != 0:
            tally.failed.append(
                f"{' '.join(arguments)} exited with {code}: {scene.place.log.read_text()[-500:]}"
            )
        tally.finished += 1
        in_a_row = 0
        tally.stray += [f"{scene.command}: {name}" for name in scene.strays()]
        tally.changed += [f"{scene.command}: {name}" for name in scene.changes()]
        if tally.faults or rng.random() < 0.7:
            scene.reset()
    tally.seconds = time.perf_counter() - begun
    return tally


@click.command(help=__doc__)
@click.option("--kills", default=20, show_default=True, help="Of each command.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--command", "commands", multiple=True, type=click.Choice(list(SCENES)), help="Repeatable. Default: all."
)
@click.option(
    "--bundle", "bundle_path", type=click.Path(path_type=Path), help="Draw, build and export this one."
)
@click.option(
    "--at",
    "ways",
    multiple=True,
    type=click.Choice(WAYS),
    help="Kill at these alone; operations are the same every time.",
)
@click.option("--whole", is_flag=True, help="Trace and build every time.")
def command(
    kills: int,
    seed: int,
    commands: tuple[str, ...],
    bundle_path: Path | None,
    ways: tuple[str, ...],
    whole: bool,
) -> None:
    console = Console(highlight=False)
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="linert-kills") as name:
        folder = Path(name).resolve()
        bundle = open_bundle(bundle_path.resolve()) if bundle_path else make_bundle(folder)
        for chosen in commands or SCENES:
            importlib.import_module(COMMANDS[chosen][0])
            patches: list[Patch] = []
            if chosen == "run":
                patches.append(steady_previews)
            if chosen == "export":
                # Modules on the meta device import it, which takes longer than all else.
                importlib.import_module("torch._dynamo")
                if not whole:
                    patches.append(lambda: remembered_stages(bundle))
            if chosen == "build" and not whole:
                built = Bundle(folder / "built", bundle.manifest)
                shutil.copytree(bundle.path, built.path)
                linert("build", built.path, "--target", "rtx", "--sm", "89")
                patches.append(lambda built=built: remembered_plans(built))

            def patch(patches: Sequence[Patch] = patches) -> None:
                for change in patches:
                    change()

            scene = SCENES[chosen](Place(folder / chosen, patch), bundle)
            with console.status(f"killing {chosen}") as status:
                tallies[chosen] = campaign(
                    scene,
                    kills,
                    ways or WAYS,
                    random.Random(f"{seed} {chosen}"),
                    lambda done, chosen=chosen: status.update(f"killing {chosen}: {done} of {kills}"),
                )
    report(console, tallies)
    if any(tally.faults for tally in tallies.values()):
        sys.exit(1)


def report(console: Console, tallies: dict[str, Tally]) -> None:
    """One table, a column a command, and what did not hold."""
    table = Table("", *tallies, box=None, padding=(0, 2, 0, 0))
    rows: dict[str, Callable[[Tally], int]] = {
        "kills": lambda tally: sum(tally.kills.values()),
        **{f"  at a random {way}": lambda tally, way=way: tally.kills[way] for way in (MOMENT, OPERATION)},
        "  while it cleaned up": lambda tally: tally.kills[ENDING],
        "starts let through": lambda tally: tally.finished,
        "half-written": lambda tally: len(tally.half_written),
        "left over": lambda tally: len(tally.stray),
        "not identical": lambda tally: len(tally.changed),
        "processes that lived on": lambda tally: len(tally.outlived),
        "starts that failed": lambda tally: len(tally.failed),
        "seconds": lambda tally: round(tally.seconds),
    }
    for name, value in rows.items():
        table.add_row(name, *(str(value(tally)) for tally in tallies.values()))
    console.print(table)
    for tally in tallies.values():
        for kind in (tally.half_written, tally.stray, tally.changed, tally.outlived, tally.failed):
            for fault in kind[:8]:
                console.print(fault, style="red", markup=False, soft_wrap=True)


if __name__ == "__main__":
    command()
