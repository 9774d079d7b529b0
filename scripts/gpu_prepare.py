"""Make on the CPU what scripts/gpu_check.py takes to a machine with a GPU and no network, where nothing can be exported or compiled.

    python scripts/gpu_prepare.py --out carried

Kernels are compiled by the Triton that is installed here; what they must compute comes from PyTorch; bundles travel without
their weights, which scripts/random_weights.py makes on the spot.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Kernels are compiled here, not interpreted; Triton asks once, when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import click
from gpu_phases import cases, speeds
from gpu_phases.bundles import make_demo, make_stand_in, make_xl
from gpu_phases.making import all_cases, all_speeds
from gpu_phases.onnxruntime import DEMOS
from rich.console import Console

CAPABILITIES = "90"
PARTS = ("cases", "speeds", "demos", "xl")


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make or to add to.")
@click.option("--sm", default=CAPABILITIES, show_default=True, help="Compute capabilities, as in 80,90.")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Repeatable; default: all.")
@click.option("--few", is_flag=True, help="The least of everything, to rehearse with.")
def main(out: Path, sm: str, parts: Sequence[str], few: bool) -> None:
    console = Console(highlight=False)
    capabilities = [int(number) for number in sm.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    for part in parts or PARTS:
        if part == "cases":
            cases.write_carried(out / cases.FILE, list(all_cases(capabilities, few=few)))
        elif part == "speeds":
            cases.write_carried(out / speeds.FILE, list(all_speeds(capabilities, few=few)))
        elif part == "demos":
            if few:
                make_demo(out, DEMOS[0], windows="1")
            else:
                for name in DEMOS:
                    make_demo(out, name)
        elif few:
            make_stand_in(out)
        else:
            make_xl(out, console.print)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
