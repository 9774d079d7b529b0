"""What people might call a picture, and how it becomes tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from linert.graphs.families import janus
from linert.runtime.drawing.tokenizer import TextTokenizer
from words.pictures import Picture

FILE = "tokenizer.json"
SETS_FILE = "prompts.npz"
MEANT_FILE = "meant.json"
"""The name that each prompt of the lists asks for."""

VOCABULARY = 2048

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
END_OF_SENTENCE = "<\uff5cend▁of▁sentence\uff5c>"
END_OF_IMAGE = "<end_of_image>"
SPECIAL = (
    *(janus.BEGIN_OF_SENTENCE, END_OF_SENTENCE, janus.PADDING, USER, ASSISTANT),
    *(janus.BEGIN_OF_IMAGE, END_OF_IMAGE),
)
TEMPLATE = f"{USER}: {{prompt}}\n\n{ASSISTANT}:"
"""Janus-Pro's, between the beginnings of the sentence and of the image."""

LONGEST = 25
"""Tokens of a prompt that is learned, the template's among them; longer paraphrases are left out."""

PARAPHRASES = 48
"""Of every picture, to learn from."""

UNSEEN = 4
"""Of every picture, to measure with."""

TEMPLATES = (
    *("{a}", "the {name}", "one {name}", "{name} icon", "{name} emoji"),
    *("a picture of {a}", "an icon of {a}", "an image of {a}", "a drawing of {a}", "an emoji of {a}"),
    *("a picture of the {name}", "draw {a}", "draw me {a}", "show me {a}", "please draw {a}"),
    *(
        "a small {name}",
        "a glossy {name}",
        "a 3d picture of {a}",
        "{a} on white",
        "{a} on a white background",
    ),
    *("{a}, glossy, 3d", "{name} in 3d", "this is {a}", "i would like to see {a}", "{subgroup}, {name}"),
    *("{name}, {subgroup}", "{name} ({group})", "{group}: {name}", "{a}, {group}", "{name}, {keyword}"),
    *("{keyword}, {name}", "{a} with {keyword}", "{a}, {keyword}, {other}", "{keyword} {name}"),
)
UNSEEN_TEMPLATES = (
    *("draw a picture of {a}", "show me an icon of the {name}", "a glossy 3d {name} on white"),
    *("i would like {a}, please", "an emoji of {a}, {subgroup}", "{other}, {a}, {keyword}"),
)
"""Nothing is learned with these."""


def with_article(name: str) -> str:
    """``name`` with the article that most would give it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def filled(template: str, picture: Picture, chance: random.Random) -> str:
    """A template with a picture's name, groups and two of its keywords in it."""
    keywords = list(picture.keywords) or [picture.subgroup]
    keyword, other = (chance.choice(keywords) for _ in range(2))
    name = picture.name
    group, subgroup = picture.group, picture.subgroup
    return template.format(
        name=name, a=with_article(name), group=group, subgroup=subgroup, keyword=keyword, other=other
    )


def paraphrase(picture: Picture, chance: random.Random) -> str:
    """The picture called something else: mostly a template with its name, else its name's words in another order, or what it is
    looked for by."""
    kind = chance.random()
    words = picture.name.split()
    if kind < 0.1 and len(words) > 1:
        chance.shuffle(words)
        return chance.choice((" ", ", ")).join(words)
    if kind < 0.2 and len(picture.keywords) > 2:
        some = chance.sample(picture.keywords, chance.randint(3, min(5, len(picture.keywords))))
        return chance.choice((" ", ", ")).join(some)
    if kind < 0.3 and len(words) > 1:
        return f"{' '.join(words[1:])}, {words[0]}"
    return filled(chance.choice(TEMPLATES), picture, chance)


def unseen_paraphrase(picture: Picture, chance: random.Random) -> str:
    """A paraphrase of a kind that nothing is learned with."""
    return filled(chance.choice(UNSEEN_TEMPLATES), picture, chance)


def texts(pictures: Sequence[Picture]) -> Iterator[str]:
    """What the tokenizer is made of: every name often, every template and keyword at least once."""
    chance = random.Random(0)
    for picture in pictures:
        for _ in range(4):
            yield f": {picture.name}\n\n"
        for _ in range(4):
            yield f": {filled(chance.choice(TEMPLATES), picture, chance)}\n\n"
        yield f": {', '.join(picture.keywords)}\n\n"


def write_tokenizer(pictures: Sequence[Picture], out: Path) -> None:
    """Write a byte-level BPE of capitals read as small letters and accents left out: words of names are one token, others several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(pictures), trainer)
    (out / FILE).write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n")


class PromptTokens:
    """A tokenizer that makes whole prompts of texts, as the runtime does."""

    def __init__(self, out: Path) -> None:
        self.tokenizer = TextTokenizer(out / FILE)
        vocabulary = self.tokenizer.vocabulary
        self.begin_of_sentence, self.padding, self.begin_of_image = (
            vocabulary[name] for name in (janus.BEGIN_OF_SENTENCE, janus.PADDING, janus.BEGIN_OF_IMAGE)
        )

    def ids(self, prompt: str) -> list[int]:
        inner = self.tokenizer.ids(TEMPLATE.replace("{prompt}", prompt.strip()))
        return [self.begin_of_sentence, *inner, self.begin_of_image]


@dataclass(frozen=True)
class Prompts:
    """Prompts of n pictures, k of each. ``tokens``: ``[n, k, LONGEST]`` int64, padded on the right with anything. ``lengths``: ``[n, k]``."""

    tokens: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.tokens.to(device), self.lengths.to(device))

    def chosen(self, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, LONGEST]`` and lengths ``[B]`` of one prompt of every picture of ``rows [B]``."""
        return self.tokens[rows, which], self.lengths[rows, which]


def encoded(rows: Sequence[Sequence[str]], tokens: PromptTokens) -> Prompts:
    """The prompts of every picture; all have as many, and none is longer than :data:`LONGEST` tokens."""
    ids = [[tokens.ids(text) for text in row] for row in rows]
    table = np.zeros((len(ids), len(ids[0]), LONGEST), np.int64)
    for n, row in enumerate(ids):
        for k, prompt in enumerate(row):
            table[n, k, : len(prompt)] = prompt
    lengths = np.array([[len(prompt) for prompt in row] for row in ids], np.int64)
    return Prompts(torch.from_numpy(table), torch.from_numpy(lengths))


def paraphrases(
    pictures: Sequence[Picture], tokens: PromptTokens, count: int, *, unseen: bool = False, seed: int = 0
) -> list[list[str]]:
    """So many paraphrases of every picture, of the kinds that are learned or of those that are not. One that is too long is replaced
    by another, or after eight of them by the name."""
    chance = random.Random(seed)
    make = unseen_paraphrase if unseen else paraphrase

    def fitting(picture: Picture) -> str:
        attempts = (make(picture, chance) for _ in range(8))
        return next((text for text in attempts if len(tokens.ids(text)) <= LONGEST), picture.name)

    return [[fitting(picture) for _ in range(count)] for picture in pictures]


@dataclass(frozen=True)
class PromptSets:
    """What the transformer is trained and measured with.

    ``learned``: the exact name first, then paraphrases, which are the name again where it is held out. ``unseen``: paraphrases of
    kinds that are not learned.
    """

    learned: Prompts
    unseen: Prompts


def write_sets(pictures: Sequence[Picture], out: Path) -> None:
    """Write :data:`SETS_FILE`, so that nothing need be encoded where time is short."""
    tokens = PromptTokens(out)
    learned = [
        [picture.name, *([picture.name] * PARAPHRASES if picture.held_out else others)]
        for picture, others in zip(pictures, paraphrases(pictures, tokens, PARAPHRASES), strict=True)
    ]
    unseen = paraphrases(pictures, tokens, UNSEEN, unseen=True, seed=1)
    arrays = {}
    for name, rows in (("learned", learned), ("unseen", unseen)):
        prompts = encoded(rows, tokens)
        arrays[f"{name}_tokens"] = prompts.tokens.numpy().astype(np.uint16)
        arrays[f"{name}_lengths"] = prompts.lengths.numpy().astype(np.uint8)
    np.savez_compressed(out / SETS_FILE, **arrays)


def write_lists(pictures: Sequence[Picture], out: Path) -> dict[str, int]:
    """Write lists of prompts to draw from, one a line and each in another order, and :data:`MEANT_FILE`.

    ``names.txt`` and ``paraphrases.txt``: of what is learned by its name and by paraphrases, where these are of kinds that are
    not learned; ``held_out_names.txt`` and ``held_out_paraphrases.txt``: of what is learned by its exact name alone.

    Returns:
        How many prompts each has.
    """
    tokens = PromptTokens(out)
    unseen = paraphrases(pictures, tokens, 1, unseen=True, seed=5)
    meant: dict[str, str] = {}
    counts = {}
    for held_out, prefix in ((False, ""), (True, "held_out_")):
        chosen = [number for number, picture in enumerate(pictures) if picture.held_out is held_out]
        random.Random(7).shuffle(chosen)
        for kind in ("names", "paraphrases"):
            asked = {
                (pictures[n].name if kind == "names" else unseen[n][0]): pictures[n].name for n in chosen
            }
            meant |= asked
            counts[prefix + kind] = len(asked)
            (out / f"{prefix}{kind}.txt").write_text("".join(f"{prompt}\n" for prompt in asked))
    (out / MEANT_FILE).write_text(json.dumps(meant, indent=0, sort_keys=True) + "\n")
    return counts


def load_sets(out: Path) -> PromptSets:
    with np.load(out / SETS_FILE) as arrays:
        tensors = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays}
    return PromptSets(
        *(Prompts(tensors[f"{n}_tokens"], tensors[f"{n}_lengths"]) for n in ("learned", "unseen"))
    )
