"""LlamaGen by caption, from its file to pictures, against the published code's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from random_folder import write_tokenizer
from tokenizers import Tokenizer, processors

from linert.graphs.families import vq
from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import open_bundle
from linert.runtime.bundles.manifest_file import check
from linert.runtime.drawing.caption_encoder import CaptionEncoder
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import BundleError
from tests.conftest import Result, random_state
from tests.golden_weights import golden_outputs, golden_state
from tests.graphs.test_text_encoder import published
from tests.onnxruntime_cuda import cuda_faults

Linert = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The golden model, and an image tokenizer with as many codes."""
    folder = tmp_path_factory.mktemp("captions")
    state = golden_state("t2i")
    torch.save({"model": state}, folder / "t2i.pt")
    codes = len(state["tok_embeddings.weight"])
    config = vq.VQConfig(codebook_size=codes, code_dim=8, z_channels=32, channels=(32, 32), res_blocks=1)
    torch.save({"model": random_state(vq.VQModel(config, encoder=True))}, folder / "vq.pt")
    return folder / "t2i.pt", folder / "vq.pt"


@pytest.fixture(scope="module")
def bundle(files: tuple[Path, Path], linert: Linert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batch 2, all lines; guidance and top-k are the authors'."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    options = ("--grid", 8, "--heads", 2, "--batch", 2, "--policy", "full,linear")
    result = linert("export", files[0], "--vq", files[1], *options, "--out", out)
    assert result.code == 0, result.err
    assert "draws features of captions, " in " ".join(result.err.split())
    return out


def features(path: Path) -> Path:
    """The golden captions as text encoders leave them: zeros behind each."""
    golden = golden_outputs("t2i_greedy_cfg7.5")
    rows = np.zeros_like(golden["caption_emb"])
    for row, (values, mask) in enumerate(zip(golden["caption_emb"], golden["emb_mask"], strict=True)):
        seen = values[mask != 0]
        rows[row, : len(seen)] = seen
    np.save(path, rows)
    return path


def test_the_published_tokens_are_drawn(bundle: Path, linert: Linert, tmp_path: Path) -> None:
    saved = tmp_path / "tokens.npz"
    captions = features(tmp_path / "captions.npy")
    result = linert(
        "run", bundle, "--captions", captions, "--greedy", "--out", tmp_path / "out", "--save-tokens", saved
    )
    assert result.code == 0, result.err
    with np.load(saved) as arrays:
        assert (arrays["tokens"] == golden_outputs("t2i_greedy_cfg7.5")["tokens"]).all()
    assert len(list((tmp_path / "out").glob("captions-npy-0_*.png"))) == 1


def test_a_trace_of_captions_needs_their_features(bundle: Path, linert: Linert, tmp_path: Path) -> None:
    captions, trace = features(tmp_path / "captions.npy"), tmp_path / "trace.npz"
    cache = ("--policy", "linear", "--budget-lines", 3, "--record-trace", trace)
    result = linert("run", bundle, "--captions", captions, *cache, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    again = ("run", bundle, "--replay-trace", trace, "--out", tmp_path / "again")
    result = linert(*again)
    assert result.code == 2
    assert "give them with --captions" in result.err
    result = linert(*again, "--captions", captions)
    assert result.code == 0, result.err
    assert "100.00%" in result.err
    result = linert("validate", bundle, "--trace", trace, "--captions", captions)
    assert result.code == 0, result.out + result.err


def test_it_is_proven_with_noise_where_no_captions_are_given(bundle: Path, linert: Linert) -> None:
    result = linert("validate", bundle, "--policy", "linear", "--budget-lines", 3)
    assert result.code == 0, result.out + result.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("no array"), "is no .npy file"),
        (lambda path: np.save(path, np.zeros((3, 7), np.float32)), "must be real numbers of shape [length, "),
        (lambda path: np.save(path, np.zeros((2, 3, 32), np.float32)), "nothing but zeros"),
        (lambda path: np.save(path, np.ones((130, 32), np.float32)), "room for 120"),
        (lambda path: np.save(path, np.full((3, 32), np.nan, np.float32)), "not finite"),
        (lambda path: np.save(path, np.ones(4, np.float32)), "must hold one array of features"),
    ],
)
def test_features_that_do_not_fit(
    make: Callable[[Path], None], message: str, bundle: Path, linert: Linert, tmp_path: Path
) -> None:
    path = tmp_path / "features.npy"
    make(path)
    result = linert("run", bundle, "--captions", path, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_prompts_and_classes_are_refused(bundle: Path, linert: Linert, tmp_path: Path) -> None:
    for asked in (("--prompt", "a fox"), ("--classes", 1)):
        result = linert("run", bundle, *asked, "--out", tmp_path / "out")
        assert result.code == 2
        assert "give them with --captions FILE.npy" in result.err


def test_integers_are_calibrated_on_captions(
    files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    export = ("export", files[0], "--vq", files[1], "--grid", 8, "--heads", 2, "--precision", "int8")
    result = linert(*export, "--out", tmp_path / "bundle")
    assert result.code == 2
    assert "--calibration-captions FILE.npy" in result.err
    captions = features(tmp_path / "captions.npy")
    calibration = ("--calibration-captions", captions, "--calibration-images", 2)
    result = linert(*export, *calibration, "--out", tmp_path / "bundle")
    assert result.code == 0, result.err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny T5 encoder of the width that the golden model sees, in the layout of the transformers library."""
    model = published(dim=32)
    folder = tmp_path_factory.mktemp("t5") / "t5"
    model.save_pretrained(folder)
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(tokenizer, ("</s>", "<unk>"), 290)
    whole = Tokenizer.from_file(str(tokenizer))
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    whole.save(str(tokenizer))
    return model, folder


def test_prompts_pass_the_text_encoder(
    files: tuple[Path, Path], encoder: tuple[Any, Path], linert: Linert, tmp_path: Path
) -> None:
    """A prompt draws what features from the transformers library draw."""
    model, folder = encoder
    bundle = tmp_path / "bundle"
    options = ("--grid", 8, "--heads", 2, "--text-encoder", folder, "--batch", 2)
    result = linert("export", files[0], "--vq", files[1], *options, "--out", bundle)
    assert result.code == 0, result.err
    prompts = ("A red fox,   <b>sitting</b> in snow https://x.example/y", "oranges &amp; light")
    cleaned = ("a red fox, sitting in snow", "oranges & light")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = np.zeros((2, 120, 32), np.float32)
    for row, text in enumerate(cleaned):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == 0
        with torch.no_grad():
            rows[row, : len(ids)] = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    np.save(tmp_path / "captions.npy", rows)

    def tokens(name: str, *asked: object) -> np.ndarray:
        saved = tmp_path / f"{name}.npz"
        result = linert("run", bundle, *asked, "--greedy", "--out", tmp_path / name, "--save-tokens", saved)
        assert result.code == 0, result.err
        with np.load(saved) as arrays:
            return arrays["tokens"]

    texts = [part for prompt in prompts for part in ("--prompt", prompt)]
    wanted = tokens("features", "--captions", tmp_path / "captions.npy")
    assert (tokens("prompts", *texts) == wanted).all()
    assert not cuda_faults(bundle)
    assert (tokens("away", *texts, "--negative-prompt", "blurred") != wanted).any()
    result = linert("validate", bundle)
    assert result.code == 0, result.out + result.err
    result = linert("run", bundle, "--prompt", "word " * 200, "--out", tmp_path / "long")
    assert result.code == 2
    assert "trained with at most 120" in result.err
    # A bundle of before, whose tokenizer was not held to the encoder's table.
    extended = Tokenizer.from_file(str(folder / "tokenizer.json"))
    extended.add_tokens([f"word{number}" for number in range(100)])
    extended.save(str(tmp_path / "tokenizer.json"))
    opened = open_bundle(bundle)
    encode = CaptionEncoder(
        lambda: BackendOptions().open(opened, ["text_encoder"]),
        lambda: TextTokenizer(tmp_path / "tokenizer.json"),
        120,
    )
    assert encode(cleaned[0]).any()
    with pytest.raises(BundleError, match="no embedding for a token of 'word99'"):
        encode("word99")


def test_an_encoder_of_another_width_is_refused(
    files: tuple[Path, Path],
    tiny_files: tuple[Path, Path],
    encoder: tuple[Any, Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    options = ("--text-encoder", encoder[1], "--out", tmp_path / "bundle")
    result = linert("export", tiny_files[0], "--vq", tiny_files[1], "--grid", 6, "--heads", 4, *options)
    assert result.code == 2
    assert "no features of captions: leave --text-encoder out" in " ".join(result.err.split())
    result = linert(
        "export",
        files[0],
        "--vq",
        files[1],
        "--grid",
        8,
        "--heads",
        2,
        "--text-encoder",
        files[0],
        *options[2:],
    )
    assert result.code == 2
    assert "is not a T5 encoder" in result.err


def test_features_are_as_wide_as_what_the_model_takes(bundle: Path) -> None:
    """Commands that are given no features make some, of whatever width the manifest says."""
    manifest = open_bundle(bundle, digests=False).manifest
    wide = msgspec.structs.replace(manifest.condition, feature_dim=10**6)
    with pytest.raises(BundleError, match="features of"):
        check(msgspec.structs.replace(manifest, condition=wide))
