#!/usr/bin/env python3
"""Measure peak memory and time of an export against the size of its checkpoint.

    python scripts/bench_export.py --size XL

The peak is what the operating system counted for the exporting process, mapped file pages included. The bound is
1.5 x the checkpoint plus 2 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from random_checkpoint import SIZES

HERE = Path(__file__).parent


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="XL", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put the temporary files.")
def main(size: str, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        checkpoint, vq = here / f"random_{size}_384.pt", here / "vq.pt"
        make = [sys.executable, str(HERE / "random_checkpoint.py")]
        for options in (["--size", size, "--out", str(checkpoint)], ["--vq", "16", "--out", str(vq)]):
            subprocess.run([*make, *options], check=True)
        command = [sys.executable, "-c", "from runtime.cli import main; main()", "export", str(checkpoint)]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--vq", str(vq), "--out", str(here / "bundle")])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise click.ClickException("the export failed")
        peak = usage.ru_maxrss * 1024
        bytes_ = checkpoint.stat().st_size + vq.stat().st_size
        bound = 1.5 * bytes_ + 2e9
        result = {
            "size": size,
            "checkpoint_gb": round(bytes_ / 1e9, 2),
            "peak_gb": round(peak / 1e9, 2),
            "bound_gb": round(bound / 1e9, 2),
            "within": peak <= bound,
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
