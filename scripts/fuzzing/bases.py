"""The undamaged things, and what a kind of damaged input is."""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import PIL.Image
import torch

from fuzzing.workers import command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@dataclass
class Bases:
    """The undamaged things, in one folder: made once."""

    folder: Path
    model: Path = field(init=False)
    tokenizer: Path = field(init=False)
    prompted: Path = field(init=False)
    prompted_vq: Path = field(init=False)
    bundle: Path = field(init=False)
    prompts: Path = field(init=False)
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        from linert.graphs.families import llamagen, vq
        from tests.conftest import TINY, TINY_VQ, random_state
        from tests.text_models import write_lumina

        self.model, self.tokenizer = self.folder / "model.pt", self.folder / "vq.pt"
        torch.save({"model": random_state(llamagen.LlamaGen(TINY))}, self.model)
        torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, self.tokenizer)
        self.prompted, self.prompted_vq = write_lumina(self.folder / "lumina")
        self.bundle, self.prompts = self.folder / "bundle", self.folder / "prompts"
        command(
            *(
                "export",
                self.model,
                "--vq",
                self.tokenizer,
                "--grid",
                6,
                "--heads",
                4,
                "--policy",
                "linear,h2o",
            ),
            *("--budget-lines", 3, "--batch", 2, "--guidance", 3, "--out", self.bundle),
        )
        command(
            *("export", self.prompted, "--vq", self.prompted_vq, "--size", "128x128", "--prompt-tokens", 100),
            *("--budget-lines", 3, "--out", self.prompts),
        )
        self.run = self.folder / "run"
        command(
            *(
                "run",
                self.bundle,
                "--classes",
                "1,2",
                "--out",
                self.run,
                "--save-tokens",
                self.folder / "tokens.npz",
            ),
            *("--record-trace", self.folder / "trace.npz"),
        )


def linked(source: Path, target: Path) -> None:
    """Copy a folder by links: damage replaces files and never writes into them."""
    shutil.copytree(
        source, target, symlinks=True, copy_function=lambda one, other: Path(other).hardlink_to(one)
    )


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


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
