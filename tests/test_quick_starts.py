"""The quick start of every family, as its guide has it, with tiny random models in the place of the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linert.exporter.lasadgen_folder import write_lasadgen
from linert.exporter.lpd_file import published_tensors
from linert.graphs.families import llamagen, lpd, vq
from linert.graphs.families.lasadgen import LASADGen, LASADGenConfig, Variant
from linert.runtime.drawing.output import SHEET_NAME
from tests.conftest import TINY, TINY_LPD, TINY_VQ, Result, random_state
from tests.pages import quick_starts
from tests.text_models import write_lumina, write_tiny_janus, write_tiny_t5

Linert = Callable[..., Result]
Words = dict[str, list[object]]
"""What stands in the place of words of a command."""

QUICK_STARTS = quick_starts()


def llamagen_files(
    folder: Path, transformer: str, image_decoder: str, config: llamagen.LlamaGenConfig
) -> Words:
    """A transformer and an image decoder under the names of published files, and what has to be said as they are smaller."""
    torch.save({"model": random_state(llamagen.LlamaGen(config))}, folder / transformer)
    torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, folder / image_decoder)
    return {
        transformer: [folder / transformer, "--heads", config.heads, "--grid", config.grid],
        image_decoder: [folder / image_decoder],
    }


def classes(folder: Path) -> Words:
    return llamagen_files(folder, "c2i_B_384.pt", "vq_ds16_c2i.pt", replace(TINY, num_classes=10))


def captions(folder: Path) -> Words:
    config = replace(TINY, num_classes=0, caption_dim=32, prefix_len=120)
    files = llamagen_files(folder, "t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt", config)
    return files | {"flan-t5-xl": [write_tiny_t5(folder / "flan-t5-xl")]}


def janus(folder: Path) -> Words:
    prompts = folder / "prompts.txt"
    prompts.write_text("a bowl of oranges on a table\n")
    checkpoint = write_tiny_janus(folder / "Janus-Pro-1B", {"vision_config": {"image_size": 16}})
    return {"Janus-Pro-1B": [checkpoint], "prompts.txt": [prompts]}


def lumina(folder: Path) -> Words:
    checkpoint, image_decoder = write_lumina(folder / "Lumina-mGPT-7B-768")
    return {
        "Lumina-mGPT-7B-768": [checkpoint],
        "vqgan.ckpt": [image_decoder],
        "768x768,512x1152": ["128x256,64x256"],
        "512x1152": ["64x256"],
    }


def lasadgen(folder: Path) -> Words:
    config = LASADGenConfig(2, 32, 4, 64, TINY_VQ.codebook_size, 10, 6, Variant.MANHATTAN, gate_rank=8)
    write_lasadgen(random_state(LASADGen(config)), config, folder / "lasadgen_demo")
    torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, folder / "vq.pt")
    return {"demo/lasadgen_demo": [folder / "lasadgen_demo"], "demo/vq_demo.pt": [folder / "vq.pt"]}


def grouped(folder: Path) -> Words:
    config = replace(TINY_LPD, num_classes=10)
    state = published_tensors(random_state(lpd.LPD(config)))
    torch.save({"model": state}, folder / "lpd_demo.pth")
    torch.save({"model": random_state(vq.VQModel(TINY_VQ, encoder=True))}, folder / "vq.pt")
    return {
        "demo/lpd_demo.pth": [folder / "lpd_demo.pth", "--group-sizes", "1,7,8"],
        "demo/vq_demo.pt": [folder / "vq.pt"],
    }


FILES = {
    "llamagen": classes,
    "llamagen captions": captions,
    "janus": janus,
    "lumina": lumina,
    "lasadgen": lasadgen,
    "lpd": grouped,
}


def test_every_quick_start_is_run() -> None:
    assert set(QUICK_STARTS) == set(FILES)


def output(words: list[str]) -> str:
    """What a command writes; empty if nothing."""
    return words[words.index("--out") + 1] if "--out" in words else ""


@pytest.mark.parametrize("name", FILES)
def test_the_quick_start_runs(name: str, linert: Linert, tmp_path: Path) -> None:
    _, told = QUICK_STARTS[name]
    put, made = FILES[name](tmp_path), tmp_path / "made"
    made.mkdir()
    bundles = {output(words) for words in told if words[1] == "export"}
    for words in told:
        asked = list(words)
        if asked[2] in bundles:
            asked[2] = str(made / asked[2])
        if output(words):
            asked[asked.index("--out") + 1] = str(made / output(words))
        result = linert(*(part for word in asked[1:] for part in put.get(word, [word])))
        assert result.code == 0, f"{' '.join(words)}: {result.err}"
        if words[1] == "run":
            assert (made / output(words) / SHEET_NAME).is_file()
