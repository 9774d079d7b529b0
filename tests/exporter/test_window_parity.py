"""Windows in a bundle against PyTorch's single steps, and what a wrong window does to the verdict."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from linert.graphs.line_window import HIDDEN
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.manifest import FileRecord, decode_stage
from linert.runtime.bundles.manifest_file import encode, seal
from tests.conftest import Result

Linert = Callable[..., Result]


def validated(linert: Linert, bundle: Path, *options: object) -> dict[str, object]:
    done = linert("validate", bundle, "--json", *options)
    assert done.out, done.err
    values: dict[str, object] = json.loads(done.out)
    return values


@pytest.mark.parametrize("options", [(), ("--mode", "strict")])
def test_windows_are_held_to_what_single_steps_are(
    options: tuple[str, ...], linert: Linert, windowed_bundle: Path
) -> None:
    report = validated(linert, windowed_bundle, *options)
    assert report["passed"]
    runs = report["runs"]
    assert isinstance(runs, dict)
    assert runs["4"] == runs["1"]
    assert runs["4"]["tokens_agreement"] == 1.0


def changed(bundle: Path, target: Path, change: Callable[[onnx.ModelProto], int]) -> Path:
    """A copy of the bundle whose windows' graph was changed, sealed as if it were right."""
    shutil.copytree(bundle, target)
    manifest = open_bundle(target).manifest
    file = manifest.stages[decode_stage(4, filtered=False)].file
    model = onnx.load(target / file, load_external_data=False)
    assert change(model) > 0
    onnx.save(model, target / file)
    data = (target / file).read_bytes()
    record = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    sealed = seal(msgspec.structs.replace(manifest, files={**manifest.files, file: record}))
    (target / "manifest.json").write_bytes(encode(sealed))
    return target


def nothing_is_hidden(model: onnx.ModelProto) -> int:
    """Queries see slots that they would have overwritten, and drafts behind them."""
    count = 0
    tensors = [*model.graph.initializer]
    tensors += [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != onnx.TensorProto.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and array.item() == np.float32(HIDDEN):
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(array), tensor.name))
                count += 1
    return count


def every_draft_is_accepted(model: onnx.ModelProto) -> int:
    """A draft need not be what is drawn."""
    count = 0
    for node in model.graph.node:
        if node.op_type == "Equal" and list(node.output):
            node.input[1] = node.input[0]
            count += 1
    return count


@pytest.mark.parametrize("change", [nothing_is_hidden, every_draft_is_accepted])
def test_a_window_that_is_wrong_fails(
    change: Callable[[onnx.ModelProto], int], linert: Linert, windowed_bundle: Path, tmp_path: Path
) -> None:
    report = validated(linert, changed(windowed_bundle, tmp_path / "bundle", change))
    assert not report["passed"]
    checks = report["checks"]
    assert isinstance(checks, list)
    failed = [check["name"] for check in checks if not check["passed"]]
    assert failed
    assert all("windows of 4" in name for name in failed)
