"""The folder of a published Janus-Pro, made of what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from linert.graphs.families import janus, vq
from linert.runtime.files.atomic_files import atomic_file
from words import image_tokens, language, prompts

PREFIX = "gen_vision_model."
POSITIONS = 1024


def settings(
    layers: int, ffn_dim: int, text_vocabulary: int, codes: int, tokenizer: vq.VQConfig
) -> dict[str, Any]:
    """``config.json`` as deepseek-ai writes it, of what there is to tell."""
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "float16",
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "params": {
                "depth": 2,
                "input_dim": tokenizer.code_dim,
                "n_embed": language.DIM,
                "projector_type": "mlp_gelu",
            },
        },
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": language.DIM, "image_token_size": codes, "n_embed": language.DIM},
        },
        "gen_vision_config": {
            "cls": "VQ-4",
            "params": {"image_token_size": codes, "n_embed": tokenizer.code_dim},
        },
        "language_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": language.DIM,
            "intermediate_size": ffn_dim,
            "max_position_embeddings": POSITIONS,
            "num_attention_heads": language.HEADS,
            "num_hidden_layers": layers,
            "num_key_value_heads": language.HEADS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "vocab_size": text_vocabulary,
        },
        "vision_config": {"params": {"image_size": image_tokens.GRID * tokenizer.patch}},
    }


def write(trained: Path, folder: Path) -> None:
    """Write ``folder`` in halves, without the encoder, which draws nothing."""
    tensors = safetensors.torch.load_file(trained / language.FILE)
    layers = "language_model.model.layers."
    count = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith(layers))
    ffn_dim = len(tensors[f"{layers}0.mlp.gate_proj.weight"])
    text_vocabulary = len(tensors["language_model.model.embed_tokens.weight"])
    state = safetensors.torch.load_file(trained / image_tokens.FILE)
    decoder = {name: tensor for name, tensor in state.items() if not name.startswith(vq.ENCODER_PREFIXES)}
    tokenizer = vq.infer_config({name: tuple(tensor.shape) for name, tensor in decoder.items()})
    told = settings(count, ffn_dim, text_vocabulary, len(tensors["gen_embed.weight"]), tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tensors |= {PREFIX + name: tensor for name, tensor in decoder.items()}
    with atomic_file(folder / "model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", told)
    special = {
        "bos_token": janus.BEGIN_OF_SENTENCE,
        "eos_token": prompts.END_OF_SENTENCE,
        "pad_token": janus.PADDING,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", special)
    processing = {
        "image_start_tag": janus.BEGIN_OF_IMAGE,
        "image_end_tag": prompts.END_OF_IMAGE,
        "pad_tag": janus.PADDING,
        "sft_format": "deepseek",
        "processor_class": "VLChatProcessor",
    }
    write_json(folder / "processor_config.json", processing)
    shutil.copyfile(trained / prompts.FILE, folder / "tokenizer.json")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
