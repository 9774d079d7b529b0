"""What people ask for becomes exactly that, or is refused: classes, prompts through any tokenizer, features."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from linert.runtime.bundles.manifest import CaptionInput, PromptInput
from linert.runtime.commands.condition_options import parse_classes
from linert.runtime.drawing.caption_encoder import CaptionEncoder, t5_tokens
from linert.runtime.drawing.captions import CaptionConditioner
from linert.runtime.drawing.conditions import PromptConditioner, conditions_of
from linert.runtime.drawing.samples import MOST_IMAGES, Caption, ClassLabel, Prompt, list_samples
from linert.runtime.drawing.tokenizer import TextTokenizer
from linert.runtime.errors import BundleError, RequestError
from tests.text_models import JANUS_VOCABULARY, write_tiny_janus, write_tiny_t5

TEXT = "a red fox in fresh snow, König & 狐 🦊"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tokenizers of a Janus and of a T5."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "janus": write_tiny_janus(root / "janus") / "tokenizer.json",
        "t5": write_tiny_t5(root / "t5") / "tokenizer.json",
    }


def changed(path: Path, change: Callable[[Any], Any], to: Path) -> Path:
    """A copy of a tokenizer, changed."""
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(to))
    return to


def conditioner(tokenizer: Path, vocabulary: int | None = JANUS_VOCABULARY) -> PromptConditioner:
    spec = PromptInput("tokenizer.json", (0,), "<|User|>: {prompt}\n\n<|Assistant|>:", (4,), stripped=True)
    return PromptConditioner(spec, 128, lambda: TextTokenizer(tokenizer), vocabulary, guided=True)


def drop_out(tokenizer: Any) -> None:
    tokenizer.model.dropout = 0.9


def frame(tokenizer: Any) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "truncation": lambda tokenizer: tokenizer.enable_truncation(5),
    "truncation from the left": lambda tokenizer: tokenizer.enable_truncation(5, direction="left"),
    "truncation to nothing": lambda tokenizer: tokenizer.enable_truncation(0),
    "padding": lambda tokenizer: tokenizer.enable_padding(length=100),
    "padding to a multiple": lambda tokenizer: tokenizer.enable_padding(pad_to_multiple_of=64),
    "padding from the left": lambda tokenizer: tokenizer.enable_padding(direction="left", length=100),
    "dropout": drop_out,
    "a template of its own": frame,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["janus", "t5"])
def test_what_a_tokenizer_s_file_says_of_batches_does_not_act(
    kind: str, setting: str, files: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(files[kind], SETTINGS[setting], tmp_path / "tokenizer.json")
    plain, set_otherwise = TextTokenizer(files[kind]), TextTokenizer(other)
    assert set_otherwise.ids(TEXT) == plain.ids(TEXT)
    if kind == "janus":
        assert conditioner(other).tokens(TEXT) == conditioner(files[kind]).tokens(TEXT)
    else:
        assert t5_tokens(set_otherwise, TEXT) == t5_tokens(plain, TEXT)


def test_unigrams_are_not_sampled(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("b", -2.0), ("ab", -2.1), ("aba", -2.2)]
    sampled = Tokenizer(models.Unigram(pieces, 0, False, 0.1, 8))
    sampled.pre_tokenizer = pre_tokenizers.Metaspace()
    sampled.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    assert len({tuple(tokenizer.ids("abababab abab")) for _ in range(30)}) == 1


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        (lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace("fox", "")), "fox"),
        (
            lambda tokenizer: setattr(
                tokenizer,
                "pre_tokenizer",
                pre_tokenizers.Sequence([pre_tokenizers.Split("snow", "removed"), tokenizer.pre_tokenizer]),
            ),
            "snow",
        ),
    ],
)
def test_text_that_a_tokenizer_drops_is_told(
    change: Callable[[Any], Any], dropped: str, files: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("janus", "t5"):
        tokenizer = TextTokenizer(changed(files[kind], change, tmp_path / f"{kind}.json"))
        assert tokenizer.ids("a red bird")
        with pytest.raises(RequestError, match=f"leaves '{dropped}' out of"):
            tokenizer.ids("a red fox in snow" if dropped == "snow" else "a fox")


def test_letters_without_a_token_are_told(tmp_path: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "plain.json"))
    tokenizer = TextTokenizer(tmp_path / "plain.json")
    assert tokenizer.ids("a fox") == [0, 26, 5, 14, 23]
    with pytest.raises(RequestError, match="leaves '狐!' out of 'a 狐 in snow!'"):
        tokenizer.ids("a 狐 in snow!")
    with_unknown = {**vocabulary, "<unk>": 27}
    Tokenizer(models.BPE(vocab=with_unknown, merges=[], unk_token="<unk>")).save(str(tmp_path / "unk.json"))
    tokenizer = TextTokenizer(tmp_path / "unk.json")
    assert tokenizer.ids("a 狐") == [0, 26, 27]


def test_white_space_and_what_is_not_seen_may_go(files: dict[str, Path], tmp_path: Path) -> None:
    unseen = [normalizers.Replace(letter, "") for letter in "\u200b\ufe0f"]
    strip = normalizers.Sequence([normalizers.Strip(), *unseen])
    path = changed(
        files["janus"], lambda tokenizer: setattr(tokenizer, "normalizer", strip), tmp_path / "strip.json"
    )
    plain = TextTokenizer(files["janus"])
    assert TextTokenizer(path).ids("  a fox\u200b \u2764\ufe0f ") == plain.ids("a fox \u2764")
    accents = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    path = changed(
        files["janus"], lambda tokenizer: setattr(tokenizer, "normalizer", accents), tmp_path / "plain.json"
    )
    with pytest.raises(RequestError, match="leaves '\u0308' out of"):
        TextTokenizer(path).ids("ko\u0308nig")


def test_special_tokens_are_not_smuggled_in(files: dict[str, Path], tmp_path: Path) -> None:
    """Full-width letters become a special token where the tokenizer compares normalised text."""

    def normalised(tokenizer: Any) -> None:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_special_tokens([AddedToken("<stop>", normalized=True)])

    janus = changed(files["janus"], normalised, tmp_path / "janus.json")
    with pytest.raises(RequestError, match=r"takes a part of the prompt .* for a special token"):
        conditioner(janus, None).tokens("a fox \uff1cstop\uff1e")
    t5 = changed(files["t5"], normalised, tmp_path / "t5.json")
    with pytest.raises(
        RequestError, match=r"contains '<stop>', which the tokenizer takes for a special token"
    ):
        t5_tokens(TextTokenizer(t5), "a fox \uff1cstop\uff1e")


def test_tokens_beyond_the_embedding_are_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    def add(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"word{number}" for number in range(JANUS_VOCABULARY)])

    path = changed(files["janus"], add, tmp_path / "tokenizer.json")
    extended = conditioner(path)
    assert extended.tokens("a red fox") == conditioner(files["janus"]).tokens("a red fox")
    last = f"word{JANUS_VOCABULARY - 1}"
    with pytest.raises(RequestError, match=f"becomes token .*, '{last}', and the model has embeddings for"):
        extended.tokens(f"a {last}")


@pytest.mark.parametrize("text", ["\udcff", "a fox \ud800", "\udfff in snow"])
def test_what_is_no_character_is_refused(text: str, files: dict[str, Path]) -> None:
    """Bytes of a command line that are no UTF-8 arrive as such."""
    asked = conditioner(files["janus"])
    for prompt in (Prompt(text), Prompt("a fox", text)):
        with pytest.raises(RequestError, match="which is no character: give it in UTF-8"):
            asked.check([prompt])
    with pytest.raises(RequestError, match="which is no character"):
        t5_tokens(TextTokenizer(files["t5"]), text)


def test_a_tokenizer_that_is_not_t5_s_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="has no </s>"):
        t5_tokens(TextTokenizer(files["janus"]), "a fox")


@pytest.mark.parametrize(
    "value", [3.7, True, False, None, np.float64(3), np.bool_(True), [3], b"a fox", 3 + 0j]
)
def test_only_whole_numbers_are_classes(value: object) -> None:
    with pytest.raises(RequestError, match="is neither a class"):
        conditions_of([value])  # type: ignore[list-item]


def test_conditions_come_in_a_list() -> None:
    assert conditions_of([3, np.int64(4), "a fox"]) == [ClassLabel(3), ClassLabel(4), Prompt("a fox")]
    assert conditions_of(np.array([3, 4])) == [ClassLabel(3), ClassLabel(4)]
    for value in ("a fox", 3):
        with pytest.raises(RequestError, match="is no list of what to draw"):
            conditions_of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "seed", "message"),
    [
        (10**11, 0, "100000000000 images asked for"),
        (MOST_IMAGES + 1, 0, "at most 1000000"),
        (2.5, 0, "num_images is 2.5, must be a whole number"),
        (True, 0, "num_images is True"),
        (1, 1.5, "seed is 1.5"),
        (1, "7", "seed is '7'"),
        (1, -1, "seed -1 out of range"),
        (1, 2**64, "out of range"),
    ],
)
def test_counts_and_seeds_are_bounded(images: Any, seed: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list_samples([ClassLabel(0)], images, seed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-99999999999", "more than the 1000000 classes"),
        ("0-999999,0-999999", "more than the 1000000 classes"),
        ("9" * 5000, "more than the 1000000 classes"),
        ("9-3", "counts down: say 3-9"),
        ("", "is no list of classes"),
        ("3,,4", "is no list of classes"),
        ("-3", "is no list of classes"),
        ("1_0", "is no list of classes"),
        ("٣", "is no list of classes"),
        ("nan", "is no list of classes"),
    ],
)
def test_lists_of_classes_are_bounded(text: str, message: str) -> None:
    with pytest.raises(click.BadParameter, match=message):
        parse_classes(None, None, text)  # type: ignore[arg-type]


def test_lists_of_classes() -> None:
    assert parse_classes(None, None, "3, 7-9,0") == (3, 7, 8, 9, 0)  # type: ignore[arg-type]
    assert parse_classes(None, None, None) is None  # type: ignore[arg-type]


def with_header(path: Path, header: str, content: bytes = b"") -> None:
    data = header.encode("latin1") + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data + content)


def of(value: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, value, allow_pickle=True)


def headed(shape: str, kind: str = "<f4", content: bytes = bytes(64)) -> Callable[[Path], None]:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    return lambda path: with_header(path, header, content)


def several(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), a=np.ones((3, 4)))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of(np.float32(3)), r"must hold one array of features, .* not \[\]"),
        (of(np.ones(4, np.float32)), r"not \[4\]"),
        (of(np.ones((1, 1, 3, 4), np.float32)), r"not \[1, 1, 3, 4\]"),
        (of(np.ones((3, 4), np.int64)), "features must be real numbers"),
        (of(np.ones((3, 4), np.complex64)), "features must be real numbers"),
        (of(np.array([["a", "b", "c", "d"]])), "features must be real numbers"),
        (of(np.zeros((3,), [("a", "f4"), ("b", "f4")])), r"not \[3\]"),
        (of(np.array([[1.0, None, 2.0, {}]], object)), "is no .npy file"),
        (of(np.zeros((0, 4), np.float32)), "nothing but zeros|is no .npy file"),
        (of(np.full((2, 4), 1e300)), "not finite, or not in float32"),
        (of(np.full((2, 4), np.inf, np.float32)), "not finite"),
        (headed("(1000000000000, 4)"), "is no .npy file"),
        (headed("(99999999999999999999, 4)"), "is no .npy file"),
        (headed("(-3, 4)"), "is no .npy file"),
        (headed("(2, 4)", "|O"), "is no .npy file"),
        (headed("(1000000000000, 0, 4)"), "nothing but zeros|is no .npy file"),
        (lambda path: with_header(path, "(" * 5000), "is no .npy file"),
        (lambda path: with_header(path, "x" * 60000), "is no .npy file"),
        (lambda path: path.write_bytes(b""), "is no .npy file"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x09\x00"), "is no .npy file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
        (lambda path: path.mkdir(), "is no .npy file"),
        (several, "holds several arrays"),
    ],
)
def test_files_that_hold_no_features(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.npy"
    make(path)
    with pytest.raises(RequestError, match=message):
        CaptionConditioner(CaptionInput(4), 8, None, guided=True).read(path)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
def test_features_of_every_real_type_are_read(kind: str, tmp_path: Path) -> None:
    values = np.arange(1, 13, dtype=kind).reshape(3, 4)
    np.save(tmp_path / "captions.npy", np.asfortranarray(values))
    asked = CaptionConditioner(CaptionInput(4), 8, None, guided=False)
    [caption] = asked.read(tmp_path / "captions.npy")
    features = asked.inputs([caption])["caption_features"]
    assert np.array_equal(features[0, -3:], values.astype(np.float32))


def test_a_file_at_which_the_library_panics_is_damaged(files: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads(files["janus"].read_text())
    # Merges are cut by the length of a prefix that they do not have.
    content["model"]["continuing_subword_prefix"] = "####"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"is no tokenizer\.json"):
        TextTokenizer(path)


def test_a_text_encoder_that_was_closed_before_it_was_needed_opens_nothing(files: dict[str, Path]) -> None:
    def opened() -> Any:
        raise AssertionError("a stage was loaded")

    encoder = CaptionEncoder(opened, lambda: TextTokenizer(files["t5"]), 8)
    encoder.close()
    with pytest.raises(RequestError, match="is closed"):
        encoder("a fox")


def test_captions_of_a_file_with_a_long_name_have_file_names() -> None:
    slugs = {Caption(digest * 64, f"{'n' * 240}.npy {digest}").slug for digest in "0123"}
    assert len(slugs) == 4
    assert all(len(slug) < 100 for slug in slugs)
