"""The undamaged things, and what a kind of damaged input is."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import PIL.Image
import torch

from fuzzing.mutations import json_bytes, mutate_bytes, mutate_json
from fuzzing.workers import command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


class Bases:
    """The undamaged things, in one folder: each is made once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Path:
        """A checkpoint of LlamaGen."""
        from linert.graphs.families import llamagen
        from tests.conftest import TINY, random_state

        torch.save({"model": random_state(llamagen.LlamaGen(TINY))}, self.folder / "model.pt")
        return self.folder / "model.pt"

    @cached_property
    def tokenizer(self) -> Path:
        """The checkpoint of its VQ tokenizer."""
        from linert.graphs.families import vq
        from tests.conftest import TINY_VQ, random_state

        torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, self.folder / "vq.pt")
        return self.folder / "vq.pt"

    @cached_property
    def lumina(self) -> tuple[Path, Path]:
        """The folder of a Lumina-mGPT and its image decoder."""
        from tests.text_models import write_lumina

        return write_lumina(self.folder / "lumina")

    @property
    def prompted(self) -> Path:
        return self.lumina[0]

    @property
    def prompted_vq(self) -> Path:
        return self.lumina[1]

    @cached_property
    def bundle(self) -> Path:
        """A bundle of the LlamaGen."""
        options = ("--grid", 6, "--heads", 4, "--policy", "linear,h2o", "--budget-lines", 3, "--batch", 2)
        out = self.folder / "bundle"
        command("export", self.model, "--vq", self.tokenizer, *options, "--guidance", 3, "--out", out)
        return out

    @cached_property
    def prompts(self) -> Path:
        """A bundle of the Lumina-mGPT."""
        options = ("--size", "128x128", "--prompt-tokens", 100, "--budget-lines", 3)
        out = self.folder / "prompts"
        command("export", self.prompted, "--vq", self.prompted_vq, *options, "--out", out)
        return out

    @cached_property
    def run(self) -> Path:
        """The folder of a run, with ``tokens.npz`` and ``trace.npz`` beside it."""
        out = self.folder / "run"
        saved = ("--save-tokens", self.folder / "tokens.npz", "--record-trace", self.folder / "trace.npz")
        command("run", self.bundle, "--classes", "1,2", "--out", out, *saved)
        return out

    def made(self, name: str) -> Path:
        """A file that the run made."""
        return self.run.parent / name


def linked(source: Path, target: Path) -> None:
    """Copy a folder by links: damage replaces files and never writes into them."""
    shutil.copytree(
        source, target, symlinks=True, copy_function=lambda one, other: Path(other).hardlink_to(one)
    )


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def damage_content(path: Path, rng: random.Random, *, as_json: bool) -> str:
    """Change what a file holds: a value, where it is JSON and that is wanted, else bytes. Returns what was done."""
    if as_json and path.suffix == ".json":
        values, _, said = mutate_json(json.loads(path.read_bytes()), rng)
        data = json_bytes(values)
    else:
        data, said = mutate_bytes(path.read_bytes(), rng)
    replace(path, data)
    return f"{path.name}: {said}"


def pictures(folder: Path) -> str:
    """Digest of all pictures of a run."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        with PIL.Image.open(path) as image:
            digest.update(path.name.encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()


class Target(ABC):
    """A kind of input: how it is damaged, and what is done with it.

    ``any_content``: whether damage may rightly load as something else, since the format has nothing that tells.
    """

    name: ClassVar[str]
    any_content: ClassVar[bool] = False

    def __init__(self, bases: Bases) -> None:
        self.bases = bases

    @abstractmethod
    def damage(self, folder: Path, rng: random.Random) -> str:
        """Write the damaged input into the empty ``folder``; what was done to it."""

    @abstractmethod
    def use(self, folder: Path) -> str:
        """Do with it what people do; a fingerprint of what came out."""

    @abstractmethod
    def intact(self, folder: Path) -> None:
        """Write the input undamaged into the empty ``folder``."""
