"""Drawing with the whole cache, in PyTorch: what a training has learned, seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from training_log import Log

from linert.graphs.families import janus
from words import image_tokens, language, pictures, prompts

SHEET = "samples.png"
SHEET_PICTURES = 32
MATCH_SIDE = 24
"""Pixels of a side where pictures are compared: what they are a picture of, not how sharp."""


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts ``[I, T]`` padded on the left, and the padding ``[I]``, as the prefill stage takes them."""
    longest = max(len(row) for row in rows)
    starts = torch.tensor([longest - len(row) for row in rows])
    tokens = torch.tensor([[row[0]] * (longest - len(row)) + list(row) for row in rows])
    return tokens.to(device), starts.to(device)


@torch.no_grad()
def draw(
    model: janus.Janus, tokens: Tensor, starts: Tensor, guidance: float, generator: torch.Generator
) -> Tensor:
    """Image tokens ``[I, N]`` of prompts ``[I, T]`` with ``starts [I]``, at temperature 1 with nothing cut off."""
    config = model.config
    images, prefix = tokens.shape
    device, count = tokens.device, config.image_tokens
    none = torch.full_like(starts, -1)
    condition = model.condition([tokens, starts, tokens, none], guided=True)
    rows, starts = 2 * images, condition.starts
    shape = (rows, config.heads, prefix + count, config.head_dim)
    caches = [
        (torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(config.layers)
    ]
    at = torch.arange(prefix + count, device=device)
    drawn = torch.zeros(images, count, dtype=torch.int64, device=device)
    x, first = condition.embeddings, 0
    for index in range(count):
        positions = at[first : first + x.shape[1]]
        last = first + x.shape[1]
        # Padding sees itself, so that no row of the softmax is empty.
        visible = (at[:last] <= positions[:, None]) & (at[:last] >= starts[:, None, None])
        visible = (visible | (at[:last] == positions[:, None]))[:, None]
        rope = model.rope(positions[None], starts)
        for block, (keys, values) in zip(model.blocks(), caches, strict=True):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
            keys[:, :, first:last], values[:, :, first:last] = k, v
            attended = F.scaled_dot_product_attention(
                q, keys[:, :, :last], values[:, :, :last], attn_mask=visible, scale=1.0
            )
            x = block.finish(x, attended.transpose(1, 2))
        conditional, unconditional = model.logits(x[:, -1]).chunk(2)
        logits = unconditional + guidance * (conditional - unconditional)
        noise = torch.rand(logits.shape, generator=generator, device=device).clamp(min=1e-20)
        drawn[:, index] = (logits - torch.log(-torch.log(noise))).argmax(-1)
        x, first = model.embed(drawn[:, index].repeat(2)[:, None]), last
    return drawn


def small(images: Tensor) -> Tensor:
    """Pictures as rows of numbers to compare."""
    return F.adaptive_avg_pool2d(images, MATCH_SIDE).flatten(1)


def found_among(drawn: Tensor, real: Tensor, rows: Tensor) -> dict[str, float]:
    """Of pictures drawn of ``rows [I]`` of the real ones, the share whose own is the nearest, and among the nearest five."""
    nearest = torch.cdist(small(drawn), small(real)).topk(5, largest=False).indices
    hits = nearest == rows[:, None]
    return {
        "top1": round(hits[:, 0].float().mean().item(), 3),
        "top5": round(hits.any(1).float().mean().item(), 3),
    }


def measure(out: Path, device: torch.device, guidances: Sequence[float], count: int) -> None:
    """Draw ``count`` pictures of names, of unseen paraphrases, and of unseen paraphrases of held-out names; write the share that is
    found among the real pictures to the log, and a sheet of some."""
    log = Log(out / "lm.log")
    named, pixels = pictures.load(out)
    real = image_tokens.as_floats(image_tokens.on_device(pixels, device))
    tokenizer = image_tokens.load(out, device)
    model = language.load(out, device).fold()
    tokens = prompts.PromptTokens(out)
    chance = torch.Generator().manual_seed(4)
    order = torch.randperm(len(named), generator=chance).tolist()
    known = [row for row in order if not named[row].held_out][:count]
    others = [row for row in order if named[row].held_out][:count]
    unseen = prompts.paraphrases(named, tokens, 1, unseen=True, seed=5)
    kinds = {
        "names": [(row, named[row].name) for row in known],
        "paraphrases": [(row, unseen[row][0]) for row in known],
        "held_out_names": [(row, named[row].name) for row in others],
        "held_out_paraphrases": [(row, unseen[row][0]) for row in others],
    }
    asked = [pair for pairs in kinds.values() for pair in pairs]
    rows = torch.tensor([row for row, _ in asked], device=device)
    inputs = padded([tokens.ids(text) for _, text in asked], device)
    for guidance in guidances:
        generator = torch.Generator(device).manual_seed(6)
        grids = draw(model, *inputs, guidance, generator)
        parts = grids.unflatten(1, (image_tokens.GRID, image_tokens.GRID)).split(128)
        images = torch.cat([tokenizer.decode(part) for part in parts])
        first = 0
        shown = []
        for kind, pairs in kinds.items():
            part = slice(first, first + len(pairs))
            log(drawn=kind, guidance=guidance, **found_among(images[part], real, rows[part]))
            shown.append(images[part][: SHEET_PICTURES // len(kinds)])
            first += len(pairs)
        columns = min(SHEET_PICTURES // len(kinds), count)
        name = SHEET if guidance == guidances[0] else f"samples_{guidance:g}.png"
        pictures.sheet(image_tokens.as_bytes(torch.cat(shown)), columns).save(out / name)
    log(asked=[[text for _, text in pairs[: SHEET_PICTURES // len(kinds)]] for pairs in kinds.values()])
