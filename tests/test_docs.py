"""What the documentation and the Makefile tell people to type exists, and the pages say all that they promise."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from linert.runtime.bundles import manifest
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.raster import Raster
from linert.runtime.cli import COMMANDS, cli
from tests.conftest import ROOT
from tests.pages import PAGES, blocks, commands, prose, read_page

README_LINES = 150
COLUMNS = 110
"""Of the widest line of a page: a table's row or a message that stands as a heading; prose is wrapped at 100."""

OTHER_TOOLS = {"--onnxrt", "--strict"}
"""Options of Polygraphy and of mypy."""


def command_of(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    return command


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def told_commands() -> list[list[str]]:
    """Every command in a shell block of a page, and every ``linert`` of the Makefile."""
    told = [words for page in PAGES for block in blocks(read_page(page), "sh") for words in commands(block)]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    told += [
        shlex.split(line) for line in re.findall(r"^\t\$\(BIN\)/(linert .*)$", makefile, flags=re.MULTILINE)
    ]
    return told


def told(program: str) -> list[list[str]]:
    return [words for words in told_commands() if words[0] == program]


def test_every_command_is_shown() -> None:
    assert {words[1] for words in told("linert")} == set(COMMANDS)


def test_no_block_has_commands_of_unknown_programs() -> None:
    assert {words[0] for words in told_commands()} == {"eval", "linert", "make", "pip", "python", "ray"}


@pytest.mark.parametrize("words", told("linert"), ids=" ".join)
def test_commands_and_options_exist(words: list[str]) -> None:
    assert {word for word in words if word.startswith("--")} <= options_of(command_of(words[1]))


@pytest.mark.parametrize("words", told("python"), ids=" ".join)
def test_scripts_and_their_options_exist(words: list[str]) -> None:
    source = (ROOT / words[1]).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, option


def test_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in told("make"):
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words[1]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in told("pip"):
        for named in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(named.split(",")) <= set(extras), named


@pytest.mark.parametrize("page", PAGES)
def test_options_and_files_in_the_text_exist(page: str) -> None:
    known = set().union(*(options_of(command_of(name)) for name in COMMANDS), options_of(cli), OTHER_TOOLS)
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").rglob("*.py"))
    for code in re.findall(r"`([^`]+)`", prose(read_page(page))):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known | {"--help"} or f'"{option}"' in scripts, option
    for name in re.findall(r"(?:scripts|tests|graphs|exporter|runtime)/[\w/]+\.py", read_page(page)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_lines_wrap_and_tables_fit_a_screen(page: str) -> None:
    assert [line for line in read_page(page).splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_can_be_parsed(page: str) -> None:
    for block in blocks(read_page(page), "python"):
        ast.parse(block)


def test_the_readme_is_short() -> None:
    assert len(read_page("README.md").splitlines()) <= README_LINES


def test_the_readme_names_every_folder() -> None:
    for folder in ("graphs", "exporter", "runtime", "scripts"):
        assert f"| `{folder}/` |" in read_page("README.md")


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_of_pages_outside_the_site_lead_somewhere() -> None:
    """Those within the site are checked by its strict build: see test_site.py."""
    for page in (name for name in PAGES if "/" not in name):
        for link in re.findall(r"\]\(([^)]+)\)", read_page(page)):
            if not link.startswith("http"):
                path, _, anchor = link.partition("#")
                assert (ROOT / path).exists(), link
                assert not anchor or anchor in slugs(ROOT / path), link


def test_the_reference_shows_every_command() -> None:
    text = read_page("docs/reference/cli.md")
    shown = re.findall(r":module: ([\w.]+)\n    :command: command\n    :prog_name: linert (\w+)\n", text)
    assert {name: module for module, name in shown} == {
        name: module for name, (module, _) in COMMANDS.items()
    }


def records_of(kind: type[msgspec.Struct], seen: set[type[msgspec.Struct]]) -> set[type[msgspec.Struct]]:
    """``kind`` and every record that its fields hold."""
    if kind not in seen:
        seen.add(kind)
        for hint in typing.get_type_hints(kind).values():
            for part in (hint, *typing.get_args(hint)):
                if isinstance(part, type) and issubclass(part, msgspec.Struct):
                    records_of(part, seen)
    return seen


def test_the_bundle_format_names_every_field() -> None:
    records = records_of(manifest.Manifest, set())
    assert {Raster, CacheSettings, manifest.PromptInput, manifest.Work} <= records
    named = set(re.findall(r"`(\w+)`", read_page("docs/bundle-format.md")))
    assert {field for record in records for field in record.__struct_fields__} - named == set()
    assert f"JSON, schema {manifest.SCHEMA}." in read_page("docs/bundle-format.md")


def messages() -> Iterator[str]:
    """Every text in the code; an ellipsis stands for what is filled in."""
    for folder in ("exporter", "graphs", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_troubleshooting_quotes_messages_as_they_are() -> None:
    texts = list(messages())
    quoted = re.findall(r"^### `(.*)`$", read_page("docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(quoted) >= 30
    assert [words for words in quoted if not any(words in text for text in texts)] == []
