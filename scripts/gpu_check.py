"""Check linert on a machine with a GPU: kernels, backends, parity with PyTorch, speed. One command, one JSON, one table.

    python scripts/gpu_check.py --out gpu_check.json
    python scripts/gpu_check.py --only kernels --out gpu_check.json     # torch, triton and cuda-bindings are enough

What cannot be run here is listed with the reason. The exit code is 1 when something that ran failed.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from gpu_kernels import Check, NotRunError, Outcome, kernel_checks
from rich.console import Console
from rich.table import Table

from runtime.backends import BackendName
from runtime.cuda import Device
from runtime.errors import LinertError
from runtime.trt_flavour import FLAVOURS

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "backends", "bench")
DEMO = ROOT / "demo"
DEMOS: dict[str, tuple[object, ...]] = {
    "the demo": (DEMO / "c2i_demo.pt", "--grid", 16, "--heads", 4, "--budget-lines", 4),
    "the LASADGen demo": (DEMO / "lasadgen_demo",),
}
"""Checkpoints and what their export is told."""

PUBLISHED = {
    "full cache": (64.75, 331.52, 0.77),
    "6 lines": (25.51, 63.99, 4.00),
    "4 lines": (20.97, 43.78, 5.85),
}
"""LineAR (arXiv 2512.04857) on LlamaGen-XL at 384 px, batch 256, bf16: GB, seconds a batch, images a second."""

PACKAGES = (
    "torch",
    "triton",
    "cuda-bindings",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "onnxruntime",
    "onnxruntime-gpu",
)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON with everything measured.")
@click.option(
    "--only", multiple=True, type=click.Choice(PARTS), help="Leave the other parts out. Repeatable."
)
@click.option("--size", default="XL", show_default=True, help="LlamaGen size of the bench.")
@click.option("--batches", default="1,8,64,256", show_default=True, help="Images a batch, each guided.")
@click.option("--lines", default="4,6,24", show_default=True, help="Lines of cache, of 24.")
@click.option("--rounds", default=3, show_default=True, help="Lines of decode steps that are timed.")
def main(out: Path, only: tuple[str, ...], size: str, batches: str, lines: str, rounds: int) -> None:
    console = Console(highlight=False)
    wanted = only or PARTS
    try:
        device: Device | None = Device()
        reason = ""
    except LinertError as error:
        device, reason = None, str(error)
    machine = machine_of(device)
    console.print(f"device: {machine['device'] or reason}")
    checks: list[tuple[str, Check]] = []
    if "kernels" in wanted:
        checks += kernel_checks(device)
    if "backends" in wanted:
        checks += backend_checks()
    if "bench" in wanted:
        numbers = [[int(part) for part in text.split(",")] for text in (batches, lines)]
        checks += bench_checks(size, *numbers, rounds)
    outcomes = []
    for name, check in checks:
        outcomes.append(run(name, check, reason))
        done = outcomes[-1]
        if done.status != "not run":
            console.print(f"{done.status:9} {name}: {done.text}")
        out.write_text(json.dumps({"machine": machine, "checks": [asdict(o) for o in outcomes]}, indent=1))
    summary(console, outcomes)
    console.print(f"everything measured: {out}")
    if any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


def run(name: str, check: Check, no_device: str) -> Outcome:
    """Run one check; whatever it raises is its outcome."""
    if no_device:
        return Outcome(name, "not run", no_device)
    begun = time.perf_counter()
    try:
        outcome = check()
    except NotRunError as reason:
        outcome = Outcome(name, "not run", str(reason))
    except Exception as error:
        outcome = Outcome(name, "failed", f"{type(error).__name__}: {error}")
        outcome.figures["traceback"] = traceback.format_exc()
    outcome.seconds = time.perf_counter() - begun
    return outcome


def machine_of(device: Device | None) -> dict[str, Any]:
    """The GPU and the packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found = {"device": None, "capability": None, "copy_bandwidth": None, "packages": versions}
    if device is not None:
        found |= {
            "device": device.name,
            "capability": device.capability,
            "copy_bandwidth": device.copy_bandwidth(),
        }
    return found


def backend_checks() -> Iterator[tuple[str, Check]]:
    """Every backend on the demo, against PyTorch and stage by stage against the CPU."""
    for backend in list(BackendName)[1:]:
        for precision in ("fp32", "fp16"):
            for what, options in DEMOS.items():
                name = f"{backend}: {what} in {precision}"
                yield (
                    name,
                    lambda name=name, backend=backend, precision=precision, options=options: parity(
                        name, backend, precision, options
                    ),
                )


def parity(name: str, backend: BackendName, precision: str, options: Sequence[object]) -> Outcome:
    """Export, build, validate; its numbers."""
    available(backend)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        linert(
            *("export", *options, "--vq", DEMO / "vq_demo.pt"),
            *("--guidance", 3, "--batch", 4, "--precision", precision),
            *("--activations", precision, "--image-decoder-precision", precision, "--out", bundle),
        )
        build_plans(backend, bundle)
        done = linert("validate", bundle, "--backend", backend, "--stages", "--json", may_fail=True)
        report = json.loads(done)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    text = f"logits {report['logits']['max_abs']:.1e}, pixels {report['pixels_psnr'] or float('inf'):.0f} dB"
    status = "failed" if failed else "passed"
    return Outcome(name, status, "; ".join([text, *failed]), {"checks": report["checks"]})


def bench_checks(
    size: str, batches: Sequence[int], lines: Sequence[int], rounds: int
) -> Iterator[tuple[str, Check]]:
    """Decode of random weights of a published size, in fp16, on every backend."""
    for batch in batches:
        for kept in lines:
            for backend in list(BackendName)[1:]:
                name = f"{backend}: {size} 384 px, batch {batch}, {kept} lines"
                yield (
                    name,
                    lambda name=name, backend=backend, batch=batch, kept=kept: bench(
                        name, backend, size, batch, kept, rounds
                    ),
                )


def bench(name: str, backend: BackendName, size: str, batch: int, lines: int, rounds: int) -> Outcome:
    """Export, build, measure."""
    available(backend)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for options, file in ((("--size", size), "model.pt"), (("--vq", "16"), "vq.pt")):
            script([ROOT / "scripts" / "random_checkpoint.py", *options, "--out", here / file])
        policy = ("--policy", "full") if lines == 24 else ("--policy", "linear", "--budget-lines", lines)
        linert(
            *("export", here / "model.pt", "--vq", here / "vq.pt", "--grid", 24, "--guidance", 4, *policy),
            *("--batch", batch, "--precision", "fp16", "--activations", "fp16"),
            *("--image-decoder-precision", "fp16", "--out", here / "bundle"),
        )
        build_plans(backend, here / "bundle")
        found = linert(
            *("bench", here / "bundle", "--backend", backend, "--rounds", rounds, "--images", 1, "--json")
        )
        figures = json.loads(found.strip().splitlines()[-1])
    text = (
        f"{figures['decode_ms']:.2f} ms a step, {figures['decode_over_limit']:.2f} x the limit; "
        f"{figures['tokens_per_second']:.0f} tokens/s, {figures['images_per_second']:.2f} images/s; state "
        f"{figures['state_bytes'] / 1e9:.2f} GB"
    )
    published = PUBLISHED.get("full cache" if lines == 24 else f"{lines} lines")
    if published and (size, batch) == ("XL", 256):
        text += f" (published, PyTorch in bf16: {published[2]:.2f} images/s in {published[0]:.1f} GB)"
    return Outcome(name, "measured", text, figures)


def available(backend: BackendName) -> None:
    """Raise :class:`NotRunError` where a backend is not installed here."""
    if backend in FLAVOURS:
        try:
            FLAVOURS[backend].load()
        except LinertError as error:
            raise NotRunError(str(error)) from error
        return
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise NotRunError("this ONNX Runtime has no CUDA: pip install 'linert[cuda]'")


def build_plans(backend: BackendName, bundle: Path) -> None:
    """Plans for the GPU at hand, for a backend that needs them."""
    if backend in FLAVOURS:
        linert("build", bundle, "--target", backend, "--sm", "current")


def linert(*arguments: object, may_fail: bool = False) -> str:
    """Standard output of the command.

    Raises:
        RuntimeError: it failed; the message is its own. ``may_fail`` allows exit code 1.
    """
    return script(["-c", "from runtime.cli import main; main()", *arguments], may_fail=may_fail)


def script(arguments: Sequence[object], *, may_fail: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode not in ((0, 1) if may_fail else (0,)):
        raise RuntimeError(done.stderr.strip()[-2000:] or done.stdout[-2000:])
    return done.stdout


def summary(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Everything in a table, and what was not run by its reasons."""
    table = Table("check", "", "result", title="GPU check", title_justify="left")
    for outcome in outcomes:
        if outcome.status != "not run":
            table.add_row(outcome.name, outcome.status, outcome.text)
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "not run":
            reasons.setdefault(outcome.text, []).append(outcome.name)
    for reason, names in reasons.items():
        console.print(f"not run ({reason}):")
        for name in names:
            console.print(f"  {name}")


if __name__ == "__main__":
    main()
