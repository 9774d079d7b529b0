"""Files and folders appear whole or not at all, whoever else writes, however a process ends, wherever they lie."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from linert.runtime.errors import OutputError
from linert.runtime.files import locks, replacement
from linert.runtime.files.atomic_files import atomic_file, check_target
from linert.runtime.files.locks import new_token, partial_path, replaced_path
from linert.runtime.files.replacement import claim_folder, new_folder, recover, scratch_folder, working_folder
from tests.conftest import ROOT
from tests.things import THING, wait_for

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="starts processes with Linux's signals and mounts"
)

Elsewhere = Callable[..., subprocess.Popen[str]]


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from linert.runtime.files import replacement
from linert.runtime.errors import LinertError
from linert.runtime.files.atomic_files import *
from linert.runtime.files.replacement import *
from tests.things import THING, wait_for
out = Path(sys.argv[1])

def claimed(out, *, force=False):
    with claim_folder(out, THING, force=force): pass

def make(text, *, force=False, before=lambda: None):
    with new_folder(out, THING, force=force) as folder:
        (folder / "thing").write_text(text)
        before()
"""

fcntl = pytest.importorskip("fcntl")
NAMESPACES = ("unshare", "--user", "--map-root-user")
namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        [*NAMESPACES, "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="needs user namespaces",
)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Start a process that runs some lines after the prelude, with its output as one stream."""
    started = []

    def start(code: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def thing(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "thing").write_text(text)
    return path


def made(out: Path, text: str = "new", *, force: bool = False) -> None:
    with new_folder(out, THING, force=force) as folder:
        (folder / "thing").write_text(text)


def claimed(out: Path, *, force: bool = False) -> None:
    """Claim a name, and let it go."""
    with claim_folder(out, THING, force=force):
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BUSY = "make('live', force=len(sys.argv) > 3, before=lambda: (Path(sys.argv[2]).touch(), time.sleep(60)))"


def busy(elsewhere: Elsewhere, out: Path, begun: Path, *more: str) -> subprocess.Popen[str]:
    """A process that is making ``out`` and will not come to an end."""
    process = elsewhere(BUSY, out, begun, *more)
    wait_for(begun)
    return process


# Two at once.


def test_a_name_that_a_live_process_is_making_is_refused_and_its_work_stays(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    out, go = tmp_path / "here" / "out", tmp_path / "go"
    code = "make('first', before=lambda: (Path(sys.argv[2]).touch(), wait_for(Path(sys.argv[3]))))"
    process = elsewhere(code, out, tmp_path / "begun", go)
    wait_for(tmp_path / "begun")
    for force in (False, True):
        with pytest.raises(OutputError, match="another linert is writing"):
            claimed(out, force=force)
        with pytest.raises(OutputError, match="another linert is writing"):
            made(out, force=force)
    made(out.with_name("other"))
    go.touch()
    assert process.wait(60) == 0
    assert (out / "thing").read_text() == "first"
    assert names(out.parent) == ["other", "out"]


def test_a_claim_holds_from_before_the_work_to_its_end(elsewhere: Elsewhere, tmp_path: Path) -> None:
    out = tmp_path / "here" / "a" / "out"
    go = tmp_path / "go"
    with claim_folder(out, THING, force=False):
        code = "wait_for(Path(sys.argv[2]))\nmake('second')"
        go.touch()
        said, _ = elsewhere(code, out, go).communicate(timeout=60)
        assert "another linert is writing" in said
        said_here = []

        def try_it() -> None:
            with pytest.raises(OutputError) as caught:
                made(out)
            said_here.append(str(caught.value))

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert "another linert is writing" in said_here[0]
        made(out, "first")
        with pytest.raises(OutputError, match="--force to replace it"):
            made(out, "third")
    assert (out / "thing").read_text() == "first"
    assert names(out.parent) == ["out"]
    with pytest.raises(ZeroDivisionError), claim_folder(tmp_path / "b" / "out", THING, force=False):
        raise ZeroDivisionError
    assert names(tmp_path) == ["go", "here"]


@namespaces
def test_of_containers_with_equal_process_numbers_one_wins_and_nothing_is_lost(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    """Each is process 1 in a namespace of its own, on one volume."""
    code = (
        "assert os.getpid() == 1\n"
        "wait_for(Path(sys.argv[2]))\n"
        "try: make(sys.argv[3], before=lambda: time.sleep(0.3))\n"
        "except LinertError as error: sys.exit(str(error))\n"
    )
    out, go = tmp_path / "here" / "out", tmp_path / "go"
    before = (*NAMESPACES, "--pid", "--fork", "--mount-proc")
    racing = [elsewhere(code, out, go, text, before=before) for text in ("0", "1", "2")]
    time.sleep(1)
    go.touch()
    said = [process.communicate(timeout=60)[0] for process in racing]
    codes = [process.returncode for process in racing]
    assert sorted(codes) == [0, 1, 1], said
    assert (out / "thing").read_text() == str(codes.index(0))
    assert names(out.parent) == ["out"]
    for text in said:
        assert "Traceback" not in text


def test_what_appears_under_the_name_meanwhile_stays_and_so_does_what_was_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for force in (False, True):

        def work(force: bool = force) -> None:
            with new_folder(out, THING, force=force) as folder:
                (folder / "thing").write_text("new")
                out.mkdir(exist_ok=True)
                (out / "photograph.jpg").write_text("mine")

        with pytest.raises(OutputError, match="What was made is in") as caught:
            work()
        kept = Path(str(caught.value).rpartition(" is in ")[2])
        assert (kept / "thing").read_text() == "new"
        assert names(out) == ["photograph.jpg"]
        shutil.rmtree(kept)
        assert names(tmp_path) == ["out"]
        shutil.rmtree(out)


def test_a_folder_is_written_by_one_process_at_a_time(elsewhere: Elsewhere, tmp_path: Path) -> None:
    code = "with working_folder(out): Path(sys.argv[2]).touch(); time.sleep(60)"
    out = tmp_path / "out"
    process = elsewhere(code, out, tmp_path / "begun")
    wait_for(tmp_path / "begun")
    with pytest.raises(OutputError, match="another linert is writing"), working_folder(out):
        pass
    process.kill()
    process.wait()
    with working_folder(out) as empty:
        assert empty
        (out / "mine").touch()
    assert names(out) == ["mine"]
    with working_folder(out) as empty:
        assert not empty


# The dead.


def test_what_a_killed_process_left_goes_at_the_next_start_and_what_a_live_one_makes_stays(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    live = busy(elsewhere, folder / "live", tmp_path / "a")
    for force in (False, True):
        busy(elsewhere, folder / "out", tmp_path / f"b{force}", *["force"] * force).kill()
        deadline = time.monotonic() + 60
        while True:
            try:
                made(folder / "out", force=force)
                break
            except OutputError:
                assert time.monotonic() < deadline
        assert [name for name in names(folder) if not name.startswith(".live.")] == ["out"]
    assert len(list(folder.glob(".live.*.partial/thing"))) == 1
    assert live.poll() is None


def test_files_of_killed_processes_go_at_the_next_start(elsewhere: Elsewhere, tmp_path: Path) -> None:
    code = "with atomic_file(out) as file: file.write(b'x'); file.flush(); Path(sys.argv[2]).touch(); time.sleep(60)"
    folder = tmp_path / "here"
    folder.mkdir()
    dead, live = (elsewhere(code, folder / "tokens.npz", tmp_path / name) for name in ("dead", "live"))
    wait_for(tmp_path / "dead")
    wait_for(tmp_path / "live")
    dead.kill()
    dead.wait()
    (folder / "tokens.npz").write_text("old")
    assert len(names(folder)) == 3
    check_target(folder / "other.npz")
    assert len(names(folder)) == 3
    check_target(folder / "tokens.npz")
    assert len(names(folder)) == 2
    live.kill()
    live.wait()
    with working_folder(folder):
        assert [name for name in names(folder) if "partial" in name] == []
    assert names(folder) == ["tokens.npz"]
    assert (folder / "tokens.npz").read_text() == "old"


def test_scratch_folders_of_the_dead_go_and_those_of_the_living_stay(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    code = "with scratch_folder() as folder: (folder / 'weights').touch(); out.touch(); time.sleep(60)"
    dead, live = (elsewhere(code, tmp_path / name) for name in ("dead", "live"))
    wait_for(tmp_path / "dead")
    wait_for(tmp_path / "live")
    dead.kill()
    dead.wait()
    assert len(names(tmp_path / "scratch")) == 2
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(names(tmp_path / "scratch")) == 2
    assert len(names(tmp_path / "scratch")) == 1
    live.kill()
    live.wait()
    with scratch_folder():
        pass
    assert not names(tmp_path / "scratch")


def left_behind(out: Path, token: str) -> Path:
    left = partial_path(out, token)
    left.mkdir()
    (left / "thing").write_text("half")
    return left


@pytest.mark.parametrize("locking", [True, False])
def test_without_proof_that_nobody_works_on_it_a_leftover_stays_for_a_day(
    locking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine on a network file system, or on one without locks."""
    out, token = tmp_path / "out", new_token()
    if locking:
        token = "00000000" + token[8:]
        monkeypatch.setattr(locks, "is_local", lambda path: False)
    else:

        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", flock)
    left = left_behind(out, token)
    made(out)
    assert names(tmp_path) == [left.name, "out"]
    os.utime(left, (time.time() - 2 * locks.DAY,) * 2)
    made(out, force=True)
    assert names(tmp_path) == ["out"]


def test_a_leftover_from_before_a_power_cut_goes_at_once_on_a_local_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "is_local", lambda path: True)
    left_behind(tmp_path / "out", "00000000" + new_token()[8:])
    made(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_name_as_long_as_names_get_is_written_and_its_leftovers_are_known(tmp_path: Path) -> None:
    out = tmp_path / ("å" * 127)
    left_behind(out, new_token())
    made(out)
    assert names(tmp_path) == [out.name]
    with atomic_file(tmp_path / ("f" * 255)) as file:
        file.write(b"whole")


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
