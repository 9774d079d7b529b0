"""A bundle that is not exactly what was written is refused, with the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.errors import BundleError
from runtime.manifest import SCHEMA, decode, encode, seal
from tests.conftest import Result

Linert = Callable[..., Result]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_whole_bundle_opens(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert list(manifest.policies) == ["linear"]
    assert decode(encode(manifest), "manifest.json") == manifest
    assert seal(manifest) == manifest


@pytest.mark.parametrize(
    "name", ["weights.bin", "decode.onnx", "prefill.onnx", "line_end.linear.onnx", "vq_decoder.onnx"]
)
def test_a_changed_byte_is_refused(name: str, bundle: Path) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        open_bundle(bundle)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_changed_byte_of_the_manifest_is_refused(place: float, bundle: Path) -> None:
    path = bundle / "manifest.json"
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_a_changed_default_is_refused(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"guidance": 4.0', '"guidance": 5.0'))
    with pytest.raises(BundleError, match="changed after it was written"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["weights.bin", "decode.onnx", "manifest.json"])
def test_a_missing_file_is_refused(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        open_bundle(bundle)


def test_a_truncated_file_is_refused_even_without_digests(bundle: Path) -> None:
    os.truncate(bundle / "weights.bin", 100)
    with pytest.raises(BundleError, match="100 bytes"):
        open_bundle(bundle, digests=False)


@pytest.mark.parametrize(
    ("schema", "age", "remedy"), [(SCHEMA - 1, "older", "export"), (SCHEMA + 1, "newer", "upgrade")]
)
def test_other_schemas_are_refused(schema: int, age: str, remedy: str, bundle: Path) -> None:
    edit(bundle, lambda values: values.update(schema=schema))
    with pytest.raises(BundleError, match=f"{age}.*{remedy}"):
        open_bundle(bundle)


def test_missing_and_unknown_fields_are_refused(bundle: Path) -> None:
    edit(bundle, lambda values: values["cache"].pop("recent_lines"))
    with pytest.raises(BundleError, match="recent_lines"):
        open_bundle(bundle)
    edit(bundle, lambda values: values["cache"].update(recent_lines=1, surprise=2))
    with pytest.raises(BundleError, match="surprise"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "sub/../../outside.onnx", "..\\outside.onnx"]
)
def test_paths_that_leave_the_folder_are_refused(name: str, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    (bundle.parent / "outside.onnx").write_bytes(b"")
    values = json.loads(encode(manifest))
    values["files"][name] = values["files"].pop("decode.onnx")
    values["stages"]["decode"]["file"] = name
    forged = decode_unsealed(values)
    (bundle / "manifest.json").write_bytes(encode(forged))
    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(bundle)


def test_links_that_leave_the_folder_are_refused(bundle: Path) -> None:
    outside = bundle.parent / "weights.bin"
    (bundle / "weights.bin").rename(outside)
    (bundle / "weights.bin").symlink_to(outside)
    with pytest.raises(BundleError, match=r"link that leaves the bundle, .* by cp -rL .* COPY"):
        open_bundle(bundle)


def decode_unsealed(values: dict):  # type: ignore[type-arg, no-untyped-def]
    """A manifest with a digest that fits its (forged) contents."""
    import msgspec

    from runtime.manifest import Manifest

    return seal(msgspec.convert(values, Manifest, strict=False))


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not a bundle manifest"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("command", ["run", "render", "inspect", "validate"])
def test_every_command_refuses_with_exit_code_2(
    command: str, linert: Linert, bundle: Path, tmp_path: Path
) -> None:
    (bundle / "decode.onnx").unlink()
    more = {
        "run": ["--classes", "1", "--out", tmp_path / "out"],
        "render": [tmp_path / "tokens.npz", "--out", tmp_path / "out"],
    }
    (tmp_path / "tokens.npz").write_bytes(b"")
    result = linert(command, bundle, *more.get(command, []))
    assert result.code == 2
    assert "Error: " in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_inspect_tells_costs_without_reading_weights(linert: Linert, bundle: Path) -> None:
    size = (bundle / "weights.bin").stat().st_size
    (bundle / "weights.bin").write_bytes(b"\0" * size)
    result = linert("inspect", bundle)
    assert result.code == 0, result.err
    manifest = open_bundle(bundle, digests=False).manifest
    assert f"{manifest.state_bytes:,}" in result.out
    told = json.loads(linert("inspect", bundle, "--json").out)
    assert told["state_bytes"] == manifest.state_bytes
    assert told["state_bytes_full_cache"] > told["state_bytes"]
    assert told["policies"] == ["linear"]
    assert told["decode_steps"] == 35
