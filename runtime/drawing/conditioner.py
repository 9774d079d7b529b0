"""The interface of what turns requests into the inputs of a prefill stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from linert.runtime.drawing.samples import Condition, Prompt
from linert.runtime.errors import RequestError

if TYPE_CHECKING:
    pass

Inputs = dict[str, NDArray[Any]]

USUAL_PROMPTS = (
    "a red fox sitting in fresh snow at the edge of a forest",
    "a bowl of ripe oranges on a blue wooden table, soft morning light",
    "an old stone lighthouse on a cliff above a stormy sea",
    "a portrait of a woman in a yellow raincoat, rain on the window behind her",
    "a small robot watering flowers on a balcony, watercolour",
    "a narrow street in a mountain village at night, lanterns and wet cobblestones",
    "a steam train crossing a high stone bridge in autumn",
    "a close-up of a dragonfly on a reed, shallow depth of field",
)
"""What is drawn where a command needs any prompts and none are given."""


class Conditioner(ABC):
    """Turns what people ask for into the inputs of a prefill stage.

    Args:
        prefix_len: positions of a condition.
        guided: whether there are unconditional rows.
    """

    def __init__(self, prefix_len: int, *, guided: bool) -> None:
        self.prefix_len, self.guided = prefix_len, guided

    @abstractmethod
    def check(self, conditions: Iterable[Condition]) -> None:
        """Raise :class:`RequestError` for what the bundle cannot draw, before anything is drawn."""

    @abstractmethod
    def inputs(self, conditions: Sequence[Condition]) -> Inputs:
        """The prefill stage's inputs for one condition an image of a batch.

        Raises:
            RequestError: as :meth:`check` does.
        """

    def begins(self, inputs: Inputs) -> NDArray[np.int64]:
        """The first position ``[I]`` of each image's conditions that is not padding, of what :meth:`inputs` made."""
        starts = [
            np.where(values < 0, self.prefix_len, values)
            for name, values in inputs.items()
            if name.endswith("_starts")
        ]
        images = len(next(iter(inputs.values())))
        return np.min(starts, axis=0).astype(np.int64) if starts else np.zeros(images, np.int64)

    @abstractmethod
    def usual(self) -> list[Condition]:
        """Conditions for a command that needs any and was given none."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what it holds of a device."""

    def _check_negative(self, prompt: Prompt) -> None:
        if prompt.negative is not None and not self.guided:
            raise RequestError(
                "a negative prompt needs unconditional rows and the bundle was exported without: export it with "
                "--guidance above 1"
            )

    def _refuse_others(self, conditions: Iterable[Condition], kind: type, remedy: str) -> None:
        if any(not isinstance(condition, kind) for condition in conditions):
            raise RequestError(f"the model does not draw what was asked for; {remedy}")
