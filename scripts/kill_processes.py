"""Processes to be killed: forked, so that what takes long to import is imported once, and killed at chosen moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.engines import read_engines
from linert.runtime.cli import main
from linert.runtime.files import replacement

WRITING = frozenset(
    ["os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "linert.exchange"]
)
"""Audit events of operations on files, besides opening them to write."""

Patch = Callable[[], None]
"""Changes to a started process, made before it begins."""


@dataclass(frozen=True)
class Place:
    """Where a command works: ``work`` is where it writes, ``scratch`` its temporary folder. ``patch``: of its processes."""

    root: Path
    patch: Patch

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def log(self) -> Path:
        """What the last start printed."""
        return self.root / "log"

    @property
    def count(self) -> Path:
        """How many operations on files the last start had when it came to its end."""
        return self.root / "count"


class Started:
    """A forked process that runs a command of linert.

    Args:
        place: where it works.
        arguments: the command and what comes after it.
        kill_at: the operation on files at which it kills itself; None for never.
        two_steps: replace folders as systems do that cannot exchange two.
    """

    def __init__(
        self, place: Place, arguments: Sequence[str], *, kill_at: int | None = None, two_steps: bool = False
    ) -> None:
        self.place = place
        sys.stdout.flush()
        sys.stderr.flush()
        self.number = os.fork()
        if self.number == 0:
            code = 99
            try:
                self._run(arguments, kill_at, two_steps)
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _run(self, arguments: Sequence[str], kill_at: int | None, two_steps: bool) -> None:
        log = os.open(self.place.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        # Python would try out the folder with a file of its own.
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.place.scratch)
        self.place.patch()
        if two_steps:
            replacement.exchange = announced
        counted = watch_operations(self.place.root, kill_at)
        sys.argv = ["linert", *arguments]
        try:
            main()
        finally:
            self.place.count.write_text(str(counted()))

    def wait(self) -> int:
        """Its exit code, the negative signal if one ended it."""
        _, status = os.waitpid(self.number, 0)
        return os.waitstatus_to_exitcode(status)

    def kill_after(self, seconds: float, kinds: Sequence[signal.Signals]) -> int:
        """Send it signals, a little apart; its exit code."""
        time.sleep(seconds)
        for kind in kinds:
            # Nobody has waited for it yet, so that the number is still its own.
            os.kill(self.number, kind)
            time.sleep(0 if kind is signal.SIGKILL else 0.003)
        return self.wait()


def watch_operations(root: Path, kill_at: int | None) -> Callable[[], int]:
    """Count this process's operations on files below ``root``, and kill it at one of them; what tells the count so far."""
    count = 0
    prefixes = (str(root / "work"), str(root / "scratch"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            writes = (
                any(letter in mode for letter in "wxa+")
                if mode
                else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if not writes:
                return
        elif event in WRITING:
            path = arguments[0]
        else:
            return
        # Trees are removed by names relative to an open folder.
        if isinstance(path, str | os.PathLike) and (
            str(path).startswith(prefixes) or not os.path.isabs(path)
        ):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def living(root: Path) -> list[str]:
    """Processes at work in a folder that go on after whoever started them."""
    deadline = time.monotonic() + 10
    while True:
        commands = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            # This process was itself given the folder perhaps.
            if str(root) in line and "build_stage" in line:
                commands.append(line)
        if not commands or time.monotonic() > deadline:
            return commands
        time.sleep(0.05)


def linert(*arguments: object) -> None:
    """Run the command in a process of its own.

    Raises:
        click.ClickException: it failed.
    """
    command = [sys.executable, "-c", "from linert.runtime.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"linert {arguments[0]} failed: {done.stderr}")


def make_bundle(folder: Path) -> Bundle:
    """Export a model of random numbers, small enough to be drawn in no time."""
    import torch
    from random_checkpoint import random_tensors

    from linert.graphs.families import llamagen, vq

    model = llamagen.LlamaGenConfig(
        layers=1, dim=16, heads=2, ffn_dim=32, vocab_size=32, num_classes=5, grid=4
    )
    tokenizer = vq.VQConfig(codebook_size=32, code_dim=8, z_channels=32, channels=(32, 32), res_blocks=1)
    for name, shapes in (("model", model.tensor_shapes()), ("vq", tokenizer.tensor_shapes(encoder=True))):
        torch.save({"model": random_tensors(shapes)}, folder / f"{name}.pt")
    options = ("--grid", 4, "--heads", 2, "--policy", "linear,full", "--batch", 2, "--budget-lines", 2)
    linert("export", folder / "model.pt", "--vq", folder / "vq.pt", *options, "--out", folder / "bundle")
    return open_bundle(folder / "bundle")


def remembered_stages(bundle: Bundle) -> None:
    """Take the stages of ``bundle`` where an export would trace them; their weights are written as usual."""
    import onnx
    import onnx_ir as ir
    import torch

    from linert.exporter import bundle_export

    data = bundle.file(bundle_export.WEIGHTS_NAME).read_bytes()

    def export_stage(stage: Any, weights: Any, tensors: Any, size: str = "") -> onnx.ModelProto:
        proto = onnx.load(bundle.file(f"{stage.name}{size}.onnx"), load_external_data=False)
        places = {}
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                places[int(entry["offset"])] = tensor, int(entry["length"])
        for offset, (tensor, length) in sorted(places.items()):
            block = torch.frombuffer(bytearray(data[offset : offset + length]), dtype=torch.uint8)
            weights.store(
                str(offset), tuple(tensor.dims), ir.DataType(tensor.data_type), lambda block=block: [block]
            )
        return proto

    bundle_export.export_stage = export_stage


def remembered_plans(bundle: Bundle) -> None:
    """Take the plans of ``bundle`` where TensorRT would build them; they are written piece by piece."""
    from linert.exporter.tensorrt import build
    from linert.exporter.tensorrt.build_stage import Event

    folder = bundle.path / "engines" / "rtx"
    plans = read_engines(bundle, "rtx").plans

    def run_job(job: Any, environment: dict[str, str], report: Callable[[Any], None]) -> Any:
        plan = plans[Path(job.plan).stem]
        data = (folder / plan.file).read_bytes()
        with Path(job.plan).open("wb", buffering=0) as file:
            for start in range(0, len(data), 1 + len(data) // 8):
                file.write(data[start : start + 1 + len(data) // 8])
                report(Event("writing", start, len(data)))
                time.sleep(0.002)
        told = {name: getattr(plan, name) for name in Event.__struct_fields__ if hasattr(plan, name)}
        return Event(**told)

    build.run_job = run_job


def steady_previews() -> None:
    """Refresh a preview at every line, however long it takes: so a run's operations on files are the same every time."""
    from linert.runtime.commands import run

    run.PREVIEW_SHARE = 1.0


def announced(one: Path, other: Path) -> bool:
    """What :func:`linert.runtime.files.replacement.exchange` does on systems that cannot exchange two folders."""
    sys.audit("linert.exchange", str(one), str(other))
    return False
