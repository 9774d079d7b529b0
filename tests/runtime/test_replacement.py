"""Files and folders appear whole or not at all, however a process ends, wherever they lie, and replace nothing but their kind."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linert.runtime.errors import OutputError
from linert.runtime.files import replacement
from linert.runtime.files.atomic_files import atomic_file, check_target
from linert.runtime.files.locks import new_token, replaced_path
from linert.runtime.files.replacement import new_folder, recover, working_folder
from tests.elsewhere import NAMESPACES, Elsewhere, claimed, made, names, namespaces, thing
from tests.things import THING

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="starts processes with Linux's signals and mounts"
)


# Replacing.


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = thing(tmp_path / "out")
    seen = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.rename", "shutil.rmtree", "os.remove") and str(tmp_path) in str(arguments[0]):
            seen.append((out / "thing").read_text())

    sys.addaudithook(watch)
    made(out, force=True)
    # There was a whole one at every moment, and none was renamed away.
    assert set(seen) == {"old", "new"}
    assert names(tmp_path) == ["out"]
    out.chmod(0o750)
    made(out, "third", force=True)
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("moment", ["between", "after"])
def test_a_replacement_in_two_steps_that_was_killed_is_finished(
    moment: str, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    """What file systems without an exchange leave; whoever opens or writes the folder next finds it."""
    code = (
        "replacement.exchange = lambda one, other: False\n"
        "real, count = Path.rename, [0]\n"
        "def rename(self, target):\n"
        "    count[0] += 'replaced' in str(target) or count[0] > 0\n"
        "    if count[0] == 2 and sys.argv[2] == 'between': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(self, target)\n"
        "    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = rename\n"
        "make('new', force=True)\n"
    )
    for again in ("recover", "replace"):
        out = thing(tmp_path / moment / again / "out")
        process = elsewhere(code, out, moment)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert out.exists() == (moment == "after")
        if again == "recover":
            assert recover(out)
            assert (out / "thing").read_text() == "new"
        claimed(out, force=True)
        assert (out / "thing").read_text() == "new"
        assert names(out.parent) == ["out"]


def test_a_replacement_that_cannot_be_finished_is_undone(tmp_path: Path) -> None:
    thing(replaced_path(tmp_path / "out", new_token()))
    assert recover(tmp_path / "out")
    assert (tmp_path / "out" / "thing").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert not recover(tmp_path / "absent")


def test_without_an_exchange_the_old_folder_comes_back_if_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = thing(tmp_path / "out")
    monkeypatch.setattr(replacement, "exchange", lambda one, other: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith("partial") and target == out and not out.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="What was made is in"):
        made(out, force=True)
    assert (out / "thing").read_text() == "old"


def photographs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_text("mine")
    return folder


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["photographs", "more", "file", "nothing"])
def test_nothing_but_its_kind_is_replaced(what: str, force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "photographs":
        message = "is not a thing"
        photographs(out)
    elif what == "more":
        message = (
            "holds more than a thing and is not replaced: holiday.jpg" if force else "--force to replace it"
        )
        photographs(out)
        thing(out)
    elif what == "file":
        message = "is a file"
        out.write_text("mine")
    else:
        message = "link to nothing"
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(
        (path, path.is_symlink() or path.is_dir() or path.read_text()) for path in tmp_path.rglob("*")
    )
    for attempt in (claimed, made):
        with pytest.raises(OutputError, match=message):
            attempt(out, force=force)
    assert sorted((p, p.is_symlink() or p.is_dir() or p.read_text()) for p in tmp_path.rglob("*")) == before


def test_an_empty_folder_and_a_link_to_a_folder_are_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o750)
    (empty / ".DS_Store").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for out in (empty, link):
        claimed(out)
        made(out)
        assert (out / "thing").read_text() == "new"
    assert empty.stat().st_mode & 0o777 == 0o750
    made(link, "newer", force=True)
    assert (tmp_path / "elsewhere" / "thing").read_text() == "newer"
    assert link.is_symlink()
    assert names(tmp_path) == ["elsewhere", "empty", "link"]


def test_what_cannot_be_written_is_said_before_any_work_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        claimed(tmp_path / "file" / "a" / "out")
    for target, message in ((tmp_path / "no" / "x", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(OutputError, match=message):
            check_target(target)
    claimed(tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == ["file"]

    def fail() -> None:
        with new_folder(tmp_path / "a" / "b" / "out", THING, force=False) as folder:
            (folder / "thing").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ZeroDivisionError), working_folder(tmp_path / "c" / "d"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["a", "file"]
    assert not names(tmp_path / "a" / "b")


MOUNTED = """
import subprocess
def refused(attempt):
    try:
        with attempt: pass
    except LinertError as error: return str(error)
def mount(*arguments): subprocess.run(['mount', *map(str, arguments)], check=True)
"""


@namespaces
def test_mount_points_and_read_only_places_are_refused_before_any_work(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    code = """
for name in ('tmpfs', 'bound', 'open'): (out / name).mkdir()
mount('-t', 'tmpfs', 'none', out / 'tmpfs')
mount('--bind', out / 'bound', out / 'bound')
mount('--bind', out / 'open', out / 'open')
for name in ('tmpfs', 'bound'):
    for force in (False, True):
        try: claimed(out / name, force=force)
        except LinertError as error: assert 'mount point' in str(error) and f'{name}/new' in str(error), error
        else: raise SystemExit('let in')
        assert 'mount point' in refused(new_folder(out / name, THING, force=force))
    # What is written in place needs nobody's name.
    with working_folder(out / name) as empty:
        assert empty
        (out / name / 'picture').touch()
    out_, out = out, out / name / 'inside'
    make('new')
    out = out_
mount('-o', 'remount,bind,ro', out / 'open')
for attempt in (lambda: claimed(out / 'open' / 'new'), lambda: check_target(out / 'open' / 'x')):
    try: attempt()
    except LinertError as error: assert 'Read-only file system' in str(error), error
    else: raise SystemExit('let in')
assert 'Read-only file system' in refused(working_folder(out / 'open' / 'new'))
assert 'Read-only file system' in refused(working_folder(out / 'open'))
assert 'Read-only file system' in refused(atomic_file(out / 'open' / 'x'))
"""
    process = elsewhere(MOUNTED + code, tmp_path, before=(*NAMESPACES, "--mount"))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said


@namespaces
def test_a_full_disk_leaves_what_was_there(elsewhere: Elsewhere, tmp_path: Path) -> None:
    code = """
mount('-t', 'tmpfs', '-o', 'size=64k', 'none', out)
volume, out = out, out / 'out'
make('old')
(volume / 'tokens').write_text('old')
before = sorted(os.walk(volume))
def fill():
    (partial,) = volume.glob('.out.*.partial')
    (partial / 'weights').write_bytes(bytes(100_000))
try: make('new', force=True, before=fill)
except LinertError as error: assert 'the disk is full' in str(error), error
else: raise SystemExit('let in')
try:
    with atomic_file(volume / 'tokens') as file: file.write(bytes(100_000))
except LinertError as error: assert 'the disk is full' in str(error), error
else: raise SystemExit('let in')
assert sorted(os.walk(volume)) == before
assert (volume / 'tokens').read_text() == (out / 'thing').read_text() == 'old'
"""
    process = elsewhere(MOUNTED + code, tmp_path, before=(*NAMESPACES, "--mount"))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said


# Files.


def test_links_stay_links_and_devices_stay_devices(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "there" / "tokens.npz")
    for text in (b"one", b"two"):
        check_target(link)
        with atomic_file(link) as file:
            file.write(text)
        assert link.is_symlink()
        assert (tmp_path / "there" / "tokens.npz").read_bytes() == text
    assert names(tmp_path / "there") == ["tokens.npz"]
    check_target(Path(os.devnull))
    with atomic_file(Path(os.devnull)) as file:
        file.write(b"gone")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(OutputError, match="the disk is full"), atomic_file(Path("/dev/full")) as file:
        file.write(b"x")


def test_data_reaches_the_disk_before_the_name_and_the_name_before_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def spy(self: Path, target: Path) -> Path:
            done.append(f"name {target.name}")
            return real(self, target)

        return spy

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed(rename))
    monkeypatch.setattr(Path, "replace", renamed(replace))
    with new_folder(tmp_path / "out", THING, force=False) as folder:
        (folder / "thing").write_text("new")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "words").write_text("")
        partial = folder.name
    *before, name, after = done
    assert set(before) == {"sync thing", "sync words", "sync tokenizer", f"sync {partial}"}
    assert (name, after) == ("name out", f"sync {tmp_path.name}")
    done.clear()
    with atomic_file(tmp_path / "file") as file:
        file.write(b"whole")
        partial = Path(file.name).name
    assert done == [f"sync {partial}", "name file", f"sync {tmp_path.name}"]
    done.clear()
    with atomic_file(tmp_path / "picture", durable=False) as file:
        file.write(b"whole")
    assert done == ["name picture"]
