"""Lumina-mGPT from its folder to pictures by the command line, against the transformers library's Chameleon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from random_folder import lumina_vocabulary, write_shards
from tokenizers import Tokenizer

from linert.graphs.families import lumina, vq
from linert.graphs.policies import POLICIES
from linert.runtime.bundles.bundle import open_bundle
from tests.conftest import Result, random_state
from tests.graphs.test_lumina import chameleon
from tests.onnxruntime_cuda import cuda_faults
from tests.text_models import (
    LUMINA_CODES,
    LUMINA_FIRST,
    LUMINA_TEXT,
    LUMINA_VQ,
    PRECISIONS,
    broken,
    check_precision,
    parts,
    without,
    write_lumina,
)

Linert = Callable[..., Result]
PROMPTS = ("a red fox", "a bowl of oranges on a table")


@pytest.fixture(scope="module", params=["7B", "34B"])
def lumina_files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    large = request.param == "34B"
    folder = tmp_path_factory.mktemp("lumina") / "tiny"
    return write_lumina(folder, swin_norm=large, kv_heads=2 if large else 4)


def test_lumina_draws_images_of_the_size_asked_for(
    lumina_files: tuple[Path, Path], linert: Linert, tmp_path: Path
) -> None:
    folder, image_decoder = lumina_files
    bundle = tmp_path / "bundle"
    size = ("--size", "256x64", "--prompt-tokens", 64)
    result = linert(
        "export", folder, "--vq", image_decoder, "--out", bundle, *size, "--batch", 2, "--budget-lines", 2
    )
    assert result.code == 0, result.err
    assert "Lumina-mGPT in" in " ".join(result.err.split())
    saved = tmp_path / "tokens.npz"
    asked = ("--prompt", "a red fox", "--prompt", "a forest at the edge of snow", "--save-tokens", saved)
    result = linert("run", bundle, *asked, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    [picture, _] = sorted((tmp_path / "out").glob("a-*_seed_*.png"))
    with PIL.Image.open(picture) as image:
        assert image.size == (256, 64)
    with np.load(saved) as arrays:
        lines = arrays["tokens"].reshape(2, 4, 17)
    assert (lines[:, :, -1] == LUMINA_CODES).all()
    assert lines[:, :, :-1].max() < LUMINA_CODES
    result = linert("validate", bundle, "--json")
    assert result.code == 0, result.err + result.out
    _same_pixels_as_chameleon(bundle, saved, linert, tmp_path)


def _same_pixels_as_chameleon(bundle: Path, saved: Path, linert: Linert, tmp_path: Path) -> None:
    """Pixels are those of the codes that the names of the drawn image tokens spell."""
    pixels = tmp_path / "pixels.npz"
    result = linert("render", bundle, saved, "--out", tmp_path / "again", "--save-pixels", pixels)
    assert result.code == 0, result.err
    names = {number: name for name, number in lumina_vocabulary(LUMINA_CODES, LUMINA_FIRST).items()}
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    with np.load(saved) as arrays:
        drawn = arrays["tokens"].reshape(2, 4, 17)[:, :, :-1]
    codes = np.vectorize(lambda token: int(names[LUMINA_FIRST + token][6:-1].translate(digits)))(drawn)
    net = vq.VQModel(LUMINA_VQ, encoder=True)
    net.load_state_dict(random_state(net))
    with torch.no_grad(), np.load(pixels) as arrays:
        wanted = net.decode(torch.from_numpy(codes))
        np.testing.assert_allclose(arrays["pixels"], wanted.numpy(), atol=2e-5, rtol=0)


@torch.no_grad()
def chameleons_tokens(model: Any, prompt: list[int], lines: int, columns: int, guidance: float) -> list[int]:
    """Ids that the library's model draws greedily, with the published grammar and unconditional stream."""
    names = lumina_vocabulary(LUMINA_CODES, LUMINA_FIRST)
    newline, images = names[lumina.NEWLINE], slice(LUMINA_FIRST, LUMINA_FIRST + LUMINA_CODES)
    drawn: list[int] = []
    for index in range(lines * (columns + 1)):
        if (index + 1) % (columns + 1) == 0:
            drawn.append(newline)
            continue
        conditional, unconditional = (
            model.lm_head(model.model(input_ids=torch.tensor([[*prefix, *drawn]])).last_hidden_state)[
                0, -1, images
            ]
            for prefix in (prompt, prompt[-3:])
        )
        guided = unconditional + guidance * (conditional - unconditional)
        drawn.append(LUMINA_FIRST + int(guided.argmax()))
    return drawn


@pytest.mark.parametrize("swin_norm", [False, True])
def test_lumina_draws_what_transformers_chameleon_draws(
    swin_norm: bool, linert: Linert, tmp_path: Path
) -> None:
    """The library's layout, with norms of every head, through export and loop."""
    model = chameleon(2, swin_norm=swin_norm, vocab_size=LUMINA_TEXT)
    folder, image_decoder = write_lumina(tmp_path / "tiny", kv_heads=2)
    for file in folder.glob("model*"):
        file.unlink()
    write_shards(parts(model.state_dict(), 2), 2, folder)
    names = lumina_vocabulary(LUMINA_CODES, LUMINA_FIRST)
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "vocabulary_map": names}))
    bundle, saved = tmp_path / "bundle", tmp_path / "tokens.npz"
    size = ("--size", "96x64", "--policy", "full", "--prompt-tokens", 90, "--batch", 2)
    result = linert("export", folder, "--vq", image_decoder, *size, "--out", bundle)
    assert result.code == 0, result.err
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result = linert("run", bundle, *asked, "--greedy", "--out", tmp_path / "out", "--save-tokens", saved)
    assert result.code == 0, result.err
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with np.load(saved) as arrays:
        for row, prompt in zip(arrays["tokens"], PROMPTS, strict=True):
            text = f"Generate an image of 96x64 according to the following prompt:\n{prompt}"
            ids = [0, *tokenizer.encode(text, add_special_tokens=False).ids]
            ids += [names[lumina.END_OF_TURN], names[lumina.BEGIN_OF_IMAGE]]
            ids += [names[lumina.size_token(2)], names[lumina.size_token(3)]]
            wanted = chameleons_tokens(model, ids, 4, 6, 4.0)
            drawn = [
                names[lumina.NEWLINE] if token == LUMINA_CODES else token + LUMINA_FIRST for token in row
            ]
            assert drawn == wanted


def test_one_bundle_draws_many_sizes(linert: Linert, tmp_path: Path) -> None:
    """Each as a bundle of its own draws it, with one copy of the weights."""
    folder, image_decoder = write_lumina(tmp_path / "tiny")
    options = ("--vq", image_decoder, "--prompt-tokens", 64, "--budget-lines", "1/2", "--policy", "all")
    sizes = {"128x64": (4, 8), "64x128": (8, 4)}
    bundle = tmp_path / "bundle"
    result = linert("export", folder, *options, "--size", ",".join(sizes), "--out", bundle)
    assert result.code == 0, result.err
    ask = ("--prompt", "a red fox", "--seed", 3)
    for size, (lines, columns) in sizes.items():
        alone = tmp_path / f"alone-{size}"
        assert linert("export", folder, *options, "--size", size, "--out", alone).code == 0
        manifest = open_bundle(bundle, size).manifest
        assert (manifest.raster.lines, manifest.raster.columns) == (lines, columns)
        assert set(manifest.cache.budget_lines) == {lines // 2}
        drawn = []
        for source, chosen in ((bundle, ("--size", size)), (alone, ())):
            out = tmp_path / f"{source.name}-{size}-images"
            result = linert("run", source, *chosen, *ask, "--out", out)
            assert result.code == 0, result.err
            [name] = list(out.glob("a-red-fox_*.png"))
            with PIL.Image.open(name) as image:
                assert image.size == tuple(map(int, size.split("x")))
                drawn.append(image.tobytes())
        assert drawn[0] == drawn[1]
    weights = [(tmp_path / name / "weights.bin").stat().st_size for name in ("bundle", "alone-128x64")]
    # The rotary tables differ.
    assert weights[0] < 1.2 * weights[1]
    for number, policy in enumerate(POLICIES):
        size = list(sizes)[number % len(sizes)]
        result = linert("validate", bundle, "--size", size, "--policy", policy)
        assert result.code == 0, result.out + result.err
    result = linert("inspect", bundle, "--size", "64x128")
    assert "128x64, 64x128" in result.out
    result = linert("run", bundle, "--size", "64x64", *ask, "--out", tmp_path / "no")
    assert result.code == 2
    assert "draws no images of 64x64; it draws 128x64, 64x128" in " ".join(result.err.split())


def no_map(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("IMGIMG", "TEXT"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ("--size", "1024x64"), "no images of 1024x64 are on offer"),
        (None, ("--size", "large"), "is no size like 768x512"),
        (no_map, (), "there is no vocabulary map"),
        (without("tokenizer.json"), (), "has no tokenizer.json beside it"),
    ],
)
def test_what_lumina_needs_is_said(
    change: Callable[[Path], None] | None,
    options: tuple[object, ...],
    message: str,
    lumina_files: tuple[Path, Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    folder = broken(lumina_files[0], tmp_path / "Lumina-mGPT-7B-512", change or (lambda folder: None))
    result = linert("export", folder, "--vq", lumina_files[1], "--out", tmp_path / "bundle", *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    result = linert("export", folder, "--out", tmp_path / "bundle")
    assert result.code == 2
    assert "vqgan.ckpt" in result.err


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(precision: str, linert: Linert, tmp_path: Path) -> None:
    folder, image_decoder = write_lumina(tmp_path / "tiny", kv_heads=2)
    check_precision(precision, (folder, "--vq", image_decoder, "--size", "64x64"), linert, tmp_path)
    assert not cuda_faults(tmp_path / "bundle")
