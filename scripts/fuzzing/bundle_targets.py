"""Bundles, and what commands made with them: traces, tokens, folders of runs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from fuzzing.bases import Target, damage_content, linked, pictures, replace
from fuzzing.mutations import json_bytes, mutate_bytes, mutate_json, mutate_npz, nested
from fuzzing.workers import command
from linert.runtime.bundles.manifest import Manifest
from linert.runtime.bundles.manifest_file import encode, seal

FREE = ("producer", "precision", "sampling", "cache", "model/source", "image_decoder/source")
"""Parts of a manifest that tell of the export, or that a run may choose: who changes them and seals them again draws otherwise
by intent."""


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
    """Whether a part of a manifest is among :data:`FREE`, or tells of a stage's costs (``work``), which decide nothing."""
    return "work" in place or "/".join(map(str, place)).startswith(FREE)


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


class ArchiveTarget(Target):
    """An npz file that a command made: a trace, or saved tokens."""

    any_content = True
    file: ClassVar[str]

    def intact(self, folder: Path) -> None:
        shutil.copy(self.bases.made(self.file), folder / self.file)

    def damage(self, folder: Path, rng: random.Random) -> str:
        with np.load(self.bases.made(self.file)) as archive:
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
        else:
            return damage_content(path, rng, as_json=kind == "json")
        return f"{path.name}: {kind}"

    def use(self, folder: Path) -> str:
        command("run", self.bases.bundle, "--classes", "1,2", "--out", folder / "run", "--resume")
        return pictures(folder / "run")
