"""The ONNX Runtime backend: state stays where it is, and needs no torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import scipy.stats
from packaging.requirements import Requirement

from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.drawing.loop import Batch, begin, generate  # noqa: F401 (begin: used by a script below)
from linert.runtime.drawing.noise import Noise, noise_rows
from tests.conftest import ROOT

STAGES = ["prefill", "decode", "decode.unfiltered", "line_end.leverage"]


def tiny_batch(backend: OrtBackend, seed: int = 0) -> Batch:
    manifest = backend.bundle.manifest
    seeds = range(seed, seed + manifest.images)
    noise = Noise(seeds, *manifest.noise_shape)
    return Batch({"class_ids": np.arange(manifest.images)}, noise, manifest.sampling, manifest.cache)


def test_state_stays_where_it_is(tiny_bundle: Path) -> None:
    backend = OrtBackend(open_bundle(tiny_bundle), STAGES)
    states = [spec.name for spec in backend.bundle.manifest.state]
    before = {name: backend.array(name).ctypes.data for name in states}
    generate(backend, tiny_batch(backend))
    generate(backend, tiny_batch(backend, seed=9))
    for name in states:
        assert backend.array(name).ctypes.data == before[name]
    for stage in ("decode.unfiltered",):
        binding = {value.data_ptr() for value in backend._bindings[stage][1].get_outputs()}
        in_place = backend.bundle.manifest.stages[stage].in_place
        assert {before[name] for name in in_place} <= binding


def test_the_caches_are_written_in_place(tiny_bundle: Path) -> None:
    """ONNX Runtime says so, once a cache, when it has to copy one."""
    script = f"""
import onnxruntime, linert.runtime.backends.ort
options = onnxruntime.SessionOptions
class Talkative(options):
    log_severity_level = property(options.log_severity_level.fget, lambda self, level: None)
onnxruntime.SessionOptions = Talkative
onnxruntime.set_default_logger_severity(2)
from tests.runtime.test_ort import OrtBackend, STAGES, begin, generate, open_bundle, tiny_batch
backend = OrtBackend(open_bundle({str(tiny_bundle)!r}), STAGES)
generate(backend, tiny_batch(backend))
if BREAK:
    begin(backend, tiny_batch(backend))
    session, _ = backend._bindings["decode.unfiltered"]
    session.run(None, {{i.name: backend.array(i.name) for i in session.get_inputs()}})
"""
    for broken in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("BREAK", str(broken))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("in-place optimization not activated" in done.stderr) is broken


NOISE_OF_SEVEN = [7.3055825, 0.8199799, 1.153046]


def test_noise_depends_on_the_seed_and_the_place_alone() -> None:
    rows = noise_rows(123, 1000, 65)
    assert (rows == noise_rows(123, 2000, 65)[:1000]).all()
    for first in (1, 2, 3, 4, 501):
        assert (rows[first:] == noise_rows(123, 1000 - first, 65, first)).all()
    assert (rows != noise_rows(124, 1000, 65)).all()
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    assert rows.min() > 0
    # Of one seed on every machine.
    np.testing.assert_allclose(noise_rows(7, 1, 3)[0], NOISE_OF_SEVEN, rtol=1e-6)
    assert scipy.stats.kstest((1 / rows.astype(np.float64)).ravel(), "expon").pvalue > 1e-3


def runtime_only_site(folder: Path) -> Path:
    """A site-packages folder with linert's run-time requirements and nothing else."""
    site = folder / "site"
    site.mkdir()
    wanted, seen = ["linert[cpu]"], set()
    while wanted:
        requirement = Requirement(wanted.pop())
        if requirement.name in seen:
            continue
        seen.add(requirement.name)
        distribution = metadata.distribution(requirement.name)
        extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                wanted.append(text)
        if requirement.name != "linert":
            for part in {
                file.parts[0]
                for file in distribution.files or []
                if file.parts[0] not in ("..", "__pycache__")
            }:
                target = site / part
                if not target.exists():
                    target.symlink_to(Path(str(distribution.locate_file(part))))
    assert not (site / "torch").exists()
    assert not (site / "onnx").exists()
    return site


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    commands = "linert.runtime.commands.run, linert.runtime.commands.bench, linert.runtime.commands.render"
    script = f"import linert, linert.runtime.cli, {commands}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Not even the runtimes: each is imported by the backend that is asked for.
    heavy = {"torch", "onnx", "onnxruntime", "cuda", "tensorrt_rtx", "linert.exporter", "linert.graphs"}
    assert not heavy & set(done.stdout.split())


def test_running_needs_no_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    site = runtime_only_site(tmp_path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "linert").symlink_to(ROOT / "linert")
    script = "from linert.runtime.cli import main; main()"

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # -S and -I: nothing of this environment's own site-packages.
            [
                sys.executable,
                "-S",
                "-I",
                "-c",
                f"import sys; sys.path[:0] = {[str(package), str(site)]}\n{script}",
                *map(str, arguments),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    done = call("run", tiny_bundle, "--classes", "1,2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("class_*.png"))) == 2
    assert call("inspect", tiny_bundle).returncode == 0
    assert call("--help").returncode == 0
    refused = call("validate", tiny_bundle)
    assert refused.returncode == 2, refused.stderr
    assert "pip install" in refused.stderr
