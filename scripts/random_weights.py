#!/usr/bin/env python3
"""Fill a bundle that came without its weights with random ones, for measurements that need a model's shape and not its pictures.

python scripts/random_weights.py bundle

Needs numpy, onnx and msgspec: nothing is exported. The manifest is sealed again, so that the bundle is whole and verifies.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# The package need not be installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import msgspec
import numpy as np
import onnx
from onnx import TensorProto

from linert.runtime.bundles.bundle import file_sha256, manifest_name, sizes_of
from linert.runtime.bundles.manifest import FileRecord, Manifest
from linert.runtime.bundles.manifest_file import decode, encode, seal
from linert.runtime.errors import BundleError

FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: np.uint16}
WHOLE = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


class Stored(NamedTuple):
    """A tensor in a weights file: ONNX's type, offset and bytes."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


def stored_tensors(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Stored]]:
    """Every tensor that the stages keep outside of their files, with the file that it is in."""
    for stage in manifest.stages.values():
        graph = onnx.load(folder / stage.file, load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                yield (
                    entries["location"],
                    Stored(
                        tensor.name,
                        tensor.data_type,
                        tuple(tensor.dims),
                        int(entries["offset"]),
                        int(entries["length"]),
                    ),
                )


def random_values(tensor: Stored, seed: int) -> np.ndarray:
    """Numbers ``[bytes]`` uint8 for a tensor, scaled so that activations keep their size from layer to layer.

    Raises:
        BundleError: the tensor is of whole numbers, which mean something.
    """
    generator = np.random.default_rng(seed)
    if tensor.kind in WHOLE:
        raise BundleError(f"{tensor.name} holds indices or flags: random ones would mean nothing")
    if tensor.kind not in FLOATS:
        # Quantised: any bits are a number.
        return generator.integers(0, 256, tensor.size, np.uint8)
    count = int(np.prod(tensor.shape))
    normal = generator.standard_normal(count, np.float32)
    if "scale" in tensor.name:
        normal = np.abs(normal) * np.float32(1e-3)
    elif len(tensor.shape) < 2:
        normal = normal * np.float32(0.1) + np.float32(tensor.name.endswith("weight"))
    elif "embed" not in tensor.name:
        normal *= np.float32((count // tensor.shape[0]) ** -0.5)
    if tensor.kind == TensorProto.BFLOAT16:
        return (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return normal.astype(FLOATS[tensor.kind]).view(np.uint8)


def fill(folder: Path, made: dict[str, Path] | None = None) -> None:
    """Make the weights file of the bundle in ``folder`` and seal its manifests again.

    Args:
        made: weights files by a digest of their layout; one of the same layout is linked to instead of made again, and a new one
            is entered.

    Raises:
        BundleError: no bundle, or one that stores outside of its files what cannot be random.
    """
    made = {} if made is None else made
    names = [manifest_name("" if number == 0 else size) for number, size in enumerate(sizes_of(folder))]
    manifests = {name: decode((folder / name).read_bytes(), str(folder / name)) for name in names}
    layout: dict[str, dict[int, Stored]] = {}
    for manifest in manifests.values():
        for file, tensor in stored_tensors(folder, manifest):
            layout.setdefault(file, {})[tensor.offset] = tensor
    first = manifests[names[0]]
    records = {}
    for file, tensors in layout.items():
        path, size = folder / file, first.files[file].bytes
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        key = hashlib.sha256(repr((size, ordered)).encode()).hexdigest()
        if key in made:
            path.unlink(missing_ok=True)
            os.link(made[key], path)
        else:
            _write(path, size, ordered)
            made[key] = path
        records[file] = FileRecord(file_sha256(path), size)
    for name, manifest in manifests.items():
        sealed = seal(msgspec.structs.replace(manifest, files={**manifest.files, **records}))
        (folder / name).write_bytes(encode(sealed))


def _write(path: Path, size: int, tensors: Sequence[Stored]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    whole = np.memmap(path, np.uint8, "r+")

    def fill_one(job: tuple[int, Stored]) -> None:
        seed, tensor = job
        whole[tensor.offset : tensor.offset + tensor.size] = random_values(tensor, seed)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill_one, enumerate(tensors)))
    whole.flush()


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(bundle: Path) -> None:
    fill(bundle)
    click.echo(f"{bundle}: random weights")


if __name__ == "__main__":
    main()
