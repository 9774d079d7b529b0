"""Numbers that a bundle could not hold are found before it is written, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linert.exporter.bundle_request import BundleRequest
from linert.exporter.cache_wishes import CacheWishes
from linert.exporter.calibration import Calibration, calibrated, with_integer_decoder
from linert.exporter.models import (
    LoadedImageDecoder,
    LoadedTransformer,
    ModelRequest,
    load_image_decoder,
    load_models,
)
from linert.exporter.precision import Method, Precision, PrecisionSettings, largest_of, round_to_nearest
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.errors import CheckpointError, ExportError
from tests.conftest import TINY, Result
from tests.exporter.test_checkpoint import weights
from tests.text_models import write_tiny_janus

Linert = Callable[..., Result]
WIDE, TABLE, VECTOR = "layers.0.attention.wqkv.weight", "tok_embeddings.weight", "norm.weight"


def request_with(
    folder: Path, decoder: Path, name: str, value: float, precision: PrecisionSettings
) -> BundleRequest:
    """A bundle of weights one of which has a number of ``value``."""
    state = weights()
    state[name] = state[name].double()
    state[name].view(-1)[7] = value
    torch.save({"model": state}, folder / "model.pt")
    loaded = load_models(folder / "model.pt", decoder, ModelRequest(grid=TINY.grid, heads=TINY.heads))
    return request_of(*loaded, precision)


def request_of(
    transformer: LoadedTransformer, image_decoder: LoadedImageDecoder, precision: PrecisionSettings
) -> BundleRequest:
    """The export of one image at a time with the full cache."""
    [shape] = CacheWishes(("full",), CacheRequest()).settle(transformer, guided=False)
    return BundleRequest(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=shape.policies,
        capacity_lines=shape.capacity_lines,
        cache=shape.cache,
        images=1,
        sampling=SamplingSettings(),
        precision=precision,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WIDE, TABLE, VECTOR])
def test_a_number_that_is_not_finite_names_its_tensor(
    name: str, value: float, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    request = request_with(tmp_path, tiny_files[1], name, value, PrecisionSettings())
    with pytest.raises(CheckpointError, match=rf"model\.pt: {name} holds numbers that are not finite"):
        request.check_numbers()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nothing_is_written_of_it(
    precision: str, tiny_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    state = weights()
    state[WIDE][3, 5] = float("nan")
    model = tmp_path / "model.pt"
    torch.save({"model": state}, model)
    options = ("--grid", 6, "--heads", 4, "--precision", precision, "--out", tmp_path / "bundle")
    result = linert("export", model, "--vq", tiny_files[1], *options)
    assert result.code == 2
    assert f"{WIDE} holds numbers that are not finite" in " ".join(result.err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


FP16 = PrecisionSettings(weights=Precision.FP16)
HALVES = PrecisionSettings(weights=Precision.FP32, activations=Precision.FP16)
INT8 = PrecisionSettings(weights=Precision.INT8, image_decoder=Precision.FP16)
INT4 = PrecisionSettings(weights=Precision.INT4, method=Method.RTN, image_decoder=Precision.FP16)


@pytest.mark.parametrize(
    ("precision", "name", "value", "message"),
    [
        (FP16, WIDE, 70000.0, "is to be stored in fp16, which ends at 65504: give --keep 0=fp32"),
        (FP16, TABLE, 70000.0, "is to be stored in fp16, which ends at 65504: give --keep embedding=fp32"),
        (FP16, VECTOR, 70000.0, None),
        (FP16, WIDE, 65504.0, None),
        (FP16, WIDE, 65519.0, None),
        (FP16, WIDE, 65521.0, "is to be stored in fp16"),
        (HALVES, VECTOR, 70000.0, "is to be stored in fp16"),
        (HALVES, WIDE, 70000.0, "is to be computed with in fp16, .*give --activations fp32"),
        (INT8, WIDE, 70000.0, None),
        (INT4, WIDE, 70000.0, None),
        (replace(INT4, activations=Precision.FP16), WIDE, 70000.0, "is to be stored in fp16"),
        (replace(INT8, parts={"embedding": Precision.INT8}), TABLE, 70000.0, None),
        (INT8, TABLE, 70000.0, "is to be stored in fp16"),
        (PrecisionSettings(weights=Precision.BF16), WIDE, 3.4e38, "is to be stored in bf16"),
        (PrecisionSettings(weights=Precision.BF16), WIDE, 1e38, None),
        (PrecisionSettings(), WIDE, 1e300, "is to be stored in fp32, .*no precision here holds them"),
    ],
)
def test_numbers_beyond_what_they_are_stored_in_are_refused(
    precision: PrecisionSettings,
    name: str,
    value: float,
    message: str | None,
    tiny_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    request = request_with(tmp_path, tiny_files[1], name, value, precision)
    if message is None:
        request.check_numbers()
        return
    with pytest.raises(ExportError, match=f"{name} holds numbers up to .*{message}"):
        request.check_numbers()


@pytest.mark.parametrize(
    ("value", "precision", "message"),
    [
        (
            float("nan"),
            PrecisionSettings(),
            r"vq\.pt: decoder\.conv_out\.weight holds numbers that are not finite",
        ),
        (70000.0, FP16, "give --image-decoder-precision fp32"),
        (70000.0, PrecisionSettings(), None),
    ],
)
def test_the_image_decoder_is_looked_at_too(
    value: float,
    precision: PrecisionSettings,
    message: str | None,
    tiny_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    state = torch.load(tiny_files[1])["model"]
    state["decoder.conv_out.weight"].view(-1)[0] = value
    torch.save({"model": state}, tmp_path / "vq.pt")
    request = request_with(tmp_path, tmp_path / "vq.pt", WIDE, 1.0, precision)
    if message is None:
        request.check_numbers()
        return
    with pytest.raises((CheckpointError, ExportError), match=message):
        request.check_numbers()


def test_a_tensor_that_is_folded_is_called_by_the_file_s_name(tmp_path: Path) -> None:
    folder = write_tiny_janus(tmp_path / "janus", {"vision_config": {"image_size": 8}})
    state = load_file(folder / "model.safetensors")
    state["gen_embed.weight"][5, 1] = float("inf")
    save_file(state, folder / "model.safetensors")
    loaded = load_models(folder, None, ModelRequest())
    request = request_of(*loaded, PrecisionSettings())
    with pytest.raises(CheckpointError, match=r": gen_embed\.weight holds numbers that are not finite"):
        request.check_numbers()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_the_largest_number_is_found_in_every_type(dtype: torch.dtype) -> None:
    assert largest_of(torch.tensor([[0.5, -3.0], [2.0, 0.0]]).to(dtype)) == 3.0
    assert largest_of(torch.tensor([1.0, float("nan"), 2.0]).to(dtype)) is None


def test_a_calibration_of_what_cannot_be_computed_is_refused(
    tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Finite weights whose products are not."""
    precision = PrecisionSettings(weights=Precision.INT4, method=Method.GPTQ, image_decoder=Precision.FP16)
    request = request_with(tmp_path, tiny_files[1], "output.weight", 3e38, precision)
    with pytest.raises(ExportError, match="computes numbers that are not finite"):
        calibrated(request, Calibration(images=1), report=lambda line: None)


def test_a_bias_fits_its_integer_where_a_channel_s_weights_are_nothing(
    tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    state = torch.load(tiny_files[1])["model"]
    name = "decoder.conv_blocks.1.res.0.conv1"
    state[f"{name}.weight"][3] *= 1e-12
    state[f"{name}.bias"][3] = -0.75
    torch.save({"model": state}, tmp_path / "vq.pt")
    decoder: Any = load_image_decoder(tmp_path / "vq.pt")
    tokens = torch.randint(64, (2, 36), generator=torch.Generator().manual_seed(0))
    settings = with_integer_decoder(
        PrecisionSettings(weights=Precision.INT8), decoder, tokens, Raster(1, 6, 6)
    )
    quantized = settings.convolutions[f"{name}.weight"]
    # ONNX Runtime makes an integer of it, of the scale of what is added up, where it multiplies integers.
    scales = quantized.input.scale * quantized.weight.scales.flatten()
    assert (quantized.bias / scales).abs().max() < 2**31 - 1
    plain = round_to_nearest(decoder.tensors[f"{name}.weight"].flatten(1), 8)
    others = torch.arange(len(plain.scales)) != 3
    assert torch.equal(quantized.weight.scales[others], plain.scales[others])
