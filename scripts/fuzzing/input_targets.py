"""What people bring: checkpoints, folders of models, prompts, captions."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzzing.bases import Target, damage_content, linked, pictures, replace
from fuzzing.mutations import mutate_array, mutate_bytes, mutate_zip, nested
from fuzzing.workers import command
from linert.exporter.models import ModelRequest, load_models
from linert.runtime.bundles.manifest import CaptionInput
from linert.runtime.errors import RequestError


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
        else:
            return damage_content(path, rng, as_json=kind == "json")
        return f"{path.name}: {kind}"

    def use(self, folder: Path) -> str:
        request = ModelRequest(size=(128, 128), prompt_tokens=100)
        return loaded(folder / "model", self.bases.prompted_vq, request)


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
        from linert.runtime.drawing.captions import CaptionConditioner

        conditioner = CaptionConditioner(CaptionInput(8), 6, None, guided=True)
        captions = conditioner.read(folder / "captions.npy")
        inputs = conditioner.inputs(captions[:2])
        return hashlib.sha256(b"".join(values.tobytes() for values in inputs.values())).hexdigest()
