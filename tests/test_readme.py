"""What the README and the Makefile tell people to type exists."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from linert.runtime.cli import COMMANDS
from tests.conftest import ROOT


def told_commands() -> list[list[str]]:
    """Every ``linert COMMAND ...`` line of the README and the Makefile, continuation lines joined."""
    text = (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text()
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^\s+(?:\$\(BIN\)/)?linert (\w+ .*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.split("#")[0]) for line in lines]


def test_there_is_something_to_check() -> None:
    assert {words[0] for words in told_commands()} == set(COMMANDS)


@pytest.mark.parametrize("words", told_commands(), ids=" ".join)
def test_commands_and_options_exist(words: list[str]) -> None:
    command = importlib.import_module(COMMANDS[words[0]][0]).command
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_scripts_that_the_readme_names_exist() -> None:
    for name in set(re.findall(r"scripts/\w+\.py", (ROOT / "README.md").read_text())):
        assert (ROOT / name).is_file(), name


def test_tables_name_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    for folder in ("graphs", "exporter", "runtime", "scripts"):
        assert f"| `{folder}/` |" in text
