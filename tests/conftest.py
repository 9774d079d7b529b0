"""Checkpoints and bundles on the smallest models that can show a fact."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

if hasattr(os, "sched_setaffinity") and "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker: threads that share the cores with those of other workers wait for one another.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_cores)]})

import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # Kernels are interpreted; triton asks once, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from linert.exporter import onnx_export
from linert.exporter.lpd_file import published_tensors
from linert.graphs.families import llamagen, lpd, vq
from linert.runtime.bundles.cache_settings import Aggregation, CacheSettings, HeadScores, Mode
from linert.runtime.cli import main
from tests.golden_weights import golden_state
from tests.traced_graphs import TraceStore

# Tracing makes millions of small objects: with the usual thresholds a tenth of the time goes into looking for cycles.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

ROOT = Path(__file__).parents[1]

onnx_export.trace = TraceStore(ROOT / ".pytest_cache" / "traces")


SLOW = (
    *(
        "test_ray",
        "test_build_bundles",
        "test_demo",
        "test_lumina_commands",
        "test_export",
        "test_parity",
        "test_gpu_check",
    ),
    *(
        "test_fuzz",
        "test_compare",
        "test_build",
        "test_precision",
        "test_janus_commands",
        "test_lasadgen_commands",
        "test_lpd_commands",
        "test_lpd_requests",
    ),
    *(
        "test_families",
        "test_stage_parity",
        "test_captions",
        "test_bench",
        "test_cache_choice",
        "test_plugin_launch",
    ),
    *(
        "test_line_attention_kernels",
        "test_kill",
        "test_generator",
        "test_traced_graphs",
        "test_line_evict_kernels",
    ),
    *("test_spatial_decay_kernels", "test_intervals", "test_quick_starts", "test_site"),
)
"""Files that take five seconds or longer, the longest first. In this order they begin, so that at the end no worker is left
alone with one. ``make check`` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in ranks:
            item.add_marker("slow")
    items.sort(key=lambda item: ranks.get(item.path.stem, len(SLOW)))


@dataclass
class Result:
    code: int
    out: str
    err: str


def run_linert(*arguments: object) -> Result:
    """Run the command as the shell would, but in this process: importing torch takes longer than most commands.

    Tests of interruption, of memory and of what is imported start processes of their own.
    """
    out, err = io.StringIO(), io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["linert", *map(str, arguments)]),
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as done:
        return Result(int(done.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, terminate)


@pytest.fixture(scope="session")
def linert() -> Callable[..., Result]:
    return run_linert


@pytest.fixture(autouse=True)
def _modules_of_one_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test wrote and imported is no module of the next one's, whatever its name."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The golden transformer and VQ tokenizer as published containers."""
    folder = tmp_path_factory.mktemp("golden")
    for name in ("c2i", "vq16"):
        torch.save({"model": golden_state(name)}, folder / f"{name}.pt")
    return folder / "c2i.pt", folder / "vq16.pt"


def random_state(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Unit-scale random weights for ``module``."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in module.named_parameters():
        tensor = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            tensor = 0.1 * tensor + float(name.endswith("weight"))
        elif "embed" not in name:
            tensor *= 2 * tensor[0].numel() ** -0.5
        state[name] = tensor
    return state


def cache_settings(**changed: Any) -> CacheSettings:
    """Linear, strict, two lines in both layers, one of them recent; or as ``changed``."""
    usual = CacheSettings(
        policy="linear",
        mode=Mode.STRICT,
        budget_lines=(2, 2),
        recent_lines=1,
        anchor_tokens=0,
        aggregation=Aggregation.MEAN,
        head_scores=HeadScores.OWN,
        share_guidance=False,
    )
    return msgspec.structs.replace(usual, **changed)


TINY = llamagen.LlamaGenConfig(layers=2, dim=32, heads=4, ffn_dim=64, vocab_size=64, num_classes=5, grid=6)
TINY_VQ = vq.VQConfig(codebook_size=64, code_dim=8, z_channels=32, channels=(32, 32), res_blocks=1)
TINY_LPD = lpd.LPDConfig(layers=2, dim=32, heads=4, ffn_dim=64, vocab_size=64, num_classes=5, grid=4)
TINY_GROUPS = ((1, 2, 4, 5, 4), (1, 7, 8))
"""Sizes of the groups of :func:`grouped_bundle`."""


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A transformer of 6 x 6 tokens and a tokenizer of patch 2."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.save({"model": random_state(llamagen.LlamaGen(TINY))}, folder / "model.pt")
    torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, folder / "vq.pt")
    return folder / "model.pt", folder / "vq.pt"


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export by the command; returns the bundle."""

    def make(model: Path, vq_file: Path, *options: object) -> Path:
        out = tmp_path_factory.mktemp("bundle") / "bundle"
        result = run_linert("export", model, "--vq", vq_file, "--out", out, *options)
        assert result.code == 0, result.err
        return out

    return make


@pytest.fixture(scope="session")
def tiny_bundle(export: Callable[..., Path], tiny_files: tuple[Path, Path]) -> Path:
    """Batch 2, guided, the default policy with 3 of 6 lines."""
    return export(*tiny_files, "--grid", 6, "--heads", 4, "--batch", 2, "--budget-lines", 3)


@pytest.fixture(scope="session")
def lpd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the trainer's: an LPD of 4 x 4 tokens, and what is left of its training."""
    path = tmp_path_factory.mktemp("lpd") / "lpd.pth"
    args = argparse.Namespace(model="lpd_tiny", lr=1e-4)
    state = published_tensors(random_state(lpd.LPD(TINY_LPD)))
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}, path)
    return path


@pytest.fixture(scope="session")
def grouped_bundle(export: Callable[..., Path], lpd_file: Path, tiny_files: tuple[Path, Path]) -> Path:
    """An LPD, batch 3, guided, drawn in 5 steps or in 3."""
    sizes = [option for sizes in TINY_GROUPS for option in ("--group-sizes", ",".join(map(str, sizes)))]
    return export(lpd_file, tiny_files[1], "--heads", 4, "--batch", 3, *sizes, "--repulsion", 1)


@pytest.fixture(scope="session")
def many_bundle(export: Callable[..., Path], tiny_files: tuple[Path, Path]) -> Path:
    """Batch 2, guided, every policy, a buffer of all 6 lines, 3 of them used by default with 2 anchor tokens."""
    return export(
        *tiny_files,
        *("--grid", 6, "--heads", 4, "--batch", 2, "--policy", "all", "--budget-lines", 3),
        *("--anchor-tokens", 2),
    )


@pytest.fixture(scope="session")
def windowed_bundle(export: Callable[..., Path], tiny_files: tuple[Path, Path]) -> Path:
    """Batch 2, guided, three policies with 3 of 6 lines by default, windows of 1, 2 and 4 positions."""
    return export(
        *tiny_files,
        *("--grid", 6, "--heads", 4, "--batch", 2, "--policy", "linear,h2o,full", "--budget-lines", 3),
        *("--window", "2,4"),
    )


@pytest.fixture(scope="session")
def planned_bundle(tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in float32 with every policy, batch 2, 3 of 6 lines, and plans of TensorRT for RTX (SM 80 and 89).

    All workers share one, which nobody may change.
    """
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("triton")
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    bundle, done = root / "planned" / "bundle", root / "planned.done"
    with FileLock(root / "planned.lock"):
        if not done.exists():
            options = ("--grid", 6, "--heads", 4, "--batch", 2, "--policy", "all", "--budget-lines", 3)
            for command in (
                ("export", tiny_files[0], "--vq", tiny_files[1], *options, "--out", bundle, "--force"),
                ("build", bundle, "--target", "rtx", "--sm", "80,89"),
            ):
                result = run_linert(*command)
                assert result.code == 0, result.err
            done.touch()
    return bundle
