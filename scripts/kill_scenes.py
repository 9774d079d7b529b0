"""What commands write, and what must be true of it when they are killed, and when they come to their end."""

from __future__ import annotations

import json
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
from kill_processes import Place, Started

from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.engines import read_engines
from linert.runtime.drawing.output import METADATA_KEY
from linert.runtime.errors import LinertError
from linert.runtime.files.replacement import recover

METRICS = """
from linert.runtime.measuring.metrics import ClassAccuracy

def metrics():
    return [ClassAccuracy(lambda pixels: (pixels.mean((1, 2, 3)) > 0).astype(int))]
"""


class Scene(ABC):
    """One command in a place of its own, with a ``bundle`` to draw from, to build or to export again."""

    command: str

    def __init__(self, place: Place, bundle: Bundle) -> None:
        self.place, self.bundle, self.work = place, bundle, place.work
        for folder in (place.work, place.scratch):
            folder.mkdir(parents=True)
        self.wanted: dict[str, object] = {}

    @abstractmethod
    def arguments(self, rng: random.Random) -> list[str]:
        """Of the next start, after the command's name."""

    @abstractmethod
    def read(self, path: Path) -> object:
        """What a finished file says; equal for equal results.

        Raises:
            Exception: it is not whole.
        """

    def left(self, before: set[str]) -> Iterator[str]:
        """What is half-written after a kill; ``before``: names that were there at the start."""
        for name, path in self.files().items():
            if path.is_dir():
                # An empty one, in which something was about to be made. The next start may not leave it.
                continue
            try:
                value = self.read(path)
            except Exception as error:
                yield f"{name}: {type(error).__name__}: {error}"
                continue
            if name not in self.wanted:
                yield f"{name} is not of this run"
            elif not self.agrees(name, value):
                yield f"{name} is not what it must be"

    def agrees(self, name: str, value: object) -> bool:
        """Whether an unfinished run's file says what a finished one's does."""
        return value == self.wanted[name]

    def files(self) -> dict[str, Path]:
        """Everything that has a final name, by its name."""
        return {
            name: self.work / name
            for name in everything(self.work)
            if not any(part.startswith(".") for part in name.split("/"))
        }

    def learn(self) -> tuple[float, int]:
        """Let it run undisturbed; its seconds, and its operations on files."""
        begun = time.perf_counter()
        process = Started(self.place, [self.command, *self.arguments(random.Random(0))])
        code = process.wait()
        if code != 0 or self.temporary():
            raise click.ClickException(
                f"linert {self.command} exited with {code}, left {self.temporary()}:\n{self.place.log.read_text()}"
            )
        self.wanted = {name: self.read(path) for name, path in self.files().items()}
        return time.perf_counter() - begun, int(self.place.count.read_text())

    def reset(self) -> None:
        """Begin in an empty folder."""
        shutil.rmtree(self.work)
        self.work.mkdir()

    def strays(self) -> list[str]:
        """What is there after a start that came to its end and should not be, and what should be and is not."""
        names = set(everything(self.work))
        extra = [f"{name} is left over" for name in sorted(names - set(self.wanted))]
        missing = [f"{name} is missing" for name in sorted(set(self.wanted) - names)]
        return [*extra, *missing, *(f"temporary {name}" for name in self.temporary())]

    def unfinished(self) -> list[str]:
        """What has no final name yet."""
        return [*sorted(set(everything(self.work)) - set(self.files())), *self.temporary()]

    def temporary(self) -> list[str]:
        """What is left in the temporary folder, but for what ONNX Runtime and PyTorch keep there."""
        return [
            name for name in everything(self.place.scratch) if not name.startswith((".ses", "torchinductor_"))
        ]

    def changes(self) -> list[str]:
        """Files that are not what an undisturbed run wrote."""
        faults = []
        for name, path in self.files().items():
            try:
                same = self.read(path) == self.wanted.get(name)
            except Exception as error:
                faults.append(f"{name}: {type(error).__name__}: {error}")
            else:
                faults += [] if same else [f"{name} differs"]
        return faults


def everything(folder: Path) -> list[str]:
    """Names of all files in a folder, and of its empty folders."""
    paths = sorted(folder.rglob("*"))
    return [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    ]


class Export(Scene):
    """A bundle that is new, or replaces one by ``--force``."""

    command = "export"

    def __init__(self, place: Place, bundle: Bundle) -> None:
        super().__init__(place, bundle)
        self.guidances = (3, 4)
        self.known: dict[str, dict[str, object]] = {}
        self.next = ""

    @property
    def out(self) -> Path:
        return self.work / "bundle"

    def arguments(self, rng: random.Random) -> list[str]:
        guidance = rng.choice(self.guidances)
        self.next = str(guidance)
        force = ["--force"] * (self.out.exists() or rng.random() < 0.5)
        return [*export_arguments(self.bundle), "--guidance", str(guidance), "--out", str(self.out), *force]

    def learn(self) -> tuple[float, int]:
        for guidance in self.guidances:
            self.reset()
            self.guidances = (guidance,)
            learnt = super().learn()
            self.known[str(guidance)] = self.wanted
        self.guidances = (3, 4)
        return learnt

    def read(self, path: Path) -> object:
        return path.read_bytes()

    def left(self, before: set[str]) -> Iterator[str]:
        if "bundle" in before and not self.out.exists() and not recover(self.out):
            yield "the bundle that was there is gone"
        if not self.out.exists():
            return
        try:
            open_bundle(self.out)
        except LinertError as error:
            yield str(error)
        contents = {name: self.read(path) for name, path in self.files().items()}
        if contents not in self.known.values():
            yield "the bundle is neither the old nor the new one"

    def strays(self) -> list[str]:
        self.wanted = self.known[self.next]
        return super().strays()


def export_arguments(bundle: Bundle) -> list[str]:
    """How a bundle like this one is exported."""
    manifest = bundle.manifest
    model, decoder = manifest.model, manifest.image_decoder
    cache = manifest.require_cache("the test")
    lines = ["--budget-lines", str(cache.budget_lines[0])]
    policies = sorted(manifest.policies, key=lambda name: name != cache.policy)
    return [
        *(model.source.path, "--vq", decoder.source.path),
        *("--grid", str(model.config["grid"]), "--heads", str(model.config["heads"])),
        *("--policy", ",".join(policies), "--batch", str(manifest.images), *lines),
    ]


class Run(Scene):
    """Pictures, their maps, a preview and saved tokens; resumed, or begun anew."""

    command = "run"

    def arguments(self, rng: random.Random) -> list[str]:
        out = self.work / "out"
        again = [rng.choice(["--resume", "--resume", "--resume", "--force"])] if out.exists() else []
        asked = ("--classes", "0-4", "--num-images", "9", "--seed", "5", "--eviction-map", "--preview")
        saved = ("--save-tokens", str(self.work / "tokens.npz"))
        return [str(self.bundle.path), *asked, *saved, "--out", str(out), *again]

    def read(self, path: Path) -> object:
        if path.suffix == ".npz":
            return arrays_of(path)
        if path.suffix == ".png":
            with PIL.Image.open(path) as image:
                recipe = image.info.get(METADATA_KEY)
                return image.size, image.convert("RGB").tobytes(), recipe
        return json.loads(path.read_bytes())

    def left(self, before: set[str]) -> Iterator[str]:
        # A preview is whole, but none of the results.
        for fault in super().left(before):
            if fault != "out/preview.png is not of this run":
                yield fault

    def agrees(self, name: str, value: Any) -> bool:
        wanted: Any = self.wanted[name]
        if name != "out/tokens.npz":
            return bool(value == wanted)
        rows = dict(zip(wanted["image"], wanted["tokens"], strict=True))
        return all(rows[number] == row for number, row in zip(value["image"], value["tokens"], strict=True))


def arrays_of(path: Path) -> dict[str, Any]:
    """The arrays of an npz file, as lists."""
    with np.load(path) as arrays:
        return {name: arrays[name].tolist() for name in arrays}


class Build(Scene):
    """Plans in a bundle; there are none, or they are built again by ``--force``."""

    command = "build"

    def __init__(self, place: Place, bundle: Bundle) -> None:
        super().__init__(place, bundle)
        self.reset()

    def reset(self) -> None:
        super().reset()
        unbuilt = shutil.ignore_patterns("engines")
        shutil.copytree(self.bundle.path, self.work / "bundle", ignore=unbuilt)

    def arguments(self, rng: random.Random) -> list[str]:
        return [str(self.work / "bundle"), "--target", "rtx", "--sm", "89", "--force"]

    def read(self, path: Path) -> object:
        if path.name == "engine.json":
            record = json.loads(path.read_bytes())
            plans = {
                stage: {**plan, "seconds": 0, "sha256": 0, "bytes": 0}
                for stage, plan in record["plans"].items()
            }
            return {**record, "plans": plans}
        # TensorRT's own choices differ from build to build.
        return path.suffix == ".plan" or path.read_bytes()

    def left(self, before: set[str]) -> Iterator[str]:
        engines = self.work / "bundle" / "engines" / "rtx"
        if "bundle/engines/rtx/engine.json" in before and not engines.exists() and not recover(engines):
            yield "the plans that were there are gone"
        if engines.exists():
            try:
                read_engines(open_bundle(self.work / "bundle"), "rtx")
            except LinertError as error:
                yield str(error)
        yield from super().left(before)


class Compare(Scene):
    """A comparison with a metric and timings, resumed."""

    command = "compare"

    def __init__(self, place: Place, bundle: Bundle) -> None:
        super().__init__(place, bundle)
        self.metrics = place.root / "metric_of_brightness.py"
        self.metrics.write_text(METRICS)

    def arguments(self, rng: random.Random) -> list[str]:
        out = self.work / "out"
        again = ["--resume"] if out.exists() else []
        grid = ("--policies", "linear", "--budgets", "1/2", "--samples", "5", "--metrics", str(self.metrics))
        return [str(self.bundle.path), *grid, "--out", str(out), *again]

    def read(self, path: Path) -> object:
        if path.suffix == ".npz":
            return arrays_of(path)
        if path.suffix == ".html":
            text = path.read_text().strip()
            if not text.endswith("</html>"):
                raise ValueError("it does not end")
            return True
        value = json.loads(path.read_bytes())
        for cell in value.get("cells", ()):
            for name in ("decode_ms", "line_end_ms"):
                cell.pop(name)
        return value

    def agrees(self, name: str, value: Any) -> bool:
        wanted: Any = self.wanted[name]
        if not name.endswith("tokens.npz"):
            return bool(value == wanted)
        rows = dict(zip(wanted["image"], wanted["tokens"], strict=True))
        return all(rows[number] == row for number, row in zip(value["image"], value["tokens"], strict=True))


SCENES: dict[str, type[Scene]] = {scene.command: scene for scene in (Export, Run, Build, Compare)}
