"""Weights below float32: the integers themselves, how they lie in a bundle, and what they cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from linert.exporter.bundle_export import export_bundle
from linert.exporter.calibration import gptq
from linert.exporter.commands.export_options import parse_parts
from linert.exporter.parity_report import Bounds, cost_of
from linert.exporter.precision import (
    Method,
    Precision,
    PrecisionSettings,
    Range,
    best_scales,
    pack_int4,
    round_to_nearest,
)
from linert.exporter.sources import Checkpoints, request_like
from linert.runtime.backends.ort import DISABLED_OPTIMIZERS, INTEGER_PRODUCTS
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.manifest import PrecisionSpec
from linert.runtime.errors import ExportError
from tests.conftest import ROOT, TINY, Result
from tests.onnxruntime_cuda import cuda_faults

Files = tuple[Path, Path]
OPTIONS = ("--grid", 6, "--heads", 4, "--batch", 2, "--budget-lines", 3)


@pytest.fixture(scope="session")
def precise(export: Callable[..., Path], tiny_files: Files) -> Callable[..., Path]:
    """A tiny bundle of some precision, made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(*options: object) -> Path:
        if options not in made:
            made[options] = export(*tiny_files, *OPTIONS, *options)
        return made[options]

    return make


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), block=st.sampled_from([0, 16, 32]), bits=st.sampled_from([8, 4]))
def test_rounding_moves_no_unclipped_weight_by_more_than_half_a_step(
    seed: int, block: int, bits: int
) -> None:
    weight = weights(5, 64, seed)
    rounded = round_to_nearest(weight, bits, block)
    size = block or 64
    steps = rounded.scales.reshape(5, -1).repeat_interleave(size, 1)
    limit = 127 if bits == 8 else 7
    inside = weight.abs() <= limit * steps
    error = (rounded.dequantized() - weight).abs()
    assert (error <= 0.5001 * steps)[inside].all()
    assert rounded.values.abs().max() <= limit
    # Clipping is chosen only where it lowers the squared error.
    largest = weight.reshape(5, -1, size).abs().amax(-1) / limit
    plain = (weight.reshape(5, -1, size) / largest[..., None]).round() * largest[..., None]
    assert error.square().sum() <= (plain.reshape(5, 64) - weight).square().sum() * (1 + 1e-5)


def test_weights_on_the_grid_are_exact() -> None:
    values = torch.randint(-7, 8, (3, 32), generator=torch.Generator().manual_seed(1))
    values[:, ::16] = 7
    rounded = round_to_nearest(values * 0.25, 4, 16)
    assert torch.equal(rounded.values, values.to(torch.int8))
    assert torch.equal(rounded.dequantized(), values * 0.25)


def test_scales_do_not_depend_on_what_is_searched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(7, 3, 16, generator=generator)
    of_all, of_each = (torch.rand(n, 3, 16, generator=generator) for n in (1, 7))
    for importance in (None, of_all, of_each):
        whole = best_scales(groups, 4, importance)
        with monkeypatch.context() as patch:
            patch.setattr("linert.exporter.precision.SEARCHED_TOGETHER", 2 * 3 * 16)
            assert (best_scales(groups, 4, importance) == whole).all()


def test_a_row_of_zeros_stays_zero() -> None:
    assert not round_to_nearest(torch.zeros(2, 32), 4, 16).dequantized().any()


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_nibbles_are_onnxs(values: list[int]) -> None:
    tensor = helper.make_tensor("x", TensorProto.INT4, [len(values)], values)
    packed = pack_int4(torch.tensor(values, dtype=torch.int8)).numpy().tobytes()
    raw = TensorProto(data_type=TensorProto.INT4, dims=[len(values)], raw_data=packed)
    assert np.array_equal(numpy_helper.to_array(raw).astype(int), numpy_helper.to_array(tensor).astype(int))


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 0)])
def test_gptq_changes_outputs_less_than_rounding(bits: int, block: int) -> None:
    weight = weights(48, 64)
    # Inputs that go together, as those of a real layer do.
    samples = weights(2000, 12, 1) @ weights(12, 64, 2) + 0.3 * weights(2000, 64, 3)
    compensated = gptq(weight, samples.T @ samples, bits, block)
    rounded = round_to_nearest(weight, bits, block)

    def error(dequantized: torch.Tensor) -> float:
        return float((samples @ (dequantized - weight).T).square().mean())

    assert error(compensated.dequantized()) < 0.6 * error(rounded.dequantized())
    assert compensated.values.abs().max() <= (7 if bits == 4 else 127)


def test_gptq_of_independent_inputs_is_rounding() -> None:
    weight = weights(8, 32)
    compensated, rounded = gptq(weight, torch.eye(32), 4, 16), round_to_nearest(weight, 4, 16)
    assert torch.equal(compensated.values, rounded.values)


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    hessian = torch.eye(32)
    hessian[3, 3] = 0
    assert gptq(weights(8, 32), hessian, 4, 16).dequantized().isfinite().all()


HALVES = [
    ("--precision", "fp16"),
    ("--precision", "bf16"),
    ("--precision", "fp16", "--activations", "fp16"),
]


def check_costs(bundle: Path, linert: Callable[..., Result]) -> None:
    result = linert("validate", bundle, "--json")
    report = json.loads(result.out)
    assert result.code == 0, report["checks"]
    assert report["runs"]["1"]["tokens_agreement"] is None
    # What is called cheaper must be measurably coarser than float32.
    assert report["logits"]["max_abs"] > 5 * Bounds.logits


@pytest.mark.parametrize("options", HALVES)
def test_halves_cost_what_they_may(
    options: tuple[object, ...], precise: Callable[..., Path], linert: Callable[..., Result]
) -> None:
    check_costs(precise(*options), linert)


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "int8"),
        ("--precision", "int4"),
        ("--precision", "int4", "--block-size", 16, "--quantization", "rtn", "--keep", "first=fp16"),
        ("--precision", "int8", "--keep", "embedding=int8"),
    ],
)
def test_integers_cost_a_trained_model_what_they_may(
    options: tuple[object, ...], export: Callable[..., Path], linert: Callable[..., Result]
) -> None:
    demo = ROOT / "demo"
    sizes = ("--grid", 16, "--heads", 4, "--batch", 2, "--guidance", 3, "--calibration-images", 3)
    # With a quarter of the lines the default policy keeps some of what the lower half repeats, and there what is said hangs on every
    # rounding; linear has lost it all the same.
    policy = ("--policy", "linear")
    check_costs(export(demo / "c2i_pairs.pt", demo / "vq_pairs.pt", *sizes, *policy, *options), linert)


def test_a_precision_that_costs_more_fails(
    precise: Callable[..., Path], linert: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from linert.exporter import parity_report
    from linert.exporter.commands.validate import command

    bundle = precise("--precision", "int4")
    monkeypatch.setitem(parity_report.COSTS, "int4", parity_report.COSTS["fp16"])
    result = CliRunner().invoke(command, [str(bundle), "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["checks"][0]["passed"]


def test_a_mixture_may_cost_what_its_coarsest_part_may() -> None:
    mixed = PrecisionSpec("fp16", "fp32", {"output": "int4"}, 32, "rtn", "fp32")
    assert cost_of(mixed) == cost_of(PrecisionSpec("int4", "fp16", {}, 32, "rtn", "fp32"))
    assert cost_of(PrecisionSpec("fp32", "fp32", {}, 32, "none", "fp32")) is None


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        (PrecisionSettings(weights=Precision.INT8), "an image decoder in int8"),
        (
            PrecisionSettings(weights=Precision.INT4, method=Method.GPTQ, image_decoder=Precision.FP16),
            "by gptq",
        ),
    ],
)
def test_a_bundle_that_was_not_calibrated_is_refused(
    precision: PrecisionSettings, words: str, precise: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = open_bundle(precise("--precision", "fp16"))
    request = request_like(bundle, *Checkpoints.find(bundle).load(), precision)
    with pytest.raises(ExportError, match=words):
        export_bundle(request, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def initializers(bundle: Path, stage: str = "decode") -> dict[str, onnx.TensorProto]:
    model = onnx.load(bundle / f"{stage}.onnx")
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_integers_lie_in_the_file_as_they_were_found(precise: Callable[..., Path], tiny_files: Files) -> None:
    tensors = initializers(precise("--precision", "int4", "--quantization", "rtn"))
    state = torch.load(tiny_files[0], weights_only=True)["model"]
    name = "layers.1.feed_forward.w2.weight"
    wanted = round_to_nearest(state[name], 4, TINY.ffn_dim)
    values, scales = tensors[f"model.{name}.T.int4"], tensors[f"model.{name}.scale"]
    assert np.array_equal(numpy_helper.to_array(values).astype(np.int8), wanted.values.T.numpy())
    np.testing.assert_allclose(numpy_helper.to_array(scales), wanted.scales.T.numpy(), rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_only_looked_up_rows_of_a_narrow_table_are_widened(
    precision: str, precise: Callable[..., Path]
) -> None:
    graph = onnx.load(precise("--precision", precision) / "decode.onnx", load_external_data=False).graph
    kind = TensorProto.BFLOAT16 if precision == "bf16" else TensorProto.FLOAT16
    [table] = [tensor for tensor in graph.initializer if "tok_embeddings" in tensor.name]
    assert table.data_type == kind
    [lookup] = [node for node in graph.node if table.name in node.input]
    assert lookup.op_type == "Gather"
    [reader] = [node for node in graph.node if lookup.output[0] in node.input]
    assert reader.op_type == "Cast"


def test_parts_can_be_kept(precise: Callable[..., Path]) -> None:
    bundle = precise(
        "--precision", "int4", "--quantization", "rtn", "--keep", "output=int8", "--keep", "first=fp16"
    )
    kinds = {name: TensorProto.DataType.Name(t.data_type) for name, t in initializers(bundle).items()}
    assert kinds["model.output.weight.T.int8"] == "INT8"
    assert kinds["model.layers.0.attention.wo.weight.T"] == "FLOAT16"
    assert kinds["model.layers.1.attention.wo.weight.T.int4"] == "INT4"
    assert open_bundle(bundle).manifest.precision == PrecisionSpec(
        "int4", "fp32", {"output": "int8", "0": "fp16", "embedding": "fp16"}, 128, "rtn", "int8"
    )


@pytest.mark.parametrize(
    ("inputs", "format"), [(256, (4, 128)), (192, (4, 64)), (112, (4, 16)), (8, (8, 0)), (100, (8, 0))]
)
def test_blocks_shrink_until_they_divide_the_inputs(inputs: int, format: tuple[int, int]) -> None:
    assert PrecisionSettings(weights=Precision.INT4).integer_format(inputs, Precision.INT4) == format


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_keeps_the_weights_in_integers(
    precision: str, precise: Callable[..., Path], tmp_path: Path
) -> None:
    """A weight that is widened before its product costs more time than float32 and all of its memory."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INTEGER_PRODUCTS)
    path = precise("--precision", precision) / "decode.onnx"
    ort.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS)
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["MatMulNBits"] == 4 * TINY.layers + 1
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {int(INTEGER_PRODUCTS)}


def test_halves_are_cached_in_halves(precise: Callable[..., Path]) -> None:
    narrow = open_bundle(precise("--precision", "fp16", "--activations", "fp16")).manifest
    wide = open_bundle(precise("--precision", "fp16")).manifest
    kinds = {spec.name.split(".")[0]: spec.dtype for spec in narrow.state}
    assert (kinds["k_cache"], kinds["v_cache"], kinds["scores"]) == ("float16", "float16", "float32")
    halved = sum(spec.nbytes for spec in wide.state if "cache" in spec.name or spec.name == "condition")
    assert wide.state_bytes - narrow.state_bytes == halved // 2


def test_bf16_activations_are_refused_on_the_cpu(
    precise: Callable[..., Path], linert: Callable[..., Result], tmp_path: Path
) -> None:
    bundle = precise("--precision", "bf16", "--activations", "bf16")
    result = linert("run", bundle, "--classes", 1, "--out", tmp_path / "out")
    assert result.code == 2
    assert "--activations fp32" in result.err


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "fp16", "--activations", "fp16"),
        ("--precision", "bf16", "--activations", "bf16"),
        ("--precision", "int8"),
        ("--precision", "int4"),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_onnxruntime_has_cuda_kernels_for_what_is_stored_so(
    precise: Callable[..., Path], options: tuple[str, ...]
) -> None:
    assert not cuda_faults(precise(*options))


def test_files_shrink(precise: Callable[..., Path], tiny_bundle: Path) -> None:
    sizes = [
        (bundle / "weights.bin").stat().st_size
        for bundle in (
            tiny_bundle,
            precise("--precision", "int8"),
            precise("--precision", "int4"),
        )
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_an_image_does_not_depend_on_its_company(
    precise: Callable[..., Path], linert: Callable[..., Result], tmp_path: Path
) -> None:
    bundle = precise("--precision", "int4")
    for name, classes in (("alone", "3"), ("beside", "3,1")):
        result = linert("run", bundle, "--classes", classes, "--out", tmp_path / name)
        assert result.code == 0, result.err
    alone, beside = (sorted((tmp_path / name).glob("class_0003_*.png"))[0] for name in ("alone", "beside"))
    assert alone.read_bytes() == beside.read_bytes()


def test_parts_are_named_as_people_name_them() -> None:
    parts = parse_parts(["first=int8", "last=fp16", "output=int8", "3=bf16"], 12)
    assert parts == {"0": Precision.INT8, "11": Precision.FP16, "output": Precision.INT8, "3": Precision.BF16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", "12=int8"), "0 to 1"),
        (("--keep", "output=int3"), "int3"),
        (("--block-size", 24), "power of two"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_wrong_precisions_are_refused(
    options: tuple[object, ...], words: str, linert: Callable[..., Result], tiny_files: Files, tmp_path: Path
) -> None:
    result = linert(
        "export", tiny_files[0], "--vq", tiny_files[1], *OPTIONS, *options, "--out", tmp_path / "b"
    )
    assert result.code == 2
    assert words in result.err
    assert not (tmp_path / "b").exists()


@given(low=st.floats(-100, 100), width=st.floats(0, 100))
def test_a_range_holds_zero_and_its_ends(low: float, width: float) -> None:
    high = low + width
    span = Range.of(low, high)
    assert 0 <= span.zero <= 255
    assert (0 - span.zero) * span.scale <= min(low, 0) + 0.51 * span.scale
    assert (255 - span.zero) * span.scale >= max(high, 0) - 0.51 * span.scale


def test_the_image_decoder_computes_in_integers(precise: Callable[..., Path], tmp_path: Path) -> None:
    """Every 3 x 3 convolution of the blocks, by ONNX Runtime's own account."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(
        precise("--precision", "int8") / "vq_decoder.onnx", options, ["CPUExecutionProvider"]
    )
    kinds = Counter(
        n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    # Two levels of two residual blocks, and one change of resolution.
    assert kinds["QLinearConv"] == 2 * 2 * 2 + 1


def test_the_image_decoders_precision_is_a_choice(precise: Callable[..., Path]) -> None:
    bundle = precise("--precision", "int4", "--quantization", "rtn", "--image-decoder-precision", "fp16")
    manifest = open_bundle(bundle).manifest
    assert manifest.precision.image_decoder == "fp16"
    tensors = initializers(bundle, "vq_decoder")
    kinds = {t.data_type for name, t in tensors.items() if name.endswith("conv1.weight")}
    assert kinds == {TensorProto.FLOAT16}
    assert open_bundle(precise("--precision", "int4")).manifest.precision.image_decoder == "int8"


def test_what_a_precision_costs_is_told_in_metrics(
    precise: Callable[..., Path], linert: Callable[..., Result], tmp_path: Path
) -> None:
    source = tmp_path / "brightness.py"
    source.write_text(
        "import numpy as np\n"
        "from linert.runtime.measuring.metrics import FrechetDistance, Metric\n"
        "class Brightness(Metric):\n"
        "    name, higher_is_better = 'brightness', True\n"
        "    def measure(self, pixels, classes):\n"
        "        return pixels.mean((1, 2, 3), dtype=np.float64)[:, None]\n"
        "    def score(self, rows):\n"
        "        return float(rows.mean())\n"
        "def metrics():\n"
        "    real = np.random.default_rng(0).normal(size=(50, 1))\n"
        "    return [Brightness(), FrechetDistance(lambda pixels: pixels.mean((2, 3))[:, :1], real)]\n"
    )
    options = ("--metrics", source, "--samples", 6)
    result = linert("validate", precise("--precision", "fp16"), *options, "--json")
    assert result.code == 0, result.err
    cost, distance = json.loads(result.out)["quality"]
    assert distance["bundle"]["low"] <= distance["bundle"]["value"] <= distance["bundle"]["measured"]
    told = linert("validate", precise("--precision", "fp16"), *options).out
    assert "without its bias" in " ".join(told.split())
    assert max(map(len, told.splitlines())) <= 100
    assert cost["metric"] == "brightness"
    difference = cost["difference"]
    assert difference["value"] == pytest.approx(cost["bundle"]["value"] - cost["float32"]["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
