#!/usr/bin/env python3
"""Write folders of random text-to-image models, laid out as published ones: for measurements that need a model's size.

python scripts/random_folder.py --model Janus-Pro-7B --out Janus-Pro-7B
python scripts/random_folder.py --model Lumina-mGPT-7B-768 --out Lumina-mGPT-7B-768

A folder holds shards in bfloat16, an index, config.json and a tokenizer that has the model's special tokens. Weights are
made and written one by one, so that little memory is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from random_checkpoint import VQ_CHANNELS, random_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from linert.graphs.families import janus, lumina, vq

Shapes = dict[str, tuple[int, ...]]

SENTENCES = (
    "Generate an image of 768x512 according to the following prompt:",
    "a red fox sitting in fresh snow at the edge of a forest",
    "User: a bowl of ripe oranges on a blue table, soft light\n\nAssistant:",
)
JANUS_TOKENS = (janus.BEGIN_OF_SENTENCE, janus.PADDING, "<|User|>", "<|Assistant|>", janus.BEGIN_OF_IMAGE)
LUMINA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama decoder."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int

    def shapes(self, prefix: str) -> Shapes:
        """Its tensors in the names of the transformers library behind ``prefix``, without a head."""
        keys = self.dim // self.heads * self.kv_heads
        shapes: Shapes = {f"{prefix}embed_tokens.weight": (self.vocabulary, self.dim)}
        for layer in range(self.layers):
            inner = f"{prefix}layers.{layer}"
            shapes |= {
                f"{inner}.self_attn.q_proj.weight": (self.dim, self.dim),
                f"{inner}.self_attn.k_proj.weight": (keys, self.dim),
                f"{inner}.self_attn.v_proj.weight": (keys, self.dim),
                f"{inner}.self_attn.o_proj.weight": (self.dim, self.dim),
                f"{inner}.mlp.gate_proj.weight": (self.ffn_dim, self.dim),
                f"{inner}.mlp.up_proj.weight": (self.ffn_dim, self.dim),
                f"{inner}.mlp.down_proj.weight": (self.dim, self.ffn_dim),
                f"{inner}.input_layernorm.weight": (self.dim,),
                f"{inner}.post_attention_layernorm.weight": (self.dim,),
            }
        return shapes | {f"{prefix}norm.weight": (self.dim,)}


JANUS = {
    "Janus-Pro-1B": Decoder(24, 2048, 16, 16, 5632, 102400),
    "Janus-Pro-7B": Decoder(30, 4096, 32, 32, 11008, 102400),
}
LUMINA = {
    "Lumina-mGPT-7B-512": Decoder(32, 4096, 32, 32, 11008, 65536),
    "Lumina-mGPT-7B-768": Decoder(32, 4096, 32, 32, 11008, 65536),
    "Lumina-mGPT-7B-1024": Decoder(32, 4096, 32, 32, 11008, 65536),
    "Lumina-mGPT-34B-512": Decoder(48, 8192, 64, 8, 22016, 65536),
}


def janus_shapes(decoder: Decoder, tokenizer: vq.VQConfig) -> Shapes:
    """Tensors of deepseek-ai's files, without the half that sees."""
    dim, codes = decoder.dim, tokenizer.codebook_size
    return {
        **decoder.shapes("language_model.model."),
        "language_model.lm_head.weight": (decoder.vocabulary, dim),
        "gen_embed.weight": (codes, tokenizer.code_dim),
        "gen_aligner.layers.0.weight": (dim, tokenizer.code_dim),
        "gen_aligner.layers.0.bias": (dim,),
        "gen_aligner.layers.2.weight": (dim, dim),
        "gen_aligner.layers.2.bias": (dim,),
        "gen_head.output_mlp_projector.weight": (dim, dim),
        "gen_head.output_mlp_projector.bias": (dim,),
        "gen_head.vision_head.weight": (codes, dim),
        "gen_head.vision_head.bias": (codes,),
        **{
            f"gen_vision_model.{name}": shape for name, shape in tokenizer.tensor_shapes(encoder=True).items()
        },
    }


def lumina_shapes(decoder: Decoder, parts: int = 1) -> Shapes:
    """Tensors of Alpha-VLLM's files; ``parts`` are rows of the norms of heads."""
    head_dim = decoder.dim // decoder.heads
    shapes = {**decoder.shapes("model."), "lm_head.weight": (decoder.vocabulary, decoder.dim)}
    for layer in range(decoder.layers):
        for norm in ("q_norm", "k_norm"):
            for kind in ("weight", "bias"):
                shapes[f"model.layers.{layer}.self_attn.{norm}.{kind}"] = (parts, head_dim)
    return shapes


def lumina_vocabulary(codes: int, first: int) -> dict[str, int]:
    """Tokens that no text becomes, from id ``first`` on: image tokens, in a random order of codes, and those of the image
    grammar."""
    order = torch.randperm(codes, generator=torch.Generator().manual_seed(0)).tolist()
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = [f"IMGIMG{str(code).translate(letters)}Z" for code in order]
    names += ["<eoss>", lumina.BEGIN_OF_IMAGE, lumina.END_OF_TURN, lumina.NEWLINE]
    names += [lumina.size_token(units) for units in range(1, 65)]
    return {name: first + number for number, name in enumerate(names)}


def write_tokenizer(
    path: Path, special: Sequence[str], size: int, extra: Mapping[str, int] | None = None
) -> None:
    """A byte-level BPE of at most ``size`` tokens, the ``special`` ones first; ``extra`` are tokens that no text becomes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # Published tokenizers list letters among the added tokens, which are no special ones.
    tokenizer.add_tokens(["\u00f6"])
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= extra or {}
    path.write_text(json.dumps(content))


def write_shards(
    shards: Iterator[Mapping[str, torch.Tensor]], count: int, folder: Path, *, pickled: bool = False
) -> None:
    """Write ``count`` shards and their index, as the transformers library names them."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        if pickled:
            torch.save(dict(shard), folder / file)
        else:
            safetensors.torch.save_file(dict(shard), folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def split_shapes(shapes: Shapes, most: int = SHARD_BYTES) -> list[Shapes]:
    """Groups of tensors of at most so many bytes in bfloat16."""
    groups: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if filled + nbytes > most and groups[-1]:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    return groups


def write_random(folder: Path, shapes: Shapes, settings: Mapping[str, Any]) -> None:
    """A folder of bfloat16 shards of random weights, made shard by shard, and its config.json."""
    groups = split_shapes(shapes)

    def made() -> Iterator[dict[str, torch.Tensor]]:
        for number, group in enumerate(groups):
            yield {
                name: random_tensors({name: shape}, seed=1000 * number + index)[name].bfloat16()
                for index, (name, shape) in enumerate(group.items())
            }

    write_shards(made(), len(groups), folder)
    (folder / "config.json").write_text(json.dumps(dict(settings)))


@click.command(help=__doc__)
@click.option("--model", type=click.Choice([*JANUS, *LUMINA]), required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def main(model: str, out: Path) -> None:
    out.mkdir(parents=True)
    if model in JANUS:
        decoder = JANUS[model]
        write_tokenizer(out / "tokenizer.json", JANUS_TOKENS, 400)
        (out / "processor_config.json").write_text(json.dumps({"sft_format": "deepseek"}))
        settings = {"language_config": {"num_attention_heads": decoder.heads}}
        write_random(out, janus_shapes(decoder, vq.VQConfig(16384, 8, 256, VQ_CHANNELS[16])), settings)
    else:
        decoder = LUMINA[model]
        extra = lumina_vocabulary(8192, 400)
        write_tokenizer(out / "tokenizer.json", LUMINA_TOKENS, 400, extra)
        large = decoder.layers > 32
        settings = {"num_attention_heads": decoder.heads, "swin_norm": large, "vocabulary_map": extra}
        write_random(out, lumina_shapes(decoder, 4 if large else 1), settings)
        chameleon = vq.VQConfig(8192, 256, 256, VQ_CHANNELS[16], attention=(), unit_codes=False)
        state = random_tensors(chameleon.tensor_shapes(encoder=True))
        torch.save({"state_dict": chameleon_names(state)}, out / "vqgan.ckpt")
    written = sum(path.stat().st_size for path in out.iterdir())
    click.echo(f"{out}: {written / 1e9:.2f} GB")


def chameleon_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An image tokenizer under Chameleon's names."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.conv_blocks."))
    theirs = {"loss.logvar": torch.zeros(1)}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "conv_blocks"]:
            parts[1:4] = ["up", str(levels - 1 - int(parts[2])), parts[3].replace("res", "block")]
        if parts[:2] == ["decoder", "mid"]:
            parts[2] = ("block_1", "attn_1", "block_2")[int(parts[2])]
        theirs[".".join(parts)] = tensor
    return theirs


if __name__ == "__main__":
    main()
