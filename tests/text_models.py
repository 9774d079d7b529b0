"""Folders of tiny random text-to-image models, as published ones are laid out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from random_folder import (
    JANUS_TOKENS,
    LUMINA_TOKENS,
    Decoder,
    chameleon_names,
    janus_shapes,
    lumina_shapes,
    lumina_vocabulary,
    write_shards,
    write_tokenizer,
)

from linert.graphs import text_encoder
from linert.graphs.families import janus, vq
from tests.conftest import Result, random_state

JANUS_VOCABULARY = 320
LUMINA_CODES = 40
LUMINA_FIRST = 300
LUMINA_TEXT = 420
LUMINA_VQ = vq.VQConfig(LUMINA_CODES, 32, 32, (32,) * 5, res_blocks=1, attention=(), unit_codes=False)


def parts(state: Mapping[str, torch.Tensor], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """``state`` in so many shards."""
    names = sorted(state)
    for number in range(count):
        yield {name: state[name].contiguous().clone() for name in names[number::count]}


def write_janus(model: Any, state: Mapping[str, torch.Tensor], folder: Path, *, published: bool) -> Path:
    """The folder of a Janus: deepseek-ai's, in two ``.bin`` shards, or transformers', in three of safetensors."""
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json", JANUS_TOKENS, JANUS_VOCABULARY)
    named = {"bos_token": janus.BEGIN_OF_SENTENCE, "pad_token": {"content": janus.PADDING}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    settings = model.config.to_dict()
    if published:
        sizes = ("num_hidden_layers", "vocab_size", "num_attention_heads")
        text = {name: settings["text_config"][name] for name in sizes}
        settings = {"model_type": "multi_modality", "language_config": text}
        processing = {"sft_format": "deepseek", "image_start_tag": janus.BEGIN_OF_IMAGE}
        (folder / "processor_config.json").write_text(json.dumps(processing))
        write_shards(parts(state, 2), 2, folder, pickled=True)
    else:
        write_shards(parts(state, 3), 3, folder)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


class Names(torch.nn.Module):
    """Parameters of given shapes, for :func:`random_state`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, shape in self.shapes.items():
            yield name, torch.nn.Parameter(torch.empty(shape))


def write_lumina(folder: Path, *, swin_norm: bool = False, kv_heads: int = 4) -> tuple[Path, Path]:
    """The folder of a Lumina-mGPT and a Chameleon image tokenizer beside it."""
    folder.mkdir(parents=True)
    extra = lumina_vocabulary(LUMINA_CODES, LUMINA_FIRST)
    write_tokenizer(folder / "tokenizer.json", LUMINA_TOKENS, LUMINA_FIRST, extra)
    decoder = Decoder(2, 32, 4, kv_heads, 48, LUMINA_TEXT)
    state = random_state(Names(lumina_shapes(decoder, 2 if swin_norm else 1)))
    write_shards(parts(state, 2), 2, folder)
    settings = {"num_attention_heads": 4, "swin_norm": swin_norm, "vocabulary_map": extra}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = folder.parent / f"{folder.name}-vqgan.ckpt"
    torch.save({"state_dict": chameleon_names(random_state(vq.VQModel(LUMINA_VQ, encoder=True)))}, tokenizer)
    return folder, tokenizer


TINY_JANUS_VQ = vq.VQConfig(48, 8, 32, (32, 32), res_blocks=1)


def write_tiny_janus(
    folder: Path, settings: Mapping[str, Any] | None = None, extra: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A folder of a Janus in deepseek-ai's layout with one file of random weights.

    Args:
        settings: of ``config.json``, beside the number of heads.
        extra: tensors beside the model's.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.json", JANUS_TOKENS, JANUS_VOCABULARY)
    shapes = janus_shapes(Decoder(2, 32, 4, 4, 48, JANUS_VOCABULARY), TINY_JANUS_VQ)
    state = {name: tensor.contiguous() for name, tensor in random_state(Names(shapes)).items()}
    safetensors.torch.save_file({**state, **(extra or {})}, folder / "model.safetensors")
    language = {"language_config": {"num_attention_heads": 4}}
    (folder / "config.json").write_text(json.dumps({**language, **(settings or {})}))
    return folder


def write_tiny_t5(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    tables: Sequence[str] = ("shared.weight",),
    *,
    alike: bool = True,
) -> Path:
    """A folder of a T5 encoder of width 32 with random weights.

    Args:
        settings: its ``config.json``.
        tables: names under which its embedding stands; ``alike`` or not.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.json", ("</s>", "<unk>"), 290)
    config = text_encoder.TextEncoderConfig(2, 32, 2, 8, 48, 300, 8)
    state = random_state(Names(config.tensor_shapes()))
    table = state.pop("embed_tokens.weight")
    named = {f"encoder.{name}": tensor.contiguous() for name, tensor in state.items()}
    named |= {name: table.clone() if alike else table + number for number, name in enumerate(tables)}
    safetensors.torch.save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(settings or {})))
    return folder


def broken(folder: Path, to: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a folder, changed."""
    shutil.copytree(folder, to)
    change(to)
    return to


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


PRECISIONS = ("fp16", "bf16", "int8", "int4")


def check_precision(
    precision: str, checkpoint: Sequence[object], linert: Callable[..., Result], folder: Path
) -> None:
    """Exported, held to what the precision may cost, and drawn. Four bits are too few for a model as narrow as these."""
    bundle = folder / "bundle"
    calibrated = ("--calibration-images", 2) if precision.startswith("int") else ()
    options = ("--precision", precision, "--budget-lines", 2, *calibrated)
    result = linert("export", *checkpoint, *options, "--out", bundle, "--block-size", 16)
    assert result.code == 0, result.err
    result = linert("validate", bundle, "--json")
    assert result.code == 0 or precision == "int4", result.err + result.out
    assert json.loads(result.out)["logits"]["top1_agreement"] > 0.5
    result = linert("run", bundle, "--prompt", "a red fox", "--out", folder / "out")
    assert result.code == 0, result.err
