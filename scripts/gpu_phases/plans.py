"""Phase plans: the demos exported, built, validated and timed with every TensorRT that is installed. Needs the exporter."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_phases.outcome import Check, NotRunError, Outcome, Recorder
from gpu_phases.place import ROOT, Place
from linert.runtime.backends.options import BackendName
from linert.runtime.backends.trt_flavour import FLAVOURS
from linert.runtime.errors import LinertError

DEMO = ROOT / "demo"
DEMOS: dict[str, tuple[object, ...]] = {
    "the demo": (DEMO / "c2i_demo.pt", "--grid", 16, "--heads", 4, "--budget-lines", 4),
    "the LASADGen demo": (DEMO / "lasadgen_demo",),
    "the LPD demo": (DEMO / "lpd_demo.pth", "--heads", 4),
}
"""Checkpoints and what their export is told."""


def checks(place: Place, recorder: Recorder) -> Iterator[tuple[str, Check]]:
    """Every TensorRT, precision and demo."""
    for flavour in FLAVOURS:
        for precision in ("fp32", "fp16"):
            for what, options in DEMOS.items():
                yield (
                    f"{flavour}: {what} in {precision}",
                    lambda flavour=flavour, precision=precision, options=options: parity(
                        place, BackendName(flavour), precision, options
                    ),
                )


def parity(place: Place, backend: BackendName, precision: str, options: Sequence[object]) -> Outcome:
    """Export, build for the GPU at hand, validate stage by stage, measure."""
    if place.rehearsal:
        raise NotRunError("plans run on a GPU alone")
    try:
        FLAVOURS[backend].load()
    except LinertError as error:
        raise NotRunError(str(error)) from error
    # Raises where there is no device.
    place.device.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        linert(
            *("export", *options, "--vq", DEMO / "vq_demo.pt"),
            *("--guidance", 3, "--batch", 4, "--precision", precision),
            *("--activations", precision, "--image-decoder-precision", precision, "--out", bundle),
        )
        linert("build", bundle, "--target", backend, "--sm", "current")
        told = linert("validate", bundle, "--backend", backend, "--stages", "--json", may_fail=True)
        timed = linert("bench", bundle, "--backend", backend, "--rounds", 2, "--images", 1, "--json")
        graphs = json.loads(linert("inspect", bundle, "--graphs", backend, "--json"))["graphs"]
    report, figures = json.loads(told), json.loads(timed.strip().splitlines()[-1])
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    unasked = sum(len(graph["unasked"]) for graph in graphs)
    text = (
        f"logits {report['logits']['max_abs']:.1e}, pixels {report['pixels_psnr'] or float('inf'):.0f} dB; "
        f"{figures['decode_ms']:.3f} ms a step; {unasked} copies by TensorRT itself"
    )
    results = {"checks": report["checks"], "bench": figures, "graphs": graphs}
    return Outcome("", "failed" if failed else "passed", "; ".join([text, *failed]), results)


def linert(*arguments: object, may_fail: bool = False) -> str:
    """Standard output of the command.

    Raises:
        RuntimeError: it failed; the message is its own. ``may_fail`` allows exit code 1.
    """
    command = [sys.executable, "-c", "from linert.runtime.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode not in ((0, 1) if may_fail else (0,)):
        raise RuntimeError(done.stderr.strip()[-2000:] or done.stdout[-2000:])
    return done.stdout
