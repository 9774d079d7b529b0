"""The options by which commands are told what to draw."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import click

from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.drawing.captions import CaptionConditioner
from linert.runtime.drawing.conditioner import Conditioner
from linert.runtime.drawing.samples import MOST_IMAGES, ClassLabel, Condition, Prompt, shortened
from linert.runtime.errors import RequestError
from linert.runtime.files.text_files import read_lines


@dataclass(frozen=True)
class ConditionRequest:
    """What to draw, as asked for; None and empty were not given."""

    classes: tuple[int, ...] | None = None
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    negative_prompt: str | None = None
    captions: Path | None = None

    @property
    def empty(self) -> bool:
        return self == ConditionRequest()

    def settle(self, conditioner: Conditioner) -> list[Condition]:
        """The conditions, checked; empty if there are none.

        Raises:
            RequestError: what the bundle cannot draw, a negative prompt without prompts, or a file that cannot be read.
        """
        conditions: list[Condition] = [ClassLabel(number) for number in self.classes or ()]
        texts = [*self.prompts, *self._lines()]
        if self.negative_prompt is not None and not texts:
            raise RequestError(
                "--negative-prompt leads away from something: give --prompt or --prompt-file as well"
            )
        conditions += [Prompt(text, self.negative_prompt) for text in texts]
        if self.captions is not None:
            if not isinstance(conditioner, CaptionConditioner):
                raise RequestError("--captions is for models that see features of captions, and this is none")
            conditions += conditioner.read(self.captions)
        conditioner.check(conditions)
        return conditions

    def _lines(self) -> list[str]:
        """The prompts of the file, one a line; blank lines are none."""
        if self.prompt_file is None:
            return []
        texts = [line for line in read_lines(self.prompt_file, RequestError) if line.strip()]
        if not texts:
            raise RequestError(f"{self.prompt_file} holds no prompts")
        return texts


def parse_classes(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """``3,7`` or ``0-9`` or a mixture."""
    if text is None:
        return None
    classes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch("([0-9]+)(?:-([0-9]+))?", part.strip())
        if match is None:
            raise click.BadParameter(f"{shortened(text, 60)!r} is no list of classes like 3,7 or 0-9")
        first, last = match[1], match[2] or match[1]
        # Numbers with more digits than the bound are not worth reading.
        if max(len(first), len(last)) > len(str(MOST_IMAGES)) or int(last) - int(first) >= MOST_IMAGES:
            raise click.BadParameter(
                f"{shortened(part.strip(), 60)} are more than the {MOST_IMAGES} classes that a request may have"
            )
        if int(last) < int(first):
            raise click.BadParameter(f"{part.strip()} counts down: say {last}-{first}")
        classes += range(int(first), int(last) + 1)
        if len(classes) > MOST_IMAGES:
            raise click.BadParameter(f"more than the {MOST_IMAGES} classes that a request may have")
    return tuple(classes)


def condition_options() -> Decorator:
    """Give a command what tells it what to draw; it gets a ``conditions`` argument, a :class:`ConditionRequest`."""
    options = [
        click.option("--classes", callback=parse_classes, help="Classes, like 3,7 or 0-9; they take turns."),
        click.option(
            "--prompt", "prompts", multiple=True, help="What to draw, for models that read. Repeatable."
        ),
        click.option(
            "--prompt-file", type=click.Path(path_type=Path), help="More prompts, one a line of a text file."
        ),
        click.option(
            "--negative-prompt",
            help="What guidance leads away from. Default: the model's own unconditional sequence.",
        ),
        click.option(
            "--captions",
            type=click.Path(path_type=Path),
            help="Features of captions in a .npy file, for models that see those.",
        ),
    ]
    names = [field.name for field in fields(ConditionRequest)]
    return option_group("conditions", options, names, ConditionRequest)
