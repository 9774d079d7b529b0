"""A generator is shared, closed and dropped without harm, and says when what it computes is no number."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from linert.runtime.bundles.bundle import file_sha256, open_bundle
from linert.runtime.bundles.manifest import FileRecord
from linert.runtime.bundles.manifest_file import encode, seal
from linert.runtime.drawing.generator import Generator
from linert.runtime.errors import BundleError, RequestError
from linert.runtime.machine import resident_bytes
from tests.conftest import Result


def test_threads_that_share_a_generator_get_their_own_images(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle) as generator, ThreadPoolExecutor(4) as pool:
        alone = [generator.generate([seed % 3], seed=seed)[0] for seed in range(8)]
        jobs = [
            pool.submit(lambda seed=seed: generator.generate([seed % 3], seed=seed)[0])
            for _ in range(3)
            for seed in range(8)
        ]
        for number, job in enumerate(jobs):
            wanted = alone[number % 8]
            assert (job.result().tokens == wanted.tokens).all()
            assert (job.result().pixels == wanted.pixels).all()


def test_a_closed_generator_says_so(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle) as generator:
        generator.generate([1])
    with pytest.raises(RequestError, match="closed"):
        generator.generate([1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("closed", [True, False])
def test_generators_in_a_loop_hold_memory_and_descriptors_flat(closed: bool, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    counts, sizes = [], []
    for _ in range(12):
        generator = Generator(bundle)
        generator.generate([1])
        if closed:
            generator.close()
        del generator
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
        sizes.append(resident_bytes() or 0)
    assert counts[-1] == counts[2]
    # A generator of the tiny model holds a few megabytes; ONNX Runtime keeps some of the first ones'.
    assert sizes[-1] - sizes[5] < 6 << 20


def poisoned(bundle: Path, stage: str, name: str) -> None:
    """Put a number that is none into a weight, and make the bundle whole again."""
    graph = onnx.load(bundle / f"{stage}.onnx", load_external_data=False).graph
    [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    weights = bundle / entries["location"]
    with weights.open("r+b") as file:
        file.seek(int(entries["offset"]))
        file.write(np.float32(np.nan).tobytes())
    manifest = open_bundle(bundle, digests=False).manifest
    record = FileRecord(file_sha256(weights), weights.stat().st_size)
    changed = msgspec.structs.replace(manifest, files={**manifest.files, weights.name: record})
    (bundle / "manifest.json").write_bytes(encode(seal(changed)))


@pytest.mark.parametrize(
    ("stage", "weight", "said"),
    [
        ("decode", "model.layers.0.attention.wo.weight.T", "logits that are not finite in image 0, 1"),
        ("vq_decoder", "image_decoder.decoder.conv_out.weight", "pixels that are not finite"),
    ],
)
def test_numbers_that_are_none_are_reported(
    stage: str, weight: str, said: str, tiny_bundle: Path, tmp_path: Path, linert: Callable[..., Result]
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    poisoned(copy, stage, weight)
    with Generator(copy) as generator, pytest.raises(BundleError, match=said):
        generator.generate([1, 2])
    result = linert("run", copy, "--classes", 1, "--out", tmp_path / "out")
    assert result.code == 2
    assert said.split(" in ")[0] in result.err
    assert "Traceback" not in result.err


def test_no_tokens_are_no_pixels_and_no_seed_is_refused(tiny_bundle: Path) -> None:
    with Generator(tiny_bundle) as generator:
        assert len(generator.decoder(np.empty((0, 36), np.int64))) == 0
        with pytest.raises(RequestError, match="seed is None, must be a whole number"):
            generator.generate([1], seed=None)  # type: ignore[arg-type]
