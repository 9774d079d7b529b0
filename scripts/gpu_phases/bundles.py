"""Bundles that travel to a GPU machine: the demo whole, with what the CPU drew; LlamaGen-XL as graphs and manifests alone."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpu_phases.onnxruntime import CELLS, DEMO_CLASSES, DEMO_SEED, DEMOS, FOLDER, bundle_name
from gpu_phases.place import ROOT
from gpu_phases.plans import DEMO, linert
from gpu_phases.plans import DEMOS as PLANNED
from linert.runtime.drawing.generator import Generator

DEMO_IMAGES = 4
CHECKPOINTS = dict(zip(("demo", "lasadgen", "lpd"), PLANNED.values(), strict=True))
"""What an export is told of a demo's model."""

WINDOWS = "1,4,8"
WINDOWED = {(1, 4), (8, 4)}
"""Cells of LlamaGen-XL that have windows too."""


def make_demo(out: Path, name: str, windows: str = WINDOWS) -> None:
    """Export a demo with the weights that its name says; draw on the CPU; pack both."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        model, _, precision = name.rpartition("_")
        # Weights of four bits are not for image decoders.
        floats = "fp16" if precision == "int4" else precision
        linert(
            *("export", *CHECKPOINTS[model], "--vq", DEMO / "vq_demo.pt", "--batch", 2, "--guidance", 3),
            *(() if model == "lpd" else ("--window", windows)),
            *("--precision", precision, "--activations", floats),
            *("--image-decoder-precision", floats, "--out", bundle),
        )
        with Generator(bundle) as generator:
            images = generator.generate(DEMO_CLASSES, num_images=DEMO_IMAGES, seed=DEMO_SEED)
        np.save(Path(folder) / "tokens.npy", np.stack([image.tokens for image in images]))
        _pack(Path(folder), out / FOLDER / f"{name}.tar.xz", weights=True)


def make_stand_in(out: Path) -> None:
    """What the smallest cell of LlamaGen-XL is rehearsed with: the demo of float32 without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(out / FOLDER / f"{DEMOS[0]}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        _pack(Path(folder), out / FOLDER / f"{bundle_name(1, 4)}.tar.xz", weights=False)


def make_xl(out: Path, report: Callable[[str], None]) -> None:
    """Export every cell of LlamaGen-XL at 384 pixels in halves, with random weights that stay here."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = Path(folder) / "model.pt", Path(folder) / "vq.pt"
        for options, file in ((("--size", "XL"), model), (("--vq", "16"), tokenizer)):
            script = str(ROOT / "scripts" / "random_checkpoint.py")
            subprocess.run([sys.executable, script, *options, "--out", file], check=True, cwd=ROOT)
        for batch, lines in CELLS:
            name = bundle_name(batch, lines)
            if (out / FOLDER / f"{name}.tar.xz").exists():
                continue
            policy = ("--policy", "full") if lines == 24 else ("--policy", "linear", "--budget-lines", lines)
            windows = WINDOWS if (batch, lines) in WINDOWED else 1
            cell = Path(folder) / name
            cell.mkdir()
            linert(
                *("export", model, "--vq", tokenizer, "--grid", 24, "--guidance", 4, *policy),
                *("--batch", batch, "--precision", "fp16", "--activations", "fp16"),
                *("--window", windows, "--image-decoder-precision", "fp16", "--out", cell / "bundle"),
            )
            (cell / "bundle" / "weights.bin").unlink()
            _pack(cell, out / FOLDER / f"{name}.tar.xz", weights=False)
            report(name)


def _pack(folder: Path, target: Path, *, weights: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)

    def chosen(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.endswith("weights.bin") and not weights else member

    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w:xz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=chosen)
    partial.replace(target)
