"""Which options of an export, like ``--grid`` and ``--heads``, each family takes: one table, of which refusals and the help are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from linert.graphs.families import FAMILIES
from linert.graphs.families.base import Family
from linert.graphs.families.model_facts import ModelOption
from linert.runtime.errors import RequestError

FLAGS: Mapping[ModelOption, str] = {
    ModelOption.GRID: "--grid",
    ModelOption.HEADS: "--heads",
    ModelOption.SIZE: "--size",
    ModelOption.PROMPT_TOKENS: "--prompt-tokens",
    ModelOption.TOKENIZER: "--tokenizer",
    ModelOption.TEMPLATE: "--prompt-template",
    ModelOption.TEXT_ENCODER: "--text-encoder",
}
"""What each is called on the command line."""


def takers(option: ModelOption) -> str:
    """The families that take an option, for people: ``LlamaGen, Janus``."""
    return ", ".join(family.title for family in FAMILIES.values() if option in family.takes)


def help_text(option: ModelOption, what: str) -> str:
    """The help of an option: for which families it is, and ``what`` it says."""
    return f"{takers(option)}: {what}"


def check_options(path: Path, family: Family, options: Mapping[ModelOption, object]) -> None:
    """Raise :class:`RequestError` for what was said of a model whose family does not take it.

    Args:
        path: of the checkpoint.
        options: values by option; None was not given.
    """
    if wrong := [
        option for option, value in options.items() if value is not None and option not in family.takes
    ]:
        shown = " and ".join(f"{FLAGS[option]} (for {takers(option)})" for option in wrong)
        raise RequestError(f"{path} is {family.a_title}, which takes no {shown}: leave that out")
