"""The VQ tokenizer: its training, and pictures as tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from training_log import Log

from linert.graphs.families import vq
from words import pictures
from words.clock import Average, Budget, Every, autocast, load_floats, optimizer, save_halves

FILE = "vq.safetensors"
SHEET = "reconstructions.png"
GRID = 24

HELD_OUT_EVERY = 30
"""One picture in so many measures the tokenizer and is not learned by it."""

MEASURED_TIMES = 12

IDLE = 0.02
"""Share of the mean use, below which a code is idle."""

SAVED_EVERY = 25.0


def config(codes: int) -> vq.VQConfig:
    """Two halvings, from 96 pixels to 24 tokens; the decoder has 0.6 million parameters."""
    return vq.VQConfig(codes, code_dim=8, z_channels=64, channels=(64, 64, 32), res_blocks=1, attention=())


def on_device(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Pictures ``[n, h, w, 3]`` as ``[n, 3, h, w]`` uint8 on ``device``."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)


def as_floats(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] of uint8 ones."""
    return images.float() / 127.5 - 1


def as_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Pixels ``[n, h, w, 3]`` uint8 of ``[n, 3, h, w]`` in about [-1, 1]."""
    scaled = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def moved(images: Tensor, generator: torch.Generator, *, shift: float, zoom: float) -> Tensor:
    """``images [n, 3, h, w]`` in [-1, 1], each moved by up to ``shift`` of its size and zoomed by up to ``zoom``, on white."""
    n = len(images)
    noise = torch.rand(n, 3, generator=generator, device=images.device) * 2 - 1
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + zoom * noise[:, 0]
    theta[:, :, 2] = 2 * shift * noise[:, 1:]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # What comes in from outside is zero: no ink.
    ink = F.grid_sample(1 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return 1 - ink


def differences(image: Tensor) -> tuple[Tensor, Tensor]:
    """Steps from pixel to pixel, down and to the right."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def picture_loss(image: Tensor, pixels: Tensor) -> Tensor:
    """Squares for colour, distances for sharpness, and steps between pixels, without which edges are blurred."""
    edges = [F.l1_loss(a, b) for a, b in zip(differences(image), differences(pixels), strict=True)]
    return (
        F.mse_loss(image, pixels)
        + 0.2 * F.l1_loss(image, pixels)
        + 0.2 * sum(edges, torch.zeros_like(edges[0]))
    )


def reconstructed(model: vq.VQModel, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.decode(model.nearest(model.latents(p))) for p in pixels.split(256)])


def psnr(image: Tensor, pixels: Tensor) -> float:
    """Peak signal to noise in dB, of clamped pixels in [-1, 1]."""
    error = F.mse_loss(image.clamp(-1, 1), pixels)
    return round(10 * math.log10(4 / error.item()), 2)


def train(
    out: Path,
    device: torch.device,
    seconds: float,
    *,
    codes: int,
    batch: int,
    rate: float,
    ema: float,
    warmup: int,
    begun: bool,
) -> None:
    """Train the tokenizer: reconstruction, codebook and commitment losses. Writes :data:`FILE`, in halves, and :data:`SHEET`.

    ``begun``: the weights in ``out`` are the first.
    """
    budget = Budget(seconds)
    log = Log(out / "vq.log")
    # All batches are of one shape: the quickest convolutions are looked for once.
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    _, data = pictures.load(out)
    images = on_device(data, device)
    measured = as_floats(images[::HELD_OUT_EVERY])
    learned = torch.tensor([i for i in range(len(images)) if i % HELD_OUT_EVERY], device=device)
    model = vq.VQModel(config(codes), encoder=True)
    nn.init.normal_(model.quantize.embedding.weight)
    if begun:
        model.load_state_dict(load_floats(out / FILE))
    model.to(device)
    codebook = model.quantize.embedding.weight
    average = Average(model, ema)
    adam = optimizer(model, rate, (0.9, 0.99), 1e-4)
    used = torch.zeros(codes, device=device)
    total, since = torch.zeros((), device=device), 0
    report, keep = Every(seconds / MEASURED_TIMES), Every(SAVED_EVERY)

    def measure(step: int) -> None:
        nonlocal since
        shown = reconstructed(average.averaged, measured)
        log(
            step=step + 1,
            **({"loss": round(total.item() / since, 5)} if since else {}),
            held_out_psnr=psnr(shown, measured),
            codes_in_use=int((used >= IDLE * used.mean()).sum()),
            rate=adam.param_groups[0]["lr"],
        )
        total.zero_()
        since = 0

    save(average.averaged, out)
    step = 0
    for step in budget.steps():
        for group in adam.param_groups:
            group["lr"] = budget.rate(step, rate, warmup)
        rows = learned[torch.randint(len(learned), (batch,), generator=generator, device=device)]
        pixels = moved(as_floats(images[rows]), generator, shift=0.06, zoom=0.1)
        with autocast(device):
            latents = model.quant_conv(model.encoder(pixels))
        latents = F.normalize(latents.float(), dim=1)
        with torch.no_grad():
            tokens = model.nearest(latents)
        codes_ = model.quantize(tokens).permute(0, 3, 1, 2)
        straight = latents + (codes_ - latents).detach()
        with autocast(device):
            image = model.decoder(model.post_quant_conv(straight))
        commitment = F.mse_loss(latents, codes_.detach())
        chosen = F.mse_loss(codes_, latents.detach())
        loss = picture_loss(image.float(), pixels) + chosen + 0.25 * commitment
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        average.update(step)
        total += loss.detach()
        since += 1
        flat = tokens.flatten()
        used.mul_(0.99).index_add_(0, flat, torch.ones(len(flat), device=device))
        if step % 50 == 49 and budget.share < 0.5:
            restart(codebook, used, latents.detach(), generator)
        if report():
            measure(step)
        if keep():
            save(average.averaged, out)
    measure(step)
    save(average.averaged, out)
    write_sheet(average.averaged, images, out)


@torch.no_grad()
def restart(codebook: Tensor, used: Tensor, latents: Tensor, generator: torch.Generator) -> None:
    """Codes ``[K, d]`` that hardly anything chooses start again at some of ``latents [n, d, h, w]``; none is looked at on the host."""
    pool = latents.permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.randint(len(pool), (len(codebook),), generator=generator, device=codebook.device)
    usual = used.mean()
    idle = used < IDLE * usual
    codebook.copy_(torch.where(idle[:, None], pool[rows], codebook))
    used.copy_(torch.where(idle, 5 * IDLE * usual, used))


def save(model: vq.VQModel, out: Path) -> None:
    save_halves(model.state_dict(), out / FILE)


def load(out: Path, device: torch.device) -> vq.VQModel:
    """The trained tokenizer with its encoder, in float32."""
    state = load_floats(out / FILE)
    model = vq.VQModel(vq.infer_config({k: tuple(v.shape) for k, v in state.items()}), encoder=True)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval().to(device)


def write_sheet(model: vq.VQModel, images: Tensor, out: Path) -> None:
    """Pictures that were not learned and, below each row of them, what the tokenizer makes of them."""
    shown = images[::HELD_OUT_EVERY][:40]
    made = as_bytes(reconstructed(model, as_floats(shown)))
    given = as_bytes(as_floats(shown))
    rows = [np.concatenate([given[i : i + 10], made[i : i + 10]]) for i in range(0, len(given), 10)]
    sheet: Image.Image = pictures.sheet(np.concatenate(rows), 10)
    sheet.save(out / SHEET)


@torch.no_grad()
def encode(model: vq.VQModel, pixels: Tensor) -> Tensor:
    """Tokens ``[n, GRID * GRID]`` of ``pixels [n, 3, 96, 96]``."""
    return torch.cat([model.nearest(model.latents(part)).flatten(1) for part in pixels.split(256)])
