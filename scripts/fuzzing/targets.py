"""What is damaged and what is then done with it: a small model, its bundle, and every kind of file that people bring."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import PIL.Image
import torch

from fuzzing.mutations import (
    json_bytes,
    mutate_bytes,
    mutate_json,
    mutate_npz,
    mutate_zip,
    nested,
)
from fuzzing.workers import command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from exporter.models import ModelRequest, load_models
from runtime.errors import RequestError
from runtime.manifest import CaptionInput, Manifest
from runtime.manifest_file import encode, seal

FREE = ("producer", "precision", "sampling", "cache", "model/source", "image_decoder/source", "stages")
"""Parts of a manifest that tell of the export, or that a run may choose: who changes them and seals them again draws otherwise
by intent. Of ``stages`` what is measured of them alone (``work``)."""


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
        from graphs.families import llamagen, vq
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


class ManifestTarget(Target):
    """A bundle's manifest, changed and as it is, or sealed again by somebody who knows the format."""

    name = "manifest"

    def intact(self, folder: Path) -> None:
        linked(self.bases.bundle, folder / "bundle")

    def damage(self, folder: Path, rng: random.Random) -> str:
        self.intact(folder)
        path = folder / "bundle" / "manifest.json"
        data = path.read_bytes()
        kind = rng.choice(("bytes", "json", "sealed", "sealed", "sealed", "nested"))
        if kind == "nested":
            replace(path, nested(rng.choice((1000, 100_000)), rng))
            return "nested"
        if kind == "bytes":
            damaged, said = mutate_bytes(data, rng)
            replace(path, damaged)
            return f"bytes: {said}"
        values, place, said = mutate_json(json.loads(data), rng)
        if kind == "sealed":
            try:
                manifest = seal(msgspec.convert(values, Manifest, strict=False))
                replace(path, encode(manifest))
                return f"sealed: {'free: ' if _free(place) else ''}{said}"
            except (msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError):
                pass
        replace(path, json_bytes(values))
        return f"json: {said}"

    def use(self, folder: Path) -> str:
        command("inspect", folder / "bundle", "--json")
        command("run", folder / "bundle", "--classes", "1,2", "--seed", 5, "--out", folder / "out")
        return pictures(folder / "out")


def _free(place: tuple[Any, ...]) -> bool:
    text = "/".join(map(str, place))
    return any(text.startswith(part) for part in FREE if part != "stages") or "/work/" in text


class BundleTarget(ManifestTarget):
    """Any other file of a bundle."""

    name = "bundle file"

    def damage(self, folder: Path, rng: random.Random) -> str:
        self.intact(folder)
        path = rng.choice(sorted(p for p in (folder / "bundle").iterdir() if p.name != "manifest.json"))
        kind = rng.choice(("bytes", "bytes", "bytes", "gone", "swapped", "folder", "link"))
        if kind == "bytes":
            damaged, said = mutate_bytes(path.read_bytes(), rng)
            replace(path, damaged)
            return f"{path.name}: {said}"
        other = rng.choice(sorted((folder / "bundle").iterdir()))
        content = other.read_bytes()
        path.unlink()
        if kind == "swapped":
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(rng.choice(("/dev/zero", "/etc/hostname", "nowhere", path.name, other.name)))
        return f"{path.name}: {kind} {other.name if kind in ('swapped', 'link') else ''}"


class CheckpointTarget(Target):
    """A ``.pt`` file: bytes, and archives with other entries under valid checksums."""

    name = "checkpoint"

    def intact(self, folder: Path) -> None:
        shutil.copy(self.bases.model, folder / "model.pt")

    def damage(self, folder: Path, rng: random.Random) -> str:
        data = self.bases.model.read_bytes()
        kind = rng.choice(("bytes", "zip", "zip", "pickle", "structure"))
        if kind == "structure":
            tensors = torch.load(self.bases.model, weights_only=True)["model"]
            said = self._restructure(tensors, rng)
            torch.save({"model": tensors}, folder / "model.pt")
            # A table of other rows is a model of fewer classes.
            return f"{'free: ' if 'embedding' in said else ''}{said}"
        damaged, said = (mutate_zip if kind == "zip" else mutate_bytes)(data, rng)
        (folder / "model.pt").write_bytes(damaged)
        # Other numbers under valid checksums are another checkpoint, which nothing in the format tells.
        other = kind == "zip" and said.startswith(("swap", "content", "double"))
        return f"{'free: ' if other else ''}{kind}: {said}"

    @staticmethod
    def _restructure(tensors: dict[str, Any], rng: random.Random) -> str:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        kind = rng.choice(
            (
                "gone",
                "renamed",
                "half",
                "wide",
                "nan",
                "inf",
                "int",
                "object",
                "complex",
                "empty",
                "huge number",
                "scalar",
            )
        )
        if kind == "gone":
            del tensors[name]
        elif kind == "renamed":
            tensors[f"{name}.{rng.choice(('x', '999999999', 'weight'))}"] = tensors.pop(name)
        elif kind == "huge number":
            tensors[f"layers.{rng.choice((999999999, 10**30, -1))}.attention.wqkv.weight"] = tensor
        else:
            made = {
                "half": lambda: tensor[: max(1, len(tensor) // 2)].clone(),
                "wide": lambda: torch.cat([tensor, tensor]),
                "nan": lambda: torch.full_like(tensor, float("nan")),
                "inf": lambda: torch.full_like(tensor, float("inf")),
                "int": lambda: tensor.to(torch.int32),
                "object": lambda: {"a": tensor},
                "complex": lambda: tensor.to(torch.complex64),
                "empty": lambda: tensor[:0].clone(),
                "scalar": lambda: torch.tensor(1.0),
            }
            tensors[name] = made[kind]()
        return f"{name}: {kind}"

    def use(self, folder: Path) -> str:
        return loaded(folder / "model.pt", self.bases.tokenizer, ModelRequest(grid=6, heads=4))


def loaded(path: Path, vq_path: Path, request: ModelRequest) -> str:
    """Digest of everything that an export would read."""
    transformer, decoder = load_models(path, vq_path, request)
    digest = hashlib.sha256(repr((transformer.config, decoder.config)).encode())
    for model in (transformer, decoder):
        for name, tensor in sorted(model.tensors.items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for name, largest in transformer.largest.items():
        if largest is None:
            raise RequestError(f"{name} is not finite")
    if transformer.prompts is not None:
        digest.update(repr(transformer.prompts).encode())
    return digest.hexdigest()


class FolderTarget(Target):
    """A model's folder: index, config, tokenizer, shards."""

    name = "folder"
    any_content = True

    def intact(self, folder: Path) -> None:
        linked(self.bases.prompted, folder / "model")

    def damage(self, folder: Path, rng: random.Random) -> str:
        self.intact(folder)
        path = rng.choice(sorted((folder / "model").iterdir()))
        kind = rng.choice(("bytes", "json", "json", "json", "nested", "gone", "mark", "pointer"))
        if kind == "gone":
            path.unlink()
        elif kind == "nested":
            replace(path, nested(rng.choice((1000, 100_000)), rng))
        elif kind == "mark":
            replace(path, b"\xef\xbb\xbf" + path.read_bytes())
        elif kind == "pointer":
            replace(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
        elif kind == "json" and path.suffix == ".json":
            values, _, said = mutate_json(json.loads(path.read_bytes()), rng)
            replace(path, json_bytes(values))
            return f"{path.name}: {said}"
        else:
            damaged, said = mutate_bytes(path.read_bytes(), rng)
            replace(path, damaged)
            return f"{path.name}: {said}"
        return f"{path.name}: {kind}"

    def use(self, folder: Path) -> str:
        request = ModelRequest(size=(128, 128), prompt_tokens=100)
        return loaded(folder / "model", self.bases.prompted_vq, request)


class ArchiveTarget(Target):
    """An npz file that a command made: a trace, or saved tokens."""

    any_content = True
    file: ClassVar[str]

    def intact(self, folder: Path) -> None:
        shutil.copy(self.bases.folder / self.file, folder / self.file)

    def damage(self, folder: Path, rng: random.Random) -> str:
        with np.load(self.bases.folder / self.file) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = arrays.get("header")
        if header is not None and rng.random() < 0.5:
            values, _, said = mutate_json(json.loads(header.tobytes()), rng)
            arrays["header"] = np.frombuffer(json_bytes(values), np.uint8)
            np.savez(folder / self.file, **arrays)
            return f"header: {said}"
        damaged, said = mutate_npz(arrays, rng)
        (folder / self.file).write_bytes(damaged)
        return said


class TraceTarget(ArchiveTarget):
    """A recorded trace, replayed."""

    name = "trace"
    file = "trace.npz"

    def use(self, folder: Path) -> str:
        command("run", self.bases.bundle, "--replay-trace", folder / self.file, "--out", folder / "out")
        return pictures(folder / "out")


class TokensTarget(ArchiveTarget):
    """Saved tokens, rendered."""

    name = "tokens"
    file = "tokens.npz"

    def use(self, folder: Path) -> str:
        command("render", self.bases.bundle, folder / self.file, "--out", folder / "out")
        return pictures(folder / "out")


class RunTarget(Target):
    """The folder of a run, continued: what was damaged is drawn again or refused."""

    name = "run folder"

    def intact(self, folder: Path) -> None:
        shutil.copytree(self.bases.run, folder / "run")

    def damage(self, folder: Path, rng: random.Random) -> str:
        self.intact(folder)
        path = rng.choice(sorted(p for p in (folder / "run").iterdir() if p.is_file()))
        kind = rng.choice(("bytes", "bytes", "json", "gone", "nested", "other"))
        if kind == "gone":
            path.unlink()
        elif kind == "nested":
            replace(path, nested(100_000, rng))
        elif kind == "other":
            replace(path, rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file())).read_bytes())
        elif kind == "json" and path.suffix == ".json":
            values, _, said = mutate_json(json.loads(path.read_bytes()), rng)
            replace(path, json_bytes(values))
            return f"{path.name}: {said}"
        else:
            damaged, said = mutate_bytes(path.read_bytes(), rng)
            replace(path, damaged)
            return f"{path.name}: {said}"
        return f"{path.name}: {kind}"

    def use(self, folder: Path) -> str:
        command("run", self.bases.bundle, "--classes", "1,2", "--out", folder / "run", "--resume")
        return pictures(folder / "run")


class PromptsTarget(Target):
    """A file of prompts."""

    name = "prompt file"
    any_content = True
    TEXT = "a red fox\nan old lighthouse above a stormy sea\n\nzwölf Boxkämpfer\n"

    def intact(self, folder: Path) -> None:
        (folder / "prompts.txt").write_text(self.TEXT, encoding="utf-8")

    def damage(self, folder: Path, rng: random.Random) -> str:
        ends = (
            "\u2028",
            "\u0085",
            "\x0b",
            "\x0c",
            "\x1c",
            "\r",
            "\r\n",
            "\x00",
            "\ufeff",
            "\ud7ff",
            "<|image|>",
        )
        text = self.TEXT
        said = []
        for _ in range(rng.randrange(1, 4)):
            at, what = rng.randrange(len(text) + 1), rng.choice(ends)
            text = text[:at] + what + text[at:]
            said.append(f"{what!r} at {at}")
        data = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
        if rng.random() < 0.3:
            data, more = mutate_bytes(data, rng)
            said.append(more)
        (folder / "prompts.txt").write_bytes(data)
        return "; ".join(said)

    def use(self, folder: Path) -> str:
        command(
            *("run", self.bases.prompts, "--prompt-file", folder / "prompts.txt", "--num-images", 1),
            *("--out", folder / "out"),
        )
        return pictures(folder / "out")


class CaptionsTarget(Target):
    """Features of captions, a ``.npy`` file."""

    name = "captions"
    any_content = True

    def intact(self, folder: Path) -> None:
        np.save(folder / "captions.npy", np.random.default_rng(0).standard_normal((2, 5, 8), np.float32))

    def damage(self, folder: Path, rng: random.Random) -> str:
        from fuzzing.mutations import mutate_array

        self.intact(folder)
        path = folder / "captions.npy"
        if rng.random() < 0.6:
            data, said = mutate_bytes(path.read_bytes(), rng)
            replace(path, data)
            return said
        array, said = mutate_array(np.load(path), rng)
        np.save(path, array, allow_pickle=True)
        return said

    def use(self, folder: Path) -> str:
        from runtime.conditions import CaptionConditioner

        conditioner = CaptionConditioner(CaptionInput(8), 6, None, guided=True)
        captions = conditioner.read(folder / "captions.npy")
        inputs = conditioner.inputs(captions[:2])
        return hashlib.sha256(b"".join(values.tobytes() for values in inputs.values())).hexdigest()


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        *(ManifestTarget, BundleTarget, CheckpointTarget, FolderTarget, TraceTarget, TokensTarget, RunTarget),
        *(PromptsTarget, CaptionsTarget),
    )
}
