"""The demo of words: what its training computes is what the exported stages compute."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from words import drawing, folder, image_tokens, language, prompts
from words.clock import Budget, optimizer, save_halves
from words.pictures import Picture, spoken_name

from linert.exporter.models import ModelRequest, load_models
from linert.graphs.families import janus, vq
from linert.graphs.memory import memory_of
from linert.runtime.bundles.manifest import PromptInput
from linert.runtime.drawing.conditions import PromptConditioner
from tests.eager import Eager

APPLE = Picture("red apple", "food drink", "food fruit", ("apple", "fruit", "red", "ripe"))
FOX = Picture("fox", "animals nature", "animal mammal", ("animal", "face", "fox"), held_out=True)
BOS, BOI, PAD, TEXT, CODES, PREFIX = 0, 5, 2, 40, 64, 9
PROMPTS = ([BOS, 20, 21, 22, 23, 24, BOI], [BOS, 30, 31, BOI])


def tiny() -> language.TrainedJanus:
    config = janus.JanusConfig(2, 32, 4, 4, 48, CODES, TEXT, PREFIX, BOS, BOI, PAD, grid=3)
    torch.manual_seed(0)
    model = language.TrainedJanus(config, torch.randn(CODES, 8)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    return model


def padded(*, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts with rubbish on one side, and their lengths, or the padding where it is on the left."""
    tokens = torch.full((len(PROMPTS), PREFIX), TEXT - 1)
    for row, prompt in enumerate(PROMPTS):
        place = slice(PREFIX - len(prompt), None) if left else slice(len(prompt))
        tokens[row, place] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    return tokens, PREFIX - lengths if left else lengths


def training_logits(model: language.TrainedJanus, grids: torch.Tensor, *, dropped: bool) -> torch.Tensor:
    """Logits ``[B, N, V]`` in the form of the training."""
    tokens, lengths = padded(left=False)
    tokens = model.unconditional(tokens, lengths, torch.full((len(tokens),), dropped))
    ids, targets = model.sequences(tokens, lengths, grids)
    assert [row[row != language.IGNORED].tolist() for row in targets] == grids.tolist()
    logits = model.janus.logits(model.hidden(ids))
    return torch.stack([logits[row][targets[row] != language.IGNORED] for row in range(len(grids))])


def test_training_computes_what_the_stages_do() -> None:
    model = tiny()
    net = model.fold()
    config = net.config
    slots = (config.prefix_len + config.image_tokens,) * config.layers
    memory = memory_of(config, images=2, guided=True, capacities=slots)
    tokens, starts = padded(left=True)
    eager = Eager(net, memory, "full", [tokens, starts, tokens, torch.full_like(starts, -1)], greedy=1)
    eager.begin()
    step_logits = [eager.tensors["logits"]]
    while len(step_logits) < config.image_tokens:
        eager.run("decode")
        step_logits.append(eager.tensors["logits"])
        if len(step_logits) % config.grid == 1 and len(step_logits) < config.image_tokens:
            eager.run("line_end")
    grids = eager.tensors["tokens"]
    stages = torch.stack(step_logits, dim=1)
    trained = torch.cat([training_logits(model, grids, dropped=dropped) for dropped in (False, True)])
    assert trained.std() > 0.1
    torch.testing.assert_close(trained, stages, atol=1e-5, rtol=0)


def test_the_sampler_draws_what_the_training_predicts() -> None:
    model = tiny()
    tokens, starts = padded(left=True)
    drawn = drawing.draw(model.fold(), tokens, starts, 3.0, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    conditional, unconditional = (training_logits(model, drawn, dropped=dropped) for dropped in (False, True))
    guided = unconditional + 3.0 * (conditional - unconditional)
    for index in range(drawn.shape[1]):
        noise = -torch.log(-torch.log(torch.rand(2, CODES, generator=generator).clamp(min=1e-20)))
        assert (guided[:, index] + noise).argmax(-1).tolist() == drawn[:, index].tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an untrained training leaves."""
    out = tmp_path_factory.mktemp("words")
    prompts.write_tokenizer([APPLE, FOX], out)
    sizes = language.config(64, prompts.PromptTokens(out), layers=1)
    save_halves(language.TrainedJanus(sizes, torch.randn(64, 8)).published(), out / language.FILE)
    image_tokens.save(vq.VQModel(image_tokens.config(64), encoder=True), out)
    return out


def test_the_folder_is_a_janus_like_any_other(trained: Path, tmp_path: Path) -> None:
    folder.write(trained, tmp_path / "words")
    transformer, decoder = load_models(tmp_path / "words", None, ModelRequest())
    config = transformer.config
    assert (config.layers, config.heads, config.grid, decoder.config.patch) == (1, language.HEADS, 24, 4)
    model = language.load(trained, torch.device("cpu"))
    tokens = torch.arange(64)
    torch.testing.assert_close(transformer.eager().embed(tokens), model.fold().embed(tokens))


def test_prompts_are_learned_as_the_runtime_makes_them(trained: Path, tmp_path: Path) -> None:
    folder.write(trained, tmp_path / "words")
    transformer, _ = load_models(tmp_path / "words", None, ModelRequest())
    assert transformer.prompts is not None
    assert transformer.tokenizer is not None
    tokens = prompts.PromptTokens(trained)
    form = transformer.prompts
    spec = PromptInput("tokenizer.json", form.first, form.template, form.last, form.stripped)
    conditioner = PromptConditioner(spec, 64, lambda: tokens.tokenizer, None, guided=True)
    for text in ("red apple", " A Red Ápple, ripe ", "zebra \N{PARTY POPPER}"):
        assert conditioner.tokens(text) == tokens.ids(text)
    assert tokens.ids("red apple") == tokens.ids("Red Apple")


def test_held_out_names_are_learned_by_the_name_alone(trained: Path) -> None:
    prompts.write_sets([APPLE, FOX], trained)
    sets = prompts.load_sets(trained)
    learned = [{tuple(prompt) for prompt in row.tolist()} for row in sets.learned.tokens]
    assert len(learned[0]) > 10
    assert len(learned[1]) == 1
    assert sets.unseen.tokens.shape == (2, prompts.UNSEEN, prompts.LONGEST)
    unseen = {tuple(prompt) for row in sets.unseen.tokens.tolist() for prompt in row}
    assert not unseen & (learned[0] | learned[1])


def test_every_template_can_be_filled() -> None:
    chance = random.Random(0)
    texts = [prompts.filled(t, FOX, chance) for t in (*prompts.TEMPLATES, *prompts.UNSEEN_TEMPLATES)]
    assert all("fox" in text and "{" not in text for text in texts)
    assert not set(prompts.TEMPLATES) & set(prompts.UNSEEN_TEMPLATES)


def test_names_are_as_people_say_them() -> None:
    assert spoken_name("person: blond hair") == "person with blond hair"
    assert spoken_name("woman: bald") == "bald woman"
    assert spoken_name("Piñata") == "pinata"


def test_a_training_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("words.clock.time.monotonic", lambda: now[0])
    budget, rates = Budget(10.0), []
    for step in budget.steps():
        rates.append(budget.rate(step, 1.0, warmup=2))
        now[0] += 1
    assert len(rates) == 10
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) == rates[1]
    assert rates[-1] < 0.05


def test_pictures_that_were_learned_are_drawn_from_their_prompts() -> None:
    torch.manual_seed(0)
    config = janus.JanusConfig(2, 64, 4, 4, 96, CODES, TEXT, PREFIX, BOS, BOI, PAD, grid=4)
    model = language.TrainedJanus(config, torch.randn(CODES, 8))
    grids = torch.randint(CODES, (2, 16))
    tokens, lengths = padded(left=False)
    adam = optimizer(model, 5e-3, (0.9, 0.95), 0.0)
    for step in range(150):
        read = model.unconditional(tokens, lengths, torch.full((2,), step % 8 == 0))
        ids, targets = model.sequences(read, lengths, grids)
        loss = language.prediction_loss(model, model.hidden(ids), targets)
        adam.zero_grad()
        loss.backward()
        adam.step()
    drawn = drawing.draw(model.fold(), *padded(left=True), 2.0, torch.Generator().manual_seed(3))
    assert (drawn == grids).float().mean() > 0.9
