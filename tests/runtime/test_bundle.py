"""A bundle that is not exactly what was written is refused, with the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.manifest import SCHEMA
from linert.runtime.bundles.manifest_file import decode, encode, seal
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.errors import BundleError, RequestError
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
    assert list(manifest.policies) == ["leverage"]
    assert decode(encode(manifest), "manifest.json") == manifest
    assert seal(manifest) == manifest


@pytest.mark.parametrize(
    "name", ["weights.bin", "decode.onnx", "prefill.onnx", "line_end.leverage.onnx", "vq_decoder.onnx"]
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

    from linert.runtime.bundles.manifest import Manifest

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
    assert told["policies"] == ["leverage"]
    assert told["decode_steps"] == 35


def forged(bundle: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    """Change the manifest and seal it again, as somebody who knows the format can."""
    values = json.loads((bundle / "manifest.json").read_text())
    change(values)
    (bundle / "manifest.json").write_bytes(encode(decode_unsealed(values)))


def put(place: str, value: object) -> Callable[[dict], None]:  # type: ignore[type-arg]
    """Set what stands at a place like ``raster.lines`` or ``state.3.shape``."""

    def change(values: dict) -> None:  # type: ignore[type-arg]
        *path, last = (int(part) if part.isdecimal() else part for part in place.split("/"))
        for part in path:
            values = values[part]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[("images", value) for value in (0, -1, 10**6, 10**17)],
        *[("raster/lines", value) for value in (0, 1, -3, 10**15)],
        *[("raster/line_width", value) for value in (1, 10**12)],
        *[("raster/prefix_len", value) for value in (0, -1, 10**9)],
        ("raster/newlines", 2),
        ("capacity_lines", [3]),
        ("capacity_lines", [0, 3]),
        ("capacity_lines", [3, 4]),
        ("capacity_lines", [10**9, 3]),
        ("model/layers", 0),
        ("model/layers", 10**9),
        ("model/vocab_size", -5),
        ("image_decoder/patch", 0),
        ("image_decoder/patch", 10**9),
        ("image_decoder/codebook_size", 0),
        ("condition/num_classes", -1),
        ("policies/leverage/score_window", 10**9),
        ("policies/leverage/score_window", -1),
        *[
            ("policies/leverage/usual", usual)
            for usual in (
                {"policy": "h2o"},
                {"anchor_tokens": 0.5},
                {"": 1},
                {"anchor_tokens": -1},
                {"recent_lines": -0.5},
            )
        ],
        ("stages/decode/inputs/0/shape", [2, 6, 129]),
        ("stages/decode.unfiltered/inputs/0/shape", [12]),
        ("state/0/shape", [-1]),
        ("state/0/shape", [10**15, 10**15, 10**15]),
        ("state/0/shape", [2] * 500),
        ("state/0/dtype", "float8"),
        ("state/0/dtype", "int32"),
        ("state/1/shape", [2, 35]),
        ("state/6/shape", [8, 1, 20, 12]),
        ("state/0/name", "a" * 5000),
        ("state/0/name", "tokens"),
        ("state/0/name", "../x"),
        ("stages/decode/inputs/0/shape", [0]),
        ("stages/decode/in_place", ["nothing"]),
        ("stages/decode/updates", {"a" * 5000: "tokens"}),
        ("stages/vq_decoder/inputs/0/name", "other"),
        ("stages/decode/updates", {}),
        ("stages/vq_decoder/inputs/0/shape", []),
        ("stages/vq_decoder/inputs/0/shape", [2, 35]),
        ("stages/decode/work/macs", -1),
        ("files/weights.bin/bytes", -1),
        ("precision/weights", "float16"),
        ("precision/activations", ""),
        ("precision/image_decoder", "fp8"),
        ("precision/parts", {"output": "int3"}),
        ("precision/method", "magic"),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_allocated(
    place: str, value: object, bundle: Path, linert: Linert
) -> None:
    forged(bundle, put(place, value))
    with pytest.raises(BundleError, match=r"contradicts itself|bytes, the manifest says"):
        open_bundle(bundle, digests=False)
    result = linert("inspect", bundle)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_a_long_setting_is_not_repeated_in_full(bundle: Path) -> None:
    forged(bundle, put("policies/leverage/usual", {"mode": "x" * 5000}))
    with pytest.raises(BundleError, match="contradicts itself") as refused:
        open_bundle(bundle, digests=False)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schedule/widths", [], "no groups, or no stage that draws them"),
        ("schedule/sizes", [], "no groups, or no stage that draws them"),
        ("schedule/sizes", [[]], "groups of 0 tokens in an image of 16"),
        ("schedule/sizes", [[1, 16]], "groups of 17 tokens in an image of 16"),
        ("schedule/sizes", [[0, 16]], "tokens of a group is 0"),
        ("schedule/sizes", [[1, 7, 8], [2, 6, 8]], "two lists of as many groups"),
        ("schedule/sizes", [[1, 15]], "steps that feed 1 tokens and draw 15, which no stage does"),
        ("schedule/widths/0/fed", 10**15, f"for {10**15 + 8} slots"),
        ("schedule/repulsion", -1, "a repulsion of -1"),
    ],
)
def test_groups_that_no_stage_draws_are_refused(
    place: str, value: object, message: str, grouped_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(grouped_bundle, tmp_path / "bundle")
    forged(copy, put(place, value))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy, digests=False)


def swap(one: str, other: str) -> Callable[[dict], None]:  # type: ignore[type-arg]
    def change(values: dict) -> None:  # type: ignore[type-arg]
        stages = values["stages"]
        stages[one], stages[other] = stages[other], stages[one]

    return change


@pytest.mark.parametrize(
    "change",
    [
        swap("decode", "decode.unfiltered"),
        swap("line_end.linear", "line_end.h2o"),
        put("policies/snapkv/score_window", 3),
        put("condition/num_classes", 9),
        put("model/vocab_size", 63),
        put("guided", False),
        put("image_decoder/codebook_size", 63),
    ],
)
def test_stages_run_under_no_manifest_but_their_own(
    change: Callable[[dict], None],  # type: ignore[type-arg]
    many_bundle: Path,
    tmp_path: Path,
    linert: Linert,
) -> None:
    copy = Path(shutil.copytree(many_bundle, tmp_path / "bundle"))
    forged(copy, change)
    result = linert("run", copy, "--classes", 1, "--top-k", 3, "--guidance", 1, "--out", tmp_path / "out")
    assert result.code == 2
    assert "export the bundle again" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"schema": 7, "producer": ' + b'{"a":' * 50_000,
        b'{"schema": 7, "producer": ' + b"[" * 50_000,
        b"\xff\xfe\x00",
        b'{"schema": "\xff"}',
        b'{"schema": 1e400}',
        b'{"schema": 99999999999999999999999999}',
        b"",
        b"null",
        b"7",
    ],
)
def test_what_is_no_manifest_is_said(data: bytes, bundle: Path, linert: Linert) -> None:
    (bundle / "manifest.json").write_bytes(data)
    for size in ((), ("--size", "512x512")):
        result = linert("inspect", bundle, *size)
        assert result.code == 2
        assert "manifest.json" in result.err
        assert "Traceback" not in result.err


def test_a_manifest_that_is_no_file_is_not_read(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    with pytest.raises(BundleError, match="no regular file"):
        open_bundle(bundle)
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"link that leaves|no regular file"):
        open_bundle(bundle)


def test_sizes_that_are_no_sizes_are_refused(bundle: Path) -> None:
    (bundle.parent / "manifest.json").write_text("{}")
    for size in ("../..", "x", "9x9", "../manifest"):
        with pytest.raises(RequestError, match="draws no images of"):
            open_bundle(bundle, size)


def test_files_that_are_replaced_under_an_open_bundle_are_not_used(bundle: Path) -> None:
    from linert.runtime.drawing.generator import Generator

    generator = Generator(bundle)
    generator.generate([1])
    weights = bundle / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    other = bundle / "other"
    other.write_bytes(data)
    other.replace(weights)
    with pytest.raises(BundleError, match=r"weights\.bin was changed since"):
        generator.generate([1], sampling=SamplingSettings(top_k=2))


def test_what_is_drawn_while_a_file_is_written_to_is_thrown_away(bundle: Path) -> None:
    """Weights are mapped: written in place, they change under a session that was loaded."""
    from linert.runtime.drawing.generator import Generator

    generator = Generator(bundle)
    [image] = generator.generate([1])
    with (bundle / "weights.bin").open("r+b") as file:
        file.write(bytes(500_000))
    for draw in (lambda: generator.generate([1]), lambda: generator.decoder(image.tokens[None])):
        with pytest.raises(BundleError, match=r"weights\.bin was written to while"):
            draw()


def test_a_bundle_behind_a_name_that_runtimes_cannot_read_is_named(bundle: Path, linert: Linert) -> None:
    folder = bundle.parent / "gar\udce7on"
    shutil.copytree(bundle, folder)
    for command in (("run", folder, "--classes", 1, "--out", bundle.parent / "out"), ("inspect", folder)):
        result = linert(*command)
        assert result.code == 2
        assert result.err.strip().endswith("is not in UTF-8: rename it")
