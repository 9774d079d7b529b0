"""The pages of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
QUICK_START = re.compile(r"<!-- quick start: ([\w ]+) -->\n```sh\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def read_page(name: str) -> str:
    """The text of a page, by its name in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [block for kind, block in FENCE.findall(text) if kind == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def commands(script: str) -> Iterator[list[str]]:
    """The words of every command of a shell script; lines that end in a backslash go on."""
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def quick_starts() -> dict[str, tuple[Path, list[list[str]]]]:
    """The page and the commands of every block that is marked as a quick start, by its name."""
    scripts = {}
    for page in PAGES:
        for name, script in QUICK_START.findall(read_page(page)):
            assert name not in scripts, f"two quick starts are called {name}"
            scripts[name] = (ROOT / page, list(commands(script)))
    return scripts
