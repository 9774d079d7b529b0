#!/usr/bin/env python3
"""Train a demo model: a VQ tokenizer and a class-conditional LlamaGen on scikit-learn's handwritten digits.

Both are saved in LlamaGen's published containers and key names, so that the demo goes down exactly the road
of a published checkpoint. The digits (1,797 scans of 8 x 8 pixels, UCI ML hand-written digits) come with
scikit-learn; a fifth of them is held out and never trained on.

Two tasks: `demo` draws one digit; `pairs` draws two digits side by side and the same two again below. The class names
the left one only, so that the right one below can only be known from the tokens eight lines above.

    python scripts/train_demo.py --task demo vq     # writes demo/vq_demo.pt
    python scripts/train_demo.py --task demo ar     # reads demo/vq_demo.pt, writes demo/c2i_demo.pt
    python scripts/train_demo.py --task demo slim   # leaves the encoder out of demo/vq_demo.pt

`ar --attention manhattan` trains a LASADGen of the same size on the same tokens with the same budget, and writes the folder
demo/lasadgen_demo; `signed`, `raster` and `none` are its other decays. `ar --attention lpd` trains an LPD likewise, in random orders
and groups of the published sizes, and writes demo/lpd_demo.pth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from training_log import Log

from linert.exporter.group_tables import group_sizes
from linert.exporter.lasadgen_folder import write_lasadgen
from linert.exporter.lpd_file import published_tensors
from linert.graphs.families import lasadgen, llamagen, lpd, vq
from linert.graphs.transformer import Transformer
from linert.runtime.files.atomic_files import atomic_file

GRID = 16
SPLIT_SEED = 0
PATCH = 4
SOFTMAX = "softmax"
LPD = "lpd"
IMAGE_SIDE = GRID * PATCH


@dataclass(frozen=True)
class Task:
    """What is learned. ``images`` makes ``[n, 3, side, side]`` pixels in [-1, 1] and classes ``[n]`` of a split, moved
    at random when a generator is given. ``dtype``, ``ar_dtype``: of the weights saved."""

    name: str
    images: Callable[[str, torch.Generator | None], tuple[Tensor, Tensor]]
    vq: vq.VQConfig
    ar: llamagen.LlamaGenConfig
    dtype: torch.dtype = torch.float32
    ar_dtype: torch.dtype = torch.float16

    @property
    def vq_file(self) -> str:
        return f"vq_{self.name}.pt"

    @property
    def ar_file(self) -> str:
        return f"c2i_{self.name}.pt"

    @property
    def lpd_file(self) -> str:
        return f"lpd_{self.name}.pth"

    def transformer(self, attention: str) -> Transformer:
        """A model to train: LlamaGen's, an LPD, or a LASADGen with another ``attention``, of about its size."""
        if attention == SOFTMAX:
            return llamagen.LlamaGen(self.ar)
        same = ("layers", "dim", "heads", "ffn_dim", "vocab_size", "num_classes", "grid")
        sizes = {name: getattr(self.ar, name) for name in same}
        if attention == LPD:
            # Two matrices with as many numbers as LlamaGen's three.
            return lpd.LPD(lpd.LPDConfig(**sizes | {"ffn_dim": sizes["ffn_dim"] * 3 // 2}))
        variant = lasadgen.Variant(attention)
        return lasadgen.LASADGen(
            lasadgen.LASADGenConfig(**sizes, variant=variant, gate_rank=self.ar.head_dim)
        )


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the scans ``[n, 1, 8, 8]`` in [0, 1] and labels ``[n]`` of ``"train"`` or ``"test"``."""
    data = load_digits()
    parts = train_test_split(
        data.images, data.target, test_size=0.2, stratify=data.target, random_state=SPLIT_SEED
    )
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.tensor(images, dtype=torch.float32)[:, None] / 16, torch.tensor(labels)


def upscale(scans: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Upscale ``scans [n, 1, 8, 8]`` to pixels ``[n, 3, side, side]`` in [-1, 1], slightly moved when a generator is given."""
    n = len(scans)
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    if generator is not None:
        noise = torch.rand(n, 4, generator=generator) * 2 - 1
        angle, zoom = noise[:, 0] * math.radians(5), 1 + 0.04 * noise[:, 1]
        theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * zoom
        theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * zoom, angle.sin() * zoom
        theta[:, :, 2] = 0.04 * noise[:, 2:]
    # A blank pixel around the scan gives strokes that touch its edge somewhere to end.
    padded = F.pad(scans, (1, 1, 1, 1))
    grid = F.affine_grid(theta, [n, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
    pixels = F.grid_sample(padded, grid, mode="bicubic", align_corners=False)
    return (pixels.clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1)


def one_digit(split: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A digit an image."""
    scans, labels = digits(split)
    return upscale(scans, generator), labels


def digit_pairs(split: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Two random digits of 32 x 32 pixels side by side, and the same again below. The class is the left one's."""
    scans, labels = digits(split)
    chosen = torch.randint(
        len(scans), (2, len(scans)), generator=generator or torch.Generator().manual_seed(0)
    )
    left, right = (
        F.interpolate(upscale(scans[rows], generator), scale_factor=0.5, mode="area") for rows in chosen
    )
    above = torch.cat([left, right], dim=-1)
    return torch.cat([above, above], dim=-2), labels[chosen[0]]


def vq_config(codes: int) -> vq.VQConfig:
    return vq.VQConfig(codebook_size=codes, code_dim=8, z_channels=64, channels=(64, 32, 32), res_blocks=1)


def ar_config(dim: int, codes: int) -> llamagen.LlamaGenConfig:
    return llamagen.LlamaGenConfig(
        layers=6, dim=dim, heads=4, ffn_dim=4 * dim, vocab_size=codes, num_classes=10, grid=GRID
    )


TASKS = {
    task.name: task
    for task in (
        Task("demo", one_digit, vq_config(64), ar_config(128, 64)),
        Task("pairs", digit_pairs, vq_config(128), ar_config(112, 128), torch.bfloat16, torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Place:
    """A task and the device that it is learned on."""

    task: Task
    device: torch.device


def save(payload: object, path: Path) -> None:
    with atomic_file(path) as file:
        torch.save(payload, file)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine to a twentieth of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def saved(model: nn.Module, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    return {"model": {name: tensor.to("cpu", dtype) for name, tensor in model.state_dict().items()}}


@click.group(help=__doc__)
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@click.option("--task", type=click.Choice(list(TASKS)), default="demo", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="That PyTorch trains on, such as cuda.")
@click.pass_context
def main(context: click.Context, threads: int, task: str, device: str) -> None:
    torch.set_num_threads(threads)
    context.obj = Place(TASKS[task], torch.device(device))


out_option = click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)


PICTURES_FOR = 50
"""Steps that draw from one set of moved training images."""


@main.command("vq")
@out_option
@click.option("--steps", default=1500, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option(
    "--decoder",
    "kept",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Train an encoder alone, for the codebook and the decoder of this file, which may have lost its own.",
)
@click.pass_obj
def train_vq(place: Place, out: Path, steps: int, batch: int, rate: float, kept: Path | None) -> None:
    """Train the VQ tokenizer: reconstruction, codebook and commitment losses."""
    task, device = place.task, place.device
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / f"vq_{task.name}.log")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held_out, _ = task.images("test", None)
    held_out = held_out.to(device)
    model = vq.VQModel(task.vq, encoder=True).to(device)
    codebook = model.quantize.embedding.weight
    nn.init.normal_(codebook)
    if kept is not None:
        weights = torch.load(kept, weights_only=True)["model"]
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(vq.ENCODER_PREFIXES))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    used = torch.zeros(task.vq.codebook_size, device=device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate)
        if step % PICTURES_FOR == 0:
            pictures, _ = task.images("train", generator)
        pixels = pictures[torch.randint(len(pictures), (batch,), generator=generator)].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = model.latents(pixels).float()
            tokens = model.nearest(latents)
            codes = model.quantize(tokens).permute(0, 3, 1, 2)
            straight = latents + (codes - latents).detach()
            image = model.decoder(model.post_quant_conv(straight)).float()
        commitment = F.mse_loss(latents, codes.detach())
        chosen = F.mse_loss(codes, latents.detach())
        loss = F.mse_loss(image, pixels) + 0.2 * F.l1_loss(image, pixels) + chosen + 0.25 * commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        used = 0.99 * used + torch.bincount(tokens.flatten(), minlength=len(used)).float()
        if kept is None and step % 50 == 49 and step < steps // 2:
            # Codes that nothing chooses start again at latents of this batch.
            idle = (used < 1).nonzero().flatten()
            pool = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            with torch.no_grad():
                codebook[idle] = pool[torch.randint(len(pool), (len(idle),), generator=generator).to(device)]
            used[idle] = 5
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                shown = held_out[::6]
                error = F.mse_loss(model.decode(model.nearest(model.latents(shown))), shown)
            log(
                step=step + 1,
                loss=round(loss.item(), 5),
                held_out_mse=round(error.item(), 5),
                codes_in_use=int((used >= 1).sum()),
            )
            save(saved(model, task.dtype), out / task.vq_file)


@main.command("slim")
@out_option
@click.pass_obj
def slim(place: Place, out: Path) -> None:
    """Leave the encoder out of the tokenizer's file: drawing needs the decoder alone."""
    path = out / place.task.vq_file
    state = torch.load(path, weights_only=True)["model"]
    save({"model": {k: v for k, v in state.items() if not k.startswith(vq.ENCODER_PREFIXES)}}, path)


def encode(model: vq.VQModel, pixels: Tensor) -> Tensor:
    """Tokens ``[n, GRID * GRID]`` of ``pixels``, on the model's device."""
    device = model.quantize.embedding.weight.device
    with torch.no_grad():
        parts = [model.nearest(model.latents(p.to(device))).flatten(1) for p in pixels.split(64)]
    return torch.cat(parts)


def load_vq(path: Path) -> vq.VQModel:
    state = {name: tensor.float() for name, tensor in torch.load(path, weights_only=True)["model"].items()}
    if not any(name.startswith(vq.ENCODER_PREFIXES) for name in state):
        raise click.ClickException(
            f"{path} has lost its encoder to `slim`: train another with `vq --decoder {path}`"
        )
    model = vq.VQModel(vq.infer_config({k: tuple(v.shape) for k, v in state.items()}), encoder=True)
    model.load_state_dict(state)
    return model.eval()


@main.command("ar")
@out_option
@click.option(
    "--attention",
    type=click.Choice([SOFTMAX, LPD, *(str(v) for v in lasadgen.Variant)]),
    default=SOFTMAX,
    show_default=True,
    help="Softmax attention token by token, or in groups as LPD has it; or linear attention with one of LASADGen's decays.",
)
@click.option("--epochs", default=45, show_default=True)
@click.option("--views", default=8, show_default=True, help="Moved copies of every digit.")
@click.option("--batch", default=16, show_default=True)
@click.option("--rate", default=3e-3, show_default=True)
@click.option("--drop-class", default=0.15, show_default=True, help="Share of null-class rows.")
@click.option("--ema", default=0.998, show_default=True, help="Decay of the weight average that is saved.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Of the first weights, and of how digits are moved and ordered.",
)
@click.pass_obj
def train_ar(
    place: Place,
    out: Path,
    attention: str,
    epochs: int,
    views: int,
    batch: int,
    rate: float,
    drop_class: float,
    ema: float,
    seed: int,
) -> None:
    """Train the transformer on the tokenizer's tokens."""
    task, device = place.task, place.device
    log = Log(out / f"{attention}_{task.name}.log")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = load_vq(out / task.vq_file).to(device)
    sets = [task.images("train", generator if view else None) for view in range(views)]
    tokens = torch.cat([encode(tokenizer, pixels) for pixels, _ in sets])
    classes = torch.cat([labels for _, labels in sets])
    test_pixels, test_labels = task.images("test", None)
    test_tokens = encode(tokenizer, test_pixels)
    log(grids=len(tokens), distinct_tokens=int(tokens.unique().numel()))

    classes, test_labels = classes.to(device), test_labels.to(device)
    # Where no device is named, tensors are made on this one.
    with device:
        model = task.transformer(attention).to(device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        if name == "output.weight":
            nn.init.zeros_(parameter)
    average = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
    )
    per_epoch = len(sets[0][0]) // batch
    steps, losses = epochs * per_epoch, []

    tables = list(group_sizes(GRID).values())

    def loss_of(net: nn.Module, ids: Tensor, grids: Tensor) -> Tensor:
        with device, torch.autocast(device.type, torch.bfloat16):
            condition = net.condition([ids], guided=False)
            if not isinstance(net, lpd.LPD):
                return F.cross_entropy(net(condition, grids[:, :-1]).flatten(0, 1), grids.flatten())
            orders = torch.rand(grids.shape, generator=generator).argsort(1).to(device)
            sizes = tables[int(torch.randint(len(tables), (), generator=generator))]
            logits = net(condition, grids, orders, sizes)
        return F.cross_entropy(logits.flatten(0, 1), grids.gather(1, orders).flatten())

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate)
        rows = torch.randint(len(tokens), (batch,), generator=generator).to(device)
        dropped = (torch.rand(batch, generator=generator) < drop_class).to(device)
        ids = torch.where(dropped, task.ar.num_classes, classes[rows])
        loss = loss_of(model, ids, tokens[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            decay = min(ema, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if step % per_epoch == per_epoch - 1:
            with torch.no_grad():
                held_out_loss = np.mean(
                    [
                        loss_of(average, test_labels[i : i + 60], test_tokens[i : i + 60]).item()
                        for i in range(0, 360, 60)
                    ]
                )
            log(
                epoch=(step + 1) // per_epoch,
                train_loss=round(float(torch.stack(losses[-per_epoch:]).mean()), 4),
                held_out_loss=round(float(held_out_loss), 4),
            )
            if isinstance(average, lasadgen.LASADGen):
                name = "lasadgen" if attention == lasadgen.Variant.MANHATTAN else f"lasadgen_{attention}"
                halves = {key: tensor.half().cpu() for key, tensor in average.state_dict().items()}
                write_lasadgen(halves, average.config, out / f"{name}_{task.name}")
            elif isinstance(average, lpd.LPD):
                halves = {key: tensor.half().cpu() for key, tensor in average.state_dict().items()}
                save({"model": published_tensors(halves)}, out / task.lpd_file)
            else:
                save(saved(average, task.ar_dtype), out / task.ar_file)


if __name__ == "__main__":
    main()
