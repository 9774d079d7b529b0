#!/usr/bin/env python3
"""Measure peak memory and time of an export against the size of its checkpoint.

    python scripts/bench_export.py --size XL
    python scripts/bench_export.py --model Lumina-mGPT-7B-768 --precision int4

The peak is what the operating system counted for the exporting process, mapped file pages included; what is not a mapped file is
sampled ten times a second beside it. The bound is 1.5 x the checkpoint plus 2 GB for LlamaGen, 1.2 x plus 3 GB for the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
from random_checkpoint import SIZES
from random_folder import JANUS, LUMINA

HERE = Path(__file__).parent


def anonymous_bytes(process: int) -> int:
    """Memory of a process that is no mapped file; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def make_checkpoint(size: str | None, model: str | None, folder: Path) -> tuple[list[str], int]:
    """Write random weights; what to say to the exporter, and their bytes."""
    if model is not None:
        out = folder / model
        subprocess.run(
            [sys.executable, str(HERE / "random_folder.py"), "--model", model, "--out", str(out)], check=True
        )
        tokenizer = ["--vq", str(out / "vqgan.ckpt")] if model in LUMINA else []
        return [str(out), *tokenizer], sum(path.stat().st_size for path in out.iterdir())
    checkpoint, vq = folder / f"random_{size}_384.pt", folder / "vq.pt"
    make = [sys.executable, str(HERE / "random_checkpoint.py")]
    for options in (["--size", str(size), "--out", str(checkpoint)], ["--vq", "16", "--out", str(vq)]):
        subprocess.run([*make, *options], check=True)
    return [str(checkpoint), "--vq", str(vq)], checkpoint.stat().st_size + vq.stat().st_size


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), help="A LlamaGen of this size. Default: XL.")
@click.option("--model", type=click.Choice([*JANUS, *LUMINA]), help="Or a text-to-image model's.")
@click.option("--precision", default="fp32", show_default=True, help="Of the export; integers are rounded.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put the temporary files.")
def main(size: str | None, model: str | None, precision: str, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        arguments, bytes_ = make_checkpoint(size or "XL", model, Path(name))
        # Calibration would measure PyTorch.
        plain = [
            "--quantization",
            "rtn",
            "--image-decoder-precision",
            "fp32" if precision == "fp32" else "fp16",
        ]
        command = [
            sys.executable,
            "-c",
            "from linert.runtime.cli import main; main()",
            "export",
            *arguments,
            *plain,
        ]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--precision", precision, "--out", str(Path(name) / "bundle")])
        anonymous = [0]
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.1):
                anonymous.append(anonymous_bytes(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        done.set()
        sampler.join()
        if status:
            raise click.ClickException("the export failed")
        peak = usage.ru_maxrss * 1024
        bound = 1.2 * bytes_ + 3e9 if model else 1.5 * bytes_ + 2e9
        result = {
            "model": model or f"LlamaGen-{size or 'XL'}",
            "precision": precision,
            "checkpoint_gb": round(bytes_ / 1e9, 2),
            "peak_gb": round(peak / 1e9, 2),
            "not_mapped_gb": round(max(anonymous) / 1e9, 2),
            "bound_gb": round(bound / 1e9, 2),
            "within": peak <= bound,
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
