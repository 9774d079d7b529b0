"""Janus from its folders to pictures by the command line, against the transformers library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer

from linert.runtime.drawing.output import read_recipe
from tests.conftest import Result
from tests.graphs.test_janus import original, published
from tests.onnxruntime_cuda import cuda_faults
from tests.text_models import (
    JANUS_VOCABULARY,
    PRECISIONS,
    broken,
    check_precision,
    without,
    write_janus,
)

Linert = Callable[..., Result]
GRID = 4
PROMPTS = ("a red fox", "a bowl of oranges on a table")


@pytest.fixture(scope="module")
def janus_model() -> Any:
    return published(4, JANUS_VOCABULARY, GRID)


@pytest.fixture(scope="module")
def janus_folders(janus_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in both layouts."""
    root = tmp_path_factory.mktemp("janus")
    state = janus_model.state_dict()
    return {
        "transformers'": write_janus(janus_model, state, root / "ported", published=False),
        "deepseek-ai's": write_janus(janus_model, original(state), root / "original", published=True),
    }


@pytest.fixture(scope="module")
def janus_bundles(
    janus_folders: dict[str, Path], linert: Linert, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Batch 2, all lines and every policy."""
    bundles = {}
    for layout, folder in janus_folders.items():
        bundles[layout] = tmp_path_factory.mktemp("bundle") / "bundle"
        grid = ("--grid", GRID) if layout == "deepseek-ai's" else ()
        result = linert(
            *("export", folder, "--out", bundles[layout], "--batch", 2, "--policy", "full,linear"),
            *("--prompt-tokens", 40, *grid),
        )
        assert result.code == 0, result.err
        assert f"Janus in {layout} layout" in " ".join(result.err.split())
    return bundles


def janus_ids(folder: Path, prompt: str) -> list[int]:
    """What the published processor makes of a prompt."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = tokenizer.get_vocab()
    text = f"<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"
    return [names["<\uff5cbegin▁of▁sentence\uff5c>"], *tokenizer.encode(text, add_special_tokens=False).ids]


@torch.no_grad()
def generated(model: Any, folder: Path, prompts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[n, N]`` and pixels ``[n, 3, H, W]`` that the library draws greedily with guidance 5, padded on the left."""
    names = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    rows = [janus_ids(folder, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    pad = names["<\uff5c▁pad▁\uff5c>"]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    config = model.generation_config
    config.bos_token_id, config.pad_token_id = rows[0][0], pad
    config.generation_kwargs = {"boi_token_id": names["<begin_of_image>"]}
    tokens = model.generate(
        ids, attention_mask=mask, generation_mode="image", guidance_scale=5.0, do_sample=False
    )
    pixels = model.decode_image_tokens(tokens)
    return tokens.numpy(), pixels.permute(0, 3, 1, 2).numpy() if pixels.shape[-1] == 3 else pixels.numpy()


@pytest.mark.parametrize("layout", ["transformers'", "deepseek-ai's"])
def test_janus_draws_what_transformers_draws(
    layout: str,
    janus_model: Any,
    janus_folders: dict[str, Path],
    janus_bundles: dict[str, Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    bundle = janus_bundles[layout]
    tokens, pixels = generated(janus_model, janus_folders[layout], PROMPTS)
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    saved = tmp_path / "tokens.npz"
    result = linert("run", bundle, *asked, "--greedy", "--out", tmp_path / "out", "--save-tokens", saved)
    assert result.code == 0, result.err
    with np.load(saved) as arrays:
        assert (arrays["tokens"] == tokens).all()
        assert arrays["prompts"].tolist() == list(PROMPTS)
    result = linert(
        "render", bundle, saved, "--out", tmp_path / "again", "--save-pixels", tmp_path / "pixels.npz"
    )
    assert result.code == 0, result.err
    with np.load(tmp_path / "pixels.npz") as arrays:
        np.testing.assert_allclose(arrays["pixels"], pixels, atol=2e-5, rtol=0)


def test_a_prompt_is_the_same_alone_and_in_company(
    janus_bundles: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    bundle = janus_bundles["transformers'"]
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n{PROMPTS[0]}\n", encoding="utf-8")
    both = linert("run", bundle, "--prompt-file", tmp_path / "prompts.txt", "--out", tmp_path / "both")
    alone = linert("run", bundle, "--prompt", PROMPTS[0], "--out", tmp_path / "alone")
    assert (both.code, alone.code) == (0, 0), both.err + alone.err
    [name] = [path.name for path in (tmp_path / "alone").glob("a-red-fox_*_seed_000000.png")]
    with PIL.Image.open(tmp_path / "alone" / name) as one, PIL.Image.open(tmp_path / "both" / name) as other:
        assert one.tobytes() == other.tobytes()
    recipe = read_recipe(tmp_path / "alone" / name)
    assert (recipe.condition.text, recipe.condition.negative) == (PROMPTS[0], None)


def test_letters_beside_the_vocabulary_are_text(
    janus_bundles: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    result = linert(
        "run", janus_bundles["transformers'"], "--prompt", "a k\u00f6nig", "--out", tmp_path / "out"
    )
    assert result.code == 0, result.err


def test_negative_and_empty_prompts(janus_bundles: dict[str, Path], linert: Linert, tmp_path: Path) -> None:
    """A negative prompt is what guidance leads away from: with the prompt itself there is nothing to lead."""
    bundle = janus_bundles["transformers'"]

    def tokens(name: str, *options: object) -> np.ndarray:
        saved = tmp_path / f"{name}.npz"
        result = linert("run", bundle, "--greedy", "--out", tmp_path / name, "--save-tokens", saved, *options)
        assert result.code == 0, result.err
        with np.load(saved) as arrays:
            return arrays["tokens"]

    usual = tokens("usual", "--prompt", PROMPTS[0])
    same = tokens("same", "--prompt", PROMPTS[0], "--negative-prompt", PROMPTS[0])
    unguided = tokens("unguided", "--prompt", PROMPTS[0], "--guidance", 1)
    other = tokens("other", "--prompt", PROMPTS[0], "--negative-prompt", PROMPTS[1])
    empty = tokens("empty", "--prompt", "", "--negative-prompt", "")
    assert (same == unguided).all()
    assert (usual != same).any()
    assert (usual != other).any()
    assert (tokens("bare", "--prompt", "", "--guidance", 1) == empty).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", 3), "it reads prompts: say what to draw with --prompt"),
        ((), "say what to draw"),
        (("--prompt", "fox " * 40), "export with --prompt-tokens"),
        (("--prompt", "a fox <begin_of_image>"), "contains '<begin_of_image>'"),
        (("--prompt", "a fox", "--negative-prompt", "<|User|> said"), "contains '<|User|>'"),
        (("--negative-prompt", "a fox"), "give --prompt or --prompt-file as well"),
        (("--prompt-file", "absent.txt"), "cannot read absent.txt"),
        (("--captions", "absent.npy"), "for models that see features of captions"),
    ],
)
def test_requests_that_a_model_of_prompts_cannot_draw(
    options: tuple[object, ...], message: str, janus_bundles: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    result = linert("run", janus_bundles["transformers'"], *options, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


def test_an_unguided_bundle_has_no_negative_prompts(
    janus_folders: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    result = linert("export", janus_folders["transformers'"], "--out", bundle, "--guidance", 1)
    assert result.code == 0, result.err
    result = linert("run", bundle, "--prompt", "a", "--negative-prompt", "b", "--out", tmp_path / "out")
    assert result.code == 2
    assert "needs unconditional rows" in result.err
    assert linert("run", bundle, "--prompt", "a", "--out", tmp_path / "out").code == 0


@pytest.mark.parametrize("layout", ["transformers'", "deepseek-ai's"])
def test_a_bundle_of_prompts_is_proven_against_its_folder(
    layout: str, janus_bundles: dict[str, Path], linert: Linert
) -> None:
    result = linert(
        "validate",
        janus_bundles[layout],
        "--policy",
        "linear",
        "--budget-lines",
        2,
        "--anchor-tokens",
        2,
        "--json",
    )
    assert result.code == 0, result.err + result.out
    report = json.loads(result.out)
    assert report["passed"]
    assert report["asked"][0].startswith("a red fox")


def test_policies_are_compared_on_prompts(
    janus_bundles: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    (tmp_path / "metric.py").write_text(
        "import numpy as np\n"
        "from linert.runtime.measuring.metrics import Metric\n"
        "class Length(Metric):\n"
        "    name, higher_is_better = 'length', True\n"
        "    def measure(self, pixels, asked):\n"
        "        return np.array([[len(text)] for text in asked], np.float64)\n"
        "    def score(self, rows):\n"
        "        return float(rows.mean())\n"
        "def metrics():\n"
        "    return [Length()]\n"
    )
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    options = ("--samples", 4, "--budgets", "1/2", "--metrics", tmp_path / "metric.py")
    result = linert("compare", janus_bundles["transformers'"], "--out", tmp_path / "out", *options, *asked)
    assert result.code == 0, result.err
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    wanted = sum(map(len, PROMPTS)) / len(PROMPTS)
    assert {cell["metrics"]["length"]["value"] for cell in told["cells"]} == {wanted}


@pytest.mark.parametrize("layout", ["transformers'", "deepseek-ai's"])
def test_bench_measures_what_prompts_draw(
    layout: str, janus_bundles: dict[str, Path], linert: Linert
) -> None:
    result = linert("sweep", janus_bundles[layout], "--rounds", 1, "--compare-pytorch", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out.splitlines()[-1])
    assert told["cells"][0]["decode_ms"] > 0
    [eager] = (times for name, times in told["pytorch"].items() if name.startswith("eager"))
    assert eager["decode_ms"] > 0


def untokened(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<begin_of_image>", "<end_of_image>"))


def unadded(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "<|User|>"]
    values["model"]["vocab"].pop("<|User|>", None)
    path.write_text(json.dumps(values))


def with_a_wrong_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["absent.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("tokenizer.json"), (), "has no tokenizer.json beside it: give one with --tokenizer"),
        (untokened, (), "no special token <begin_of_image>"),
        (unadded, (), "no special token <|User|>"),
        (without("model-00002-of-00003.safetensors"), (), "lacks model-00002-of-00003.safetensors"),
        (with_a_wrong_index, (), "lacks absent.weight, which model.safetensors.index.json names"),
        (without("model.safetensors.index.json"), (), "there is none of model.safetensors.index.json"),
        (lambda folder: (folder / "config.json").write_text("{"), (), "config.json is damaged"),
        (lambda folder: None, ("--tokenizer", "absent"), "there is no tokenizer at absent"),
        (lambda folder: None, ("--prompt-template", "draw"), "must hold {prompt} once"),
        (lambda folder: None, ("--prompt-tokens", 3), "the prompt '' has"),
        (lambda folder: None, ("--prompt-tokens", 0), "--prompt-tokens must be at least 1"),
        (lambda folder: None, ("--ema",), "no ema weights"),
    ],
)
def test_folders_that_cannot_be_exported(
    change: Callable[[Path], None],
    options: tuple[object, ...],
    message: str,
    janus_folders: dict[str, Path],
    linert: Linert,
    tmp_path: Path,
) -> None:
    folder = broken(janus_folders["transformers'"], tmp_path / "folder", change)
    result = linert("export", folder, "--out", tmp_path / "bundle", *options)
    assert result.code == 2, result.err
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(
    precision: str, janus_folders: dict[str, Path], linert: Linert, tmp_path: Path
) -> None:
    check_precision(precision, (janus_folders["deepseek-ai's"], "--grid", GRID), linert, tmp_path)
    assert not cuda_faults(tmp_path / "bundle")
