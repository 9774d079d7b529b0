"""``linert run``: what is in its folder is verified, gone on with, or left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from linert.runtime.cli import interruptible
from linert.runtime.drawing.output import is_whole, read_recipe
from linert.runtime.files.replacement import working_folder
from tests.conftest import ROOT, Result
from tests.runtime.test_replacement import NAMESPACES, namespaces

Linert = Callable[..., Result]
COMMAND = (sys.executable, "-c", "from linert.runtime.cli import main; main()")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def drawn(linert: Linert, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five images, three batches."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    result = linert("run", tiny_bundle, *REQUEST, "--out", out)
    assert result.code == 0, result.err
    return out


REQUEST = ("--classes", "0-4", "--seed", 3)
PICTURE = "class_0001_seed_000003.png"


@pytest.fixture
def out(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "out"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


def strip(path: Path) -> None:
    with PIL.Image.open(path) as image:
        image.load()
        image.save(path)


@pytest.mark.parametrize("damage", [cut, empty, flip, strip, Path.unlink])
def test_a_damaged_picture_is_drawn_again(
    damage: Callable[[Path], object], out: Path, drawn: Path, linert: Linert, tiny_bundle: Path
) -> None:
    damage(out / PICTURE)
    untouched = out / "class_0002_seed_000003.png"
    before = untouched.stat().st_mtime_ns
    result = linert("run", tiny_bundle, *REQUEST, "--out", out, "--resume")
    assert result.code == 0, result.err
    assert files(out) == files(drawn)
    assert untouched.stat().st_mtime_ns == before


def test_a_picture_of_other_settings_is_drawn_again(
    out: Path, drawn: Path, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert linert("run", tiny_bundle, *REQUEST, "--guidance", 2, "--out", other).code == 0
    assert is_whole(other / PICTURE, read_recipe(other / PICTURE))
    assert not is_whole(other / PICTURE, read_recipe(out / PICTURE))
    shutil.copy(other / PICTURE, out / PICTURE)
    assert linert("run", tiny_bundle, *REQUEST, "--out", out, "--resume").code == 0
    assert files(out) == files(drawn)


def damaged_tokens(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def others_tokens(path: Path) -> None:
    with np.load(path) as stored:
        np.savez(
            path, **{name: stored[name] for name in stored if name != "seeds"}, seeds=stored["seeds"] + 1
        )


@pytest.mark.parametrize("damage", [damaged_tokens, others_tokens, empty, Path.unlink])
def test_without_its_tokens_a_run_draws_the_same_again(
    damage: Callable[[Path], object], out: Path, drawn: Path, linert: Linert, tiny_bundle: Path
) -> None:
    damage(out / "tokens.npz")
    result = linert("run", tiny_bundle, *REQUEST, "--out", out, "--resume")
    assert result.code == 0, result.err
    with np.load(out / "tokens.npz") as resumed, np.load(drawn / "tokens.npz") as wanted:
        assert {name: resumed[name].tolist() for name in resumed} == {
            name: wanted[name].tolist() for name in wanted
        }
    assert {name: data for name, data in files(out).items() if name.endswith(".png")} == {
        name: data for name, data in files(drawn).items() if name.endswith(".png")
    }


def test_maps_are_drawn_for_batches_that_were_finished_without_them(
    out: Path, drawn: Path, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    for kind in ("averaged", "layers"):
        whole = tmp_path / kind
        assert linert("run", tiny_bundle, *REQUEST, "--eviction-map", kind, "--out", whole).code == 0
        result = linert("run", tiny_bundle, *REQUEST, "--eviction-map", kind, "--out", out, "--resume")
        assert result.code == 0, result.err
        assert len(list(out.glob("*.evictions.png"))) == 5
        assert files(out) == files(whole)
    one = out / "class_0000_seed_000003.evictions.png"
    other = out / "class_0004_seed_000003.evictions.png"
    cut(one)
    before = other.stat().st_mtime_ns
    assert (
        linert("run", tiny_bundle, *REQUEST, "--eviction-map", "layers", "--out", out, "--resume").code == 0
    )
    assert files(out) == files(whole)
    assert other.stat().st_mtime_ns == before


def test_unfinished_files_of_the_dead_go_when_a_run_is_resumed(
    out: Path, drawn: Path, linert: Linert, tiny_bundle: Path
) -> None:
    for name in (f".{PICTURE}.0123456789abcdef.partial", "preview.png", ".linert-lock"):
        (out / name).write_bytes(b"half")
    assert linert("run", tiny_bundle, *REQUEST, "--out", out, "--resume").code == 0
    assert files(out) == files(drawn)


def test_an_empty_folder_is_begun_with_and_without_resume(
    drawn: Path, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    for options in ((), ("--resume",), ("--force",)):
        out = tmp_path / "-".join(("out", *options))
        out.mkdir()
        (out / ".DS_Store").touch()
        result = linert("run", tiny_bundle, *REQUEST, "--out", out, *options)
        assert result.code == 0, result.err
        (out / ".DS_Store").unlink()
        assert files(out) == files(drawn)


@namespaces
def test_a_run_that_filled_the_disk_goes_on(drawn: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """From the very first file on: ``run.json`` did not fit, then not all of the pictures."""
    options = " ".join(map(str, REQUEST))
    script = f"""
        set -e
        mount -t tmpfs -o size=4k none {tmp_path}
        linert() {{ "$PYTHON" -c 'from linert.runtime.cli import main; main()' "$@"; }}
        draw() {{ linert run {tiny_bundle} {options} --out {tmp_path}/out "$@" 2> {tmp_path}/../said && code=0 || code=$?; }}
        head -c 4000 /dev/zero > {tmp_path}/full
        draw
        test $code = 2; grep -q 'the disk is full' {tmp_path}/../said; test ! -e {tmp_path}/out
        mkdir {tmp_path}/out 2> /dev/null || (mount -o remount,size=8k {tmp_path}; mkdir {tmp_path}/out)
        mount -o remount,size=32k {tmp_path}
        draw --resume
        test $code = 2; grep -q 'the disk is full' {tmp_path}/../said; test -e {tmp_path}/out/run.json
        test -z "$(find {tmp_path}/out -name '*.partial')"
        mount -o remount,size=1m {tmp_path}
        draw --resume
        cat {tmp_path}/../said >&2
        test $code = 0
        diff -r {drawn} {tmp_path}/out
    """
    done = subprocess.run(
        [*NAMESPACES, "--mount", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# Folders of others.


def test_a_folder_of_photographs_is_never_written_into(
    linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "photographs"
    out.mkdir()
    (out / "contact_sheet.png").write_text("mine")
    for options in ((), ("--force",), ("--resume",)):
        result = linert("run", tiny_bundle, *REQUEST, "--out", out, *options)
        assert result.code == 2
        assert "photographs" in result.err
        assert files(out) == {"contact_sheet.png": b"mine"}
    assert linert("render", tiny_bundle, out / "x.npz", "--out", out, "--force").code == 2


def test_the_folder_is_refused_before_the_bundle_is_looked_at(linert: Linert, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = linert("run", tmp_path / "no bundle", *REQUEST, "--out", tmp_path, "--force")
    assert result.code == 2
    assert "is not the folder of a run" in " ".join(result.err.split())


def test_force_begins_anew_and_leaves_what_no_run_made(out: Path, linert: Linert, tiny_bundle: Path) -> None:
    (out / "holiday.jpg").write_text("mine")
    PIL.Image.new("RGB", (9, 9)).save(out / "drawing.png")
    mine = {name: data for name, data in files(out).items() if name in ("holiday.jpg", "drawing.png")}
    result = linert("run", tiny_bundle, "--classes", 1, "--seed", 8, "--out", out, "--force")
    assert result.code == 0, result.err
    assert set(files(out)) == {
        *mine,
        "class_0001_seed_000008.png",
        "contact_sheet.png",
        "run.json",
        "tokens.npz",
    }
    assert mine.items() <= files(out).items()


def test_force_replaces_no_picture_that_another_program_wrote(
    out: Path, linert: Linert, tiny_bundle: Path
) -> None:
    PIL.Image.new("RGB", (9, 9)).save(out / PICTURE)
    before = files(out)
    result = linert("run", tiny_bundle, *REQUEST, "--out", out, "--force")
    assert result.code == 2
    assert PICTURE in "".join(result.err.split())
    assert files(out) == before


def test_a_second_run_in_the_folder_of_a_live_one_is_refused(
    out: Path, linert: Linert, tiny_bundle: Path
) -> None:
    before = files(out)
    with working_folder(out):
        for option in ("--resume", "--force"):
            result = linert("run", tiny_bundle, *REQUEST, "--out", out, option)
            assert result.code == 2
            assert "another linert is writing" in " ".join(result.err.split())
    assert files(out) == before


def test_render_replaces_its_own_folder_alone(
    drawn: Path, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    render = ("render", tiny_bundle, drawn / "tokens.npz", "--out", out)
    assert linert(*render).code == 0
    names = {*(f"image_{number:06d}.png" for number in range(5)), "contact_sheet.png", "render.json"}
    assert set(files(out)) == names
    assert json.loads(files(out)["render.json"]) == {"images": 5}
    (out / "contact_sheet.png").unlink()
    assert "--force" in linert(*render).err
    assert linert(*render, "--force").code == 0
    assert set(files(out)) == names
    for mine in ("image_000005.png", "holiday.jpg"):
        (out / mine).write_text("mine")
        before = files(out)
        result = linert(*render, "--force")
        assert result.code == 2
        assert mine in "".join(result.err.split())
        assert files(out) == before
        (out / mine).unlink()
    result = linert("render", tiny_bundle, drawn / "tokens.npz", "--out", drawn, "--force")
    assert result.code == 2


@pytest.mark.parametrize("name", ["--save-tokens", "--record-trace"])
def test_files_for_the_end_are_tried_at_the_start(
    name: str, linert: Linert, tiny_bundle: Path, tmp_path: Path
) -> None:
    request = ("run", tiny_bundle, *REQUEST, "--out", tmp_path / "out")
    for place in (tmp_path, tmp_path / "no" / "file"):
        assert linert(*request, name, place).code == 2
    both = ("--save-tokens", tmp_path / "a.npz", "--record-trace", tmp_path / "x" / ".." / "a.npz")
    (tmp_path / "x").mkdir()
    assert "two files" in linert(*request, *both).err
    assert not (tmp_path / "out").exists()


# Ends.


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_every_request_to_end_interrupts_once_and_what_is_ignored_stays_ignored() -> None:
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(kind) for kind in kinds]
    cleaned = []

    def end(kind: signal.Signals) -> None:
        with interruptible(threading.Event()):
            try:
                os.kill(os.getpid(), kind)
            finally:
                for other in kinds:
                    os.kill(os.getpid(), other)
                cleaned.append(kind)

    try:
        # A shell may have started the tests with some of them ignored.
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for kind in kinds:
            with pytest.raises(KeyboardInterrupt):
                end(kind)
        assert cleaned == list(kinds)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interruptible(threading.Event()):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("inspect", "BUNDLE"), ("inspect", "BUNDLE", "--json"), ("--help",)])
def test_output_that_cannot_be_written_is_one_sentence(arguments: tuple[str, ...], tiny_bundle: Path) -> None:
    filled = [str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *filled], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert (
        done.stderr
        == "Error: standard output or a temporary file cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize("name", ["class_0001_seed_000000.png", "contact_sheet.png"])
def test_a_pipe_in_the_place_of_a_picture_is_not_waited_for(
    name: str, linert: Callable[..., Result], tiny_bundle: Path, tmp_path: Path
) -> None:
    run = ("run", tiny_bundle, "--classes", 1, "--out", tmp_path / "out")
    assert linert(*run).code == 0
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)
    result = linert(*run, "--resume")
    assert result.code == 2
    assert f"{name} is no file: move it away" in " ".join(result.err.split())


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(
    linert: Callable[..., Result], tiny_bundle: Path, tmp_path: Path
) -> None:
    run = ("run", tiny_bundle, "--classes", 1, "--out", tmp_path / "out")
    assert linert(*run).code == 0
    (tmp_path / "out" / "run.json").unlink()
    os.mkfifo(tmp_path / "out" / "run.json")
    result = linert(*run, "--resume")
    assert result.code == 2
    assert "run.json cannot be read" in result.err
