"""The transformer's training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from training_log import Log

from linert.graphs.families import janus
from linert.runtime.files.atomic_files import atomic_file
from words import image_tokens, language, pictures, prompts
from words.clock import Average, Budget, Every, autocast, load_floats, optimizer, save_halves

STATE_FILE = "lm_state.pt"
MEASURED = 192
"""Pictures that the losses are measured on."""

LOGGED_EVERY, MEASURED_EVERY, SAVED_EVERY = 5.0, 30.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Args:
        seconds: in all, from the first line on.
        batch: sequences a step.
        rate: the highest learning rate.
        warmup: steps to it.
        ema: decay of the weight average that is saved.
        views: tokens of every picture: as it is, and moved.
        canonical: share of sequences with the picture as it is.
        exact: share of sequences with the exact name.
        dropped: share of sequences without a prompt.
        corrupted: share of the image tokens that are read as others than they are, so that what is drawn survives a slip.
        layers: of the transformer.
        compiled: whether layers are compiled by torch.
    """

    seconds: float
    batch: int
    rate: float
    warmup: int
    ema: float
    views: int
    canonical: float
    exact: float
    dropped: float
    corrupted: float
    layers: int = language.LAYERS
    compiled: bool = False


@dataclass(frozen=True)
class Data:
    """Everything that is drawn from, on one device. ``grids``: tokens ``[views, n, N]``, the pictures as they are first and a view that
    is not learned last. ``held_out``: ``[n]`` bool."""

    grids: Tensor
    sets: prompts.PromptSets
    held_out: Tensor

    @classmethod
    def load(cls, out: Path, device: torch.device, views: int) -> Data:
        named, pixels = pictures.load(out)
        tokenizer = image_tokens.load(out, device)
        images = image_tokens.as_floats(image_tokens.on_device(pixels, device))
        generator = torch.Generator(device).manual_seed(1)
        grids = [image_tokens.encode(tokenizer, images)]
        for _ in range(views):
            view = image_tokens.moved(images, generator, shift=0.03, zoom=0.06)
            grids.append(image_tokens.encode(tokenizer, view))
        sets = prompts.load_sets(out)
        sets = prompts.PromptSets(sets.learned.to(device), sets.unseen.to(device))
        held_out = torch.tensor([picture.held_out for picture in named], device=device)
        return cls(torch.stack(grids), sets, held_out)

    def batch(self, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompts, their lengths, pictures, and which are to be learned without their prompt."""
        device, size = self.grids.device, settings.batch

        def below(limit: int, least: int = 0) -> Tensor:
            return torch.randint(least, limit, (size,), generator=generator, device=device)

        def happens(share: float) -> Tensor:
            return torch.rand(size, generator=generator, device=device) < share

        rows = below(self.grids.shape[1])
        views = below(max(2, len(self.grids) - 1), 1) if len(self.grids) > 2 else torch.zeros_like(rows)
        views = torch.where(happens(settings.canonical), 0, views)
        which = torch.where(happens(settings.exact), 0, below(self.sets.learned.tokens.shape[1]))
        tokens, lengths = self.sets.learned.chosen(rows, which)
        return tokens, lengths, self.grids[views, rows], happens(settings.dropped)

    def measured(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Prompts, lengths and pictures to measure on, by what they tell."""
        chance = torch.Generator().manual_seed(2)
        order = torch.randperm(len(self.held_out), generator=chance).to(self.held_out.device)
        known = order[~self.held_out[order]][:MEASURED]
        others = order[self.held_out[order]][:MEASURED]
        zero = torch.zeros_like(known)
        first, last = self.grids[0], self.grids[-1]
        return {
            "names": (*self.sets.learned.chosen(known, zero), first[known]),
            "paraphrases": (*self.sets.unseen.chosen(known, zero), first[known]),
            "held_out_names": (*self.sets.learned.chosen(others, zero[: len(others)]), first[others]),
            "held_out_paraphrases": (*self.sets.unseen.chosen(others, zero[: len(others)]), first[others]),
            "unseen_view": (*self.sets.learned.chosen(known, zero), last[known]),
        }


def train(out: Path, device: torch.device, settings: Settings, *, resume: bool, begun: bool) -> None:
    """Train on the tokenizer's tokens. Writes the average of the weights in halves, often, and a state to go on from.

    Args:
        resume: go on from that state, in the time that it left.
        begun: the weights in ``out`` are the first of a new training.
    """
    state = torch.load(out / STATE_FILE, weights_only=True, map_location="cpu") if resume else None
    budget = Budget(settings.seconds, state["spent"] if state else 0.0)
    log = Log(out / "lm.log")
    torch.manual_seed(0)
    data = Data.load(out, device, settings.views)
    measured = data.measured()
    tokenizer = image_tokens.load(out, torch.device("cpu"))
    sizes = language.config(tokenizer.config.codebook_size, prompts.PromptTokens(out), settings.layers)
    model = language.TrainedJanus(sizes, tokenizer.quantize.embedding.weight)
    if begun:
        model.load_published(load_floats(out / language.FILE))
    model.to(device)
    average = Average(model, settings.ema)
    adam = optimizer(model, settings.rate, (0.9, 0.95), 0.05)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        average.averaged.load_state_dict(state["average"])
        adam.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    # Other numbers than before a pause.
    generator = torch.Generator(device).manual_seed(first)
    log(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        pictures=data.grids.shape[1],
        views=len(data.grids),
        distinct_tokens=int(data.grids[0].unique().numel()),
        first_step=first,
    )
    total, since = torch.zeros((), device=device), 0
    report, measure, keep = Every(LOGGED_EVERY), Every(MEASURED_EVERY), Every(SAVED_EVERY)

    def show(step: int, *, thoroughly: bool) -> None:
        nonlocal since
        values: dict[str, object] = {"loss": round(total.item() / since, 4)} if since else {}
        if thoroughly:
            values |= losses(average.averaged, measured, device)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        rate = round(adam.param_groups[0]["lr"], 6)
        log(step=step + 1, **values, rate=rate, gigabytes=round(memory / 1e9, 1))
        total.zero_()
        since = 0

    def save(step: int) -> None:
        save_halves(average.averaged.published(), out / language.FILE)
        content = {
            "model": model.state_dict(),
            "average": average.averaged.state_dict(),
            "optimizer": adam.state_dict(),
            "step": step,
            "spent": budget.spent,
        }
        with atomic_file(out / STATE_FILE) as file:
            torch.save(content, file)

    loss_of = training_loss(model, data, settings, generator, device, log)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = first
    for step in budget.steps(first):
        for group in adam.param_groups:
            group["lr"] = budget.rate(step, settings.rate, settings.warmup)
        adam.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
        average.update(step)
        total += loss.detach()
        since += 1
        if report():
            show(step, thoroughly=measure())
        if keep():
            save(step)
    show(step, thoroughly=True)
    save(step)


def corrupted(ids: Tensor, config: janus.JanusConfig, share: float, generator: torch.Generator) -> Tensor:
    """``ids [B, S]`` where so large a share of the image tokens is replaced by any."""
    chance = torch.rand(ids.shape, generator=generator, device=ids.device)
    any_ = torch.randint(config.vocab_size, ids.shape, generator=generator, device=ids.device)
    slips = (chance < share) & (ids >= config.text_vocab_size)
    return torch.where(slips, any_ + config.text_vocab_size, ids)


def training_loss(
    model: language.TrainedJanus,
    data: Data,
    settings: Settings,
    generator: torch.Generator,
    device: torch.device,
    log: Log,
) -> Callable[[], Tensor]:
    """What makes the loss of a new batch. Where compiling fails, the log says so, and nothing is compiled."""

    def loss_with(layer: language.Layer, last: Callable[..., Tensor]) -> Tensor:
        tokens, lengths, grids, dropped = data.batch(settings, generator)
        ids, targets = model.sequences(model.unconditional(tokens, lengths, dropped), lengths, grids)
        ids = corrupted(ids, model.config, settings.corrupted, generator)
        with autocast(device):
            return last(model, model.hidden(ids, layer), targets)

    parts: tuple[language.Layer, Callable[..., Tensor]] = (language.layer, language.prediction_loss)
    if settings.compiled:
        compiled = (
            torch.compile(language.layer, dynamic=False),
            torch.compile(language.prediction_loss, dynamic=False),
        )
        try:
            loss_with(*compiled).backward()
        except Exception as error:
            log(compiled=False, because=str(error)[:300])
        else:
            log(compiled=True)
            parts = compiled
        model.zero_grad(set_to_none=True)
    return lambda: loss_with(*parts)


@torch.no_grad()
def losses(
    model: language.TrainedJanus, measured: dict[str, tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> dict[str, float]:
    """Cross-entropy in nats an image token on each of the sets that are measured on."""
    found = {}
    for name, (tokens, lengths, grids) in measured.items():
        ids, targets = model.sequences(tokens, lengths, grids)
        with autocast(device):
            found[name] = round(language.prediction_loss(model, model.hidden(ids), targets).item(), 4)
    return found
