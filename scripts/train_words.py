#!/usr/bin/env python3
"""Train the demo that draws from words: a VQ tokenizer in colour and a small Janus, on Fluent's emoji and their Unicode names.

    python scripts/train_words.py fetch        # pictures and names, through npm
    python scripts/train_words.py vq           # the tokenizer
    python scripts/train_words.py lm           # the transformer, on the tokenizer's tokens
    python scripts/train_words.py pack         # demo/words, in Janus-Pro's published layout
    python scripts/train_words.py prompts      # lists of prompts, for scripts/word_metrics.py

All but `pack` write into one folder, given before the command's name with --out. Trainings are given their time, not their steps:
the learning rate follows the clock, so that they end as planned on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from words import drawing, folder, image_tokens, language, language_training, pictures, prompts


@click.group(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/words"), show_default=True)
@click.pass_context
def main(context: click.Context, out: Path) -> None:
    context.obj = out


@main.command("fetch")
@click.pass_obj
def fetch(out: Path) -> None:
    """Fetch the pictures and their names with npm, and write them into one file."""
    out.mkdir(parents=True, exist_ok=True)
    found = pictures.fetch(out)
    prompts.write_tokenizer(found, out)
    prompts.write_sets(found, out)
    held_out = sum(picture.held_out for picture in found)
    size = (out / pictures.FILE).stat().st_size
    click.echo(f"{len(found)} pictures, {held_out} of held-out names, {size / 1e6:.1f} MB")


begun_option = click.option(
    "--begun", is_flag=True, help="Begin a new training with the weights that an earlier one left."
)
device_option = click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, type=torch.device
)


@main.command("vq")
@device_option
@click.option("--seconds", default=7200.0, show_default=True, help="How long to train.")
@click.option("--codes", default=1024, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--ema", default=0.998, show_default=True, help="Decay of the weight average that is saved.")
@click.option("--warmup", default=50, show_default=True, help="Steps.")
@begun_option
@click.pass_obj
def vq(out: Path, device: torch.device, seconds: float, **settings: Any) -> None:
    """Train the VQ tokenizer."""
    image_tokens.train(out, device, seconds, **settings)


@main.command("lm")
@device_option
@click.option("--seconds", default=4 * 3600.0, show_default=True, help="How long to train.")
@click.option("--batch", default=256, show_default=True)
@click.option("--rate", default=2e-3, show_default=True)
@click.option("--warmup", default=100, show_default=True, help="Steps.")
@click.option("--ema", default=0.995, show_default=True, help="Decay of the weight average that is saved.")
@click.option("--views", default=16, show_default=True, help="Moved copies of every picture.")
@click.option("--canonical", default=0.5, show_default=True, help="Share of pictures as they are.")
@click.option("--exact", default=0.4, show_default=True, help="Share of exact names.")
@click.option("--dropped", default=0.1, show_default=True, help="Share without a prompt.")
@click.option("--corrupted", default=0.05, show_default=True, help="Share of tokens read as others.")
@click.option("--layers", default=language.LAYERS, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile the layers.")
@click.option("--resume", is_flag=True, help="Go on where a training of the same folder stopped.")
@begun_option
@click.pass_obj
def lm(out: Path, device: torch.device, *, resume: bool, begun: bool, **settings: Any) -> None:
    """Train the transformer."""
    chosen = language_training.Settings(**settings)
    language_training.train(out, device, chosen, resume=resume, begun=begun)


@main.command("draw")
@device_option
@click.option("--guidance", "guidances", multiple=True, type=float, default=(3.0, 5.0), show_default=True)
@click.option("--count", default=64, show_default=True, help="Prompts of each of four kinds.")
@click.pass_obj
def draw(out: Path, device: torch.device, guidances: tuple[float, ...], count: int) -> None:
    """Draw from names and paraphrases, log how many are recognised, and write sheets."""
    drawing.measure(out, device, guidances, count)


@main.command("prompts")
@click.pass_obj
def lists(out: Path) -> None:
    """Write lists of prompts to draw from, and what each asks for, as scripts/word_metrics.py reads it."""
    named, _ = pictures.load(out)
    for name, count in prompts.write_lists(named, out).items():
        click.echo(f"{out / name}.txt: {count} prompts")


@main.command("pack")
@click.option(
    "--folder", "made", type=click.Path(path_type=Path), default=Path("demo/words"), show_default=True
)
@click.pass_obj
def pack(out: Path, made: Path) -> None:
    """Write the folder that `linert export` takes."""
    folder.write(out, made)
    size = sum(path.stat().st_size for path in made.iterdir())
    click.echo(f"{made}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
