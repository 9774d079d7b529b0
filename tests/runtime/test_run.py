"""``linert run`` and ``linert render``: files, seeds, batches, resumption, refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from linert import Generator
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.commands import render
from linert.runtime.drawing.conditions import conditions_of
from linert.runtime.drawing.output import contact_sheet, read_recipe, wrapped
from linert.runtime.drawing.samples import ClassLabel, Sample, list_samples
from linert.runtime.errors import LinertError
from tests.conftest import ROOT, TINY, Result

Linert = Callable[..., Result]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("class_*.png"))}


def drawn(result: Result, folder: Path) -> dict[str, bytes]:
    assert result.code == 0, result.err
    return pictures(folder)


def test_one_png_an_image_and_a_contact_sheet(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "out", tmp_path / "tokens.npz"
    result = linert(
        "run",
        tiny_bundle,
        "--classes",
        "3,1",
        "--num-images",
        5,
        "--seed",
        40,
        "--out",
        out,
        "--save-tokens",
        saved,
    )
    assert set(drawn(result, out)) == {
        "class_0003_seed_000040.png",
        "class_0001_seed_000040.png",
        "class_0003_seed_000041.png",
        "class_0001_seed_000041.png",
        "class_0003_seed_000042.png",
    }
    assert len(result.out.splitlines()) == 2
    with PIL.Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 12
    with np.load(saved) as arrays:
        assert arrays["tokens"].shape == (5, TINY.image_tokens)
        assert arrays["tokens"].dtype == np.int64
        assert arrays["classes"].tolist() == [3, 1, 3, 1, 3]
        assert arrays["seeds"].tolist() == [40, 40, 41, 41, 42]


def test_captions_stay_below_their_pictures() -> None:
    assert wrapped("show me an icon of t... · 1", 9, len) == ["show me", "an icon", "of t... ·", "1"]
    assert wrapped("jack-o-lantern · 1", 9, len) == ["jack-o-la", "ntern · 1"]
    assert wrapped("", 9, len) == [""]
    tiles = [PIL.Image.new("RGB", (96, 96), "red")] * 4
    sheet = np.asarray(contact_sheet(tiles, ["a prompt that is long · 1", "x", "", "y"], columns=2))
    # Nothing is written between the columns.
    assert (sheet[:, 6 + 96 : 6 + 96 + 4] == 255).all()
    assert (sheet[6 + 96 :, 6:60] < 100).all(-1).any()


def test_the_metadata_makes_an_image_again(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    options = ("--guidance", 2.5, "--temperature", 0.9, "--top-k", 30, "--top-p", 0.9)
    before = drawn(
        linert(
            "run", tiny_bundle, "--classes", "0-4", "--num-images", 7, "--seed", 8, "--out", first, *options
        ),
        first,
    )
    name = "class_0001_seed_000009.png"
    recipe = read_recipe(first / name)
    sampling = recipe.sampling
    again = tmp_path / "again"
    result = linert(
        "run",
        tiny_bundle,
        "--classes",
        recipe.condition.class_id,
        "--seed",
        recipe.seed,
        "--out",
        again,
        "--guidance",
        sampling.guidance,
        "--temperature",
        sampling.temperature,
        "--top-k",
        sampling.top_k,
        "--top-p",
        sampling.top_p,
    )
    assert drawn(result, again) == {name: before[name]}
    generator = Generator(tiny_bundle)
    assert recipe.bundle_sha256 == generator.manifest.sha256
    assert recipe.cache == generator.manifest.cache


def test_three_lines_of_python_do_the_same(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    images = Generator(tiny_bundle).generate([2, 4], num_images=3, seed=6)
    out = tmp_path / "out"
    linert("run", tiny_bundle, "--classes", "2,4", "--num-images", 3, "--seed", 6, "--out", out)
    for image in images:
        with PIL.Image.open(out / image.sample.file_name) as saved:
            assert saved.tobytes() == image.picture().tobytes()


def test_an_image_does_not_depend_on_its_company(tiny_bundle: Path) -> None:
    generator = Generator(tiny_bundle)
    together = generator.generate([0, 1, 2, 3, 4], seed=3)
    alone = generator.generate([3], seed=3)
    assert (together[3].tokens == alone[0].tokens).all()


def test_more_images_begin_with_the_same_ones() -> None:
    pair, double = conditions_of([1, 2]), conditions_of([1, 1, 2])
    assert list_samples(pair, 7, 5)[:3] == list_samples(pair, 3, 5)
    assert len(set(list_samples(double, 9, 0))) == 9


def test_greedy_ignores_the_seed(tiny_bundle: Path) -> None:
    generator = Generator(tiny_bundle)
    greedy = SamplingSettings(guidance=4.0, greedy=True)
    one, other = (generator.generate([1], seed=seed, sampling=greedy)[0] for seed in (1, 2))
    assert (one.tokens == other.tokens).all()
    drawn_ = generator.generate([1], seed=1)[0]
    assert (drawn_.tokens != one.tokens).any()


def test_top_k_of_one_is_greedy(tiny_bundle: Path) -> None:
    generator = Generator(tiny_bundle)
    greedy = generator.generate([1, 2], sampling=SamplingSettings(guidance=4.0, greedy=True))
    narrow = generator.generate([1, 2], sampling=SamplingSettings(guidance=4.0, top_k=1))
    assert all((a.tokens == b.tokens).all() for a, b in zip(greedy, narrow, strict=True))


SLOW_RUN = """
import signal, sys, time
# A shell may have started the tests with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from linert.runtime.drawing.generator import Generator
# A shell may have started the tests with these ignored.
for kind in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(kind, signal.SIG_DFL)
draw = Generator.draw
def slow(*arguments, **named):
    time.sleep(0.4)
    return draw(*arguments, **named)
Generator.draw = slow
from linert.runtime.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(("finished", "kind"), [(1, "SIGINT"), (2, "SIGINT"), (1, "SIGHUP"), (2, "SIGQUIT")])
def test_an_interrupted_run_goes_on_and_gives_the_same_images(
    finished: int, kind: str, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    request = ("run", tiny_bundle, "--classes", "0,1,2", "--num-images", 8, "--seed", 2, "--preview")
    whole = drawn(linert(*request, "--out", tmp_path / "whole"), tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, *map(str, request), "--out", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    while len(pictures(out)) < 2 * finished and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(getattr(signal, kind))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    before = {path.name: os.stat(path).st_mtime_ns for path in out.glob("class_*.png")}
    assert 0 < len(before) < 8
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    saved = tmp_path / "tokens.npz"
    assert drawn(linert(*request, "--out", out, "--resume", "--save-tokens", saved), out) == whole
    with np.load(saved) as arrays:
        assert len(arrays["tokens"]) == 8


def test_resume_needs_the_same_request(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = ("run", tiny_bundle, "--classes", "0,1", "--out", out)
    assert linert(*request, "--resume").code == 2
    first = drawn(linert(*request), out)
    assert linert(*request).code == 2
    result = linert(*request, "--seed", 1, "--resume")
    assert result.code == 2
    assert "other samples" in result.err
    assert drawn(linert(*request, "--resume"), out) == first
    assert drawn(linert(*request, "--force"), out) == first


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_preview_is_refreshed_and_taken_away(share: float, tiny_bundle: Path, tmp_path: Path) -> None:
    seen = []
    from click.testing import CliRunner

    from linert.runtime.commands import run

    write = run.write_png

    def spy(path: Path, image: PIL.Image.Image) -> None:
        if path.name == run.PREVIEW_NAME:
            # Longer than a line of this model takes by far.
            time.sleep(0.1)
            seen.append(image.tobytes())
        write(path, image)

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(run, "write_png", spy)
        patched.setattr(run, "PREVIEW_SHARE", share)
        arguments = [str(tiny_bundle), "--classes", "1", "--preview", "--out", str(tmp_path / "out")]
        assert CliRunner().invoke(run.command, arguments).exit_code == 0
    # As often as its share of the time allows.
    if share < 1:
        assert len(seen) == 1
        return
    assert len(seen) == TINY.lines
    assert len(set(seen)) == TINY.lines
    assert not (tmp_path / "out" / run.PREVIEW_NAME).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "5"), "classes 0 to 4"),
        (("--classes", "-1"), "no list of classes"),
        (("--classes", "a"), "no list of classes"),
        (("--classes", "1", "--num-images", 0), "0 images"),
        (("--classes", "1", "--seed", -1), "seed -1"),
        (("--classes", "1", "--temperature", -1), "temperature -1.0"),
        (("--classes", "1", "--top-k", -2), "top_k -2"),
        (("--classes", "1", "--top-p", 0), "top_p 0.0"),
        (("--classes", "1", "--guidance", "nan"), "guidance nan"),
        (("--classes", "1", "--guidance-interval", -2), "guidance_interval -2"),
        (("--classes", "1", "--guidance-interval", 10**30), "is not in the range"),
        (("--classes", "1", "--top-k", 10**30), "is not in the range"),
        (("--classes", "0-99999999999"), "more than the 1000000 classes"),
        (("--classes", "9-3"), "counts down"),
        (("--classes", "1", "--num-images", 10**11), "at most 1000000"),
        (("--classes", "1", "--seed", 2**64), "out of range"),
        (("--classes", "1", "--recent-lines", "nan"), "--recent-lines nan: give a number of lines"),
        (("--classes", "1", "--recent-lines", "-inf"), "--recent-lines -inf: give a number of lines"),
        (("--classes", "1", "--policy", ""), "the bundle holds no policy"),
        (("--classes", "1", "--threads", "-1"), "-1 threads asked for: give 1 to"),
        (("--classes", "1", "--threads", 10**12), "1000000000000 threads asked for: give 1 to"),
        (("--classes", "1", "--recent-lines", "inf"), "--recent-lines inf: give a number of lines"),
        (("--classes", "1", "--budget-lines", "1e999999999"), "neither a number of lines nor a fraction"),
        (("--prompt", "a \udcff fox"), "say which with --classes"),
        (("--captions", "absent.npy"), "for models that see features of captions"),
        (("--size", "9" * 5000 + "x64"), "is no size like"),
    ],
)
def test_bad_requests_are_refused(
    options: tuple[object, ...], message: str, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    result = linert("run", tiny_bundle, "--out", tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_render_draws_the_same_pictures(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "out", tmp_path / "tokens.npz"
    linert("run", tiny_bundle, "--classes", "0,1,2", "--out", out, "--save-tokens", saved)
    again, pixels = tmp_path / "again", tmp_path / "pixels.npz"
    result = linert("render", tiny_bundle, saved, "--out", again, "--save-pixels", pixels)
    assert result.code == 0, result.err
    for number in range(3):
        with (
            PIL.Image.open(out / Sample(ClassLabel(number), 0).file_name) as first,
            PIL.Image.open(again / f"image_{number:06d}.png") as second,
        ):
            assert first.tobytes() == second.tobytes()
    with np.load(pixels) as arrays:
        assert arrays["pixels"].shape == (3, 3, 12, 12)
        assert arrays["pixels"].dtype == np.float32


@pytest.mark.parametrize("kind", [LinertError, ImportError, ValueError, OSError])
def test_an_interruption_that_a_library_makes_an_error_of_is_none(
    kind: type[Exception], linert: Linert, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled modules do while they are imported, and zip files that are closed in the middle of an entry."""

    def imported(*arguments: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt as error:
            raise kind("initialization failed") from error

    monkeypatch.setattr(OrtBackend, "run", imported)
    result = linert("run", tiny_bundle, "--classes", "1", "--out", tmp_path / "out")
    assert result.code == 130
    assert result.err.strip().endswith("interrupted")


def test_render_holds_a_few_images_at_a_time(
    linert: Linert, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures of one call of the image decoder are written before the next."""
    np.savez(tmp_path / "tokens.npz", tokens=np.arange(5 * 36).reshape(5, 36) % 64)
    events = []
    run, write = OrtBackend.run, render.write_png
    monkeypatch.setattr(OrtBackend, "run", lambda *arguments: (events.append("run"), run(*arguments)))
    monkeypatch.setattr(
        render, "write_png", lambda path, *rest: (events.append(path.name[:5]), write(path, *rest))
    )
    for index, options in enumerate([(), ("--save-pixels", tmp_path / "pixels.npz")]):
        events.clear()
        result = linert(
            "render", tiny_bundle, tmp_path / "tokens.npz", "--out", tmp_path / f"{index}", *options
        )
        assert result.code == 0, result.err
        assert "".join(name[0] for name in events) == 5 * "ri" + "c"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 35), np.int64), "[images, 36]"),
        (np.full((2, 36), 64), "0 to 63"),
        (np.full((2, 36), -1), "0 to 63"),
        (np.zeros((2, 36), np.float32), "integers"),
        (np.zeros((0, 36), np.int64), "no images"),
    ],
)
def test_render_refuses_tokens_that_do_not_fit(
    tokens: np.ndarray, message: str, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    result = linert("render", tiny_bundle, tmp_path / "tokens.npz", "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_render_refuses_files_that_hold_no_tokens(linert: Linert, tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    for write in (
        lambda: None,
        lambda: path.write_bytes(b"nonsense"),
        lambda: np.savez(path, other=np.zeros(3)),
        lambda: path.write_bytes(path.read_bytes()[:60]),
    ):
        write()
        result = linert("render", tiny_bundle, path, "--out", tmp_path / "out")
        assert result.code == 2, result.err
        assert "Traceback" not in result.err


@pytest.mark.parametrize("tokens", [np.array(7), np.zeros(36, np.int64), np.zeros((1, 36), "datetime64[s]")])
def test_arrays_that_are_no_tokens_are_refused(
    tokens: np.ndarray, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    result = linert("render", tiny_bundle, tmp_path / "tokens.npz", "--out", tmp_path / "out")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "tokens must" in result.err


def test_files_of_arrays_replace_nothing_but_files_of_arrays(
    linert: Linert, tiny_bundle: Path, tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, tokens, trace = (tmp_path / name for name in ("model.pt", "tokens.npz", "trace.npz"))
    # A checkpoint is a zip, as files of arrays are.
    shutil.copy(tiny_files[0], checkpoint)
    run = ("run", tiny_bundle, "--out", tmp_path / "out")
    written = ("--save-tokens", tokens, "--record-trace", trace)
    for _ in range(2):
        assert linert(*run, "--classes", 1, *written, "--force").code == 0
    before = {path: path.read_bytes() for path in (checkpoint, tokens, trace)}
    render = ("render", tiny_bundle, tokens, "--out", tmp_path / "again")
    again = ("run", tiny_bundle, "--out", tmp_path / "new")
    for command in (
        *((*again, "--classes", 1, option, checkpoint) for option in ("--save-tokens", "--record-trace")),
        *((*again, "--replay-trace", trace, option, trace) for option in ("--save-tokens", "--record-trace")),
        (*again, "--classes", 1, "--save-tokens", tmp_path / "new"),
        (*render, "--save-pixels", checkpoint),
        (*render, "--save-pixels", tokens),
    ):
        result = linert(*command)
        assert result.code == 2
        assert "give another" in result.err
    assert before == {path: path.read_bytes() for path in before}
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "again").exists()
