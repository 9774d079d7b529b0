"""What a family provides, so that the stages can be built around any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from linert.graphs.families.model_facts import Layout, ModelFacts, ModelOption
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Transformer
from linert.runtime.bundles.sampling_settings import SamplingSettings

MOST_LINES = 512
"""Lines of an image, and tokens in one: four times as many as were ever measured. What is larger is taken for a slip."""

MOST_PROMPT = 1 << 16
"""Tokens of a prompt, likewise."""


def raster_faults(lines: int, columns: int, prefix_len: int) -> list[str]:
    """What is wrong with an image of so many ``lines`` of so many tokens behind ``prefix_len`` positions."""
    faults = []
    if not 1 <= min(lines, columns) <= max(lines, columns) <= MOST_LINES:
        faults.append(f"an image of {lines} lines of {columns} tokens; must be 1 to {MOST_LINES} of each")
    if not 1 <= prefix_len <= MOST_PROMPT:
        faults.append(f"prompts of {prefix_len} tokens; must be 1 to {MOST_PROMPT}")
    return faults


class SquareRaster:
    """The raster of models that draw ``grid`` lines of ``grid`` tokens."""

    grid: int

    @property
    def line_width(self) -> int:
        return self.grid

    @property
    def lines(self) -> int:
        return self.grid

    @property
    def image_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def newline_token(self) -> int | None:
        return None


def prompt_inputs(images: int, prefix_len: int, *, guided: bool) -> list[StageTensor]:
    """Token ids of prompts, padded on the left with anything, and the padding of each; where guided, of negative prompts as well,
    whose padding is -1 where there is none."""
    kinds = ("prompt", "negative") if guided else ("prompt",)
    return [
        spec
        for kind in kinds
        for spec in (
            StageTensor(f"{kind}_tokens", torch.int64, (images, prefix_len)),
            StageTensor(f"{kind}_starts", torch.int64, (images,)),
        )
    ]


def negative_or_usual(
    usual: Tensor, usual_starts: Tensor, negatives: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The unconditional sequences ``[I, T, ...]`` and their padding ``[I]``: those of ``negatives`` where their padding is no -1."""
    values, starts = negatives
    taken = starts >= 0
    shaped = taken.reshape(-1, *[1] * (usual.ndim - 1))
    return torch.where(shaped, values, usual), torch.where(taken, starts, usual_starts)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes tokens: ids, the tokens of ``template`` with the prompt in place of ``{prompt}``, ids.

    ``stripped``: white space around the prompt goes.
    """

    first: tuple[int, ...]
    template: str
    last: tuple[int, ...]
    stripped: bool = True


class Family(ABC):
    """A kind of model: how its files are read, and how it is asked for images.

    ``name``: in the manifest. ``title``: for people. ``reads_prompts``: needs a tokenizer. ``cached``: its layers
    keep keys and values, for which there are policies. ``grouped``: it draws in groups (:mod:`linert.graphs.group_transformer`) instead of
    line by line. ``takes``: what may be said of its models when they are exported.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads_prompts: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    takes: ClassVar[frozenset[ModelOption]]
    layouts: ClassVar[tuple[Layout, ...]]
    config_type: ClassVar[type[Any]]

    @property
    def a_title(self) -> str:
        """The title with its article: ``a LlamaGen``, ``an LPD``."""
        # Of letters that are spelled, those whose names begin with a vowel.
        spelled = self.title.isupper() and self.title[0] in "AEFHILMNORSX"
        return f"{'an' if spelled else 'a'} {self.title}"

    @abstractmethod
    def configure(self, facts: ModelFacts) -> Any:
        """The configuration.

        Raises:
            KeyError: a tensor that tells the size is missing; the argument is its name.
            ValueError: something is not known, or contradicts something else; the message says what to do.
        """

    @abstractmethod
    def build(self, config: Any) -> Transformer:
        """The module, on whatever is torch's device."""

    @abstractmethod
    def usual_sampling(self, config: Any) -> SamplingSettings:
        """How images are drawn unless an export says otherwise: as the model's authors recommend."""

    def module_tensors(self, config: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters of those that the checkpoint has, by our names.

        Raises:
            KeyError: one is missing; the argument is its name.
        """
        return dict(parameters)

    def remarks(self, config: Any, facts: ModelFacts) -> list[str]:
        """What a user should know of how the configuration was made."""
        return []

    def caption_dim(self, config: Any) -> int:
        """Width of the features of captions that the model sees; 0 if it sees none."""
        return 0

    def prompt_format(self, config: Any, facts: ModelFacts) -> PromptFormat | None:
        """How prompts become tokens; None for a model that reads none."""
        return None

    def code_order(self, facts: ModelFacts) -> list[int] | None:
        """The codebook's row of every image token; None where they are numbered alike.

        Raises:
            ValueError: it is not known.
        """
        return None
