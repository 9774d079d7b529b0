"""Text as people bring it: encodings, marks and line ends."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linert.runtime.bundles.manifest import PromptInput
from linert.runtime.commands.condition_options import ConditionRequest
from linert.runtime.drawing.conditions import PromptConditioner
from linert.runtime.drawing.samples import Prompt
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import BundleError, RequestError
from linert.runtime.files.text_files import MOST_BYTES, read_json_object, read_lines, read_text
from tests.text_models import write_tiny_janus


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_the_three_usual_ways(mark: bytes, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(mark + end.join([b"a fox", b"", b"snow"]) + end)
    assert read_lines(path, RequestError) == ["a fox", "", "snow", ""]


@pytest.mark.parametrize("letter", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_no_other_character_ends_a_line(letter: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"a fox{letter}in snow\n", encoding="utf-8")
    assert read_lines(path, RequestError) == [f"a fox{letter}in snow", ""]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")))
def test_text_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    assert read_text(path, RequestError) == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a fox".encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
        ("a fox".encode("utf-16-be"), "if it is text in UTF-16, save it as UTF-8"),
        (b"\xfe\xff" + "a fox".encode("utf-16-be"), "is text in UTF-16: save it as UTF-8"),
        ("a fox".encode("utf-32"), "is text in UTF-32: save it as UTF-8"),
        ("ein Fuchs, schön".encode("latin1"), "byte 14 cannot be read so"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
    ],
)
def test_other_encodings_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_text(path, RequestError)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no such device")
    with pytest.raises(RequestError, match=f"is longer than {MOST_BYTES >> 20} MiB"):
        read_text(Path("/dev/zero"), RequestError)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("a fox\n",))
    writer.start()
    assert read_lines(path, RequestError) == ["a fox", ""]
    writer.join()


@pytest.mark.parametrize("content", ['{"a":' * 5000 + "1" + "}" * 5000, "[" * 100_000, "", "[]", "1", "{"])
def test_what_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=r"x\.json (is damaged|holds no JSON object)"):
        read_json_object(path, BundleError)


def test_prompts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    """A mark is no part of the first prompt, and separators are a part of theirs."""
    tokenizer = write_tiny_janus(tmp_path / "janus") / "tokenizer.json"
    spec = PromptInput("tokenizer.json", (0,), "{prompt}", (4,), stripped=True)
    conditioner = PromptConditioner(spec, 64, lambda: TextTokenizer(tokenizer), None, guided=True)
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\u2028in snow\r\n\n  \nan owl\x85at night".encode())
    conditions = ConditionRequest(prompt_file=path).settle(conditioner)
    assert conditions == [Prompt("a red fox\u2028in snow"), Prompt("an owl\x85at night")]
    path.write_bytes(b"\xef\xbb\xbf\n \n")
    with pytest.raises(RequestError, match="holds no prompts"):
        ConditionRequest(prompt_file=path).settle(conditioner)
