"""One process at a time writes a name, and what the dead left unfinished goes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from linert.runtime.errors import OutputError
from linert.runtime.files import locks
from linert.runtime.files.atomic_files import atomic_file, check_target
from linert.runtime.files.locks import new_token, partial_path
from linert.runtime.files.replacement import claim_folder, new_folder, scratch_folder, working_folder
from tests.elsewhere import NAMESPACES, Elsewhere, busy, claimed, made, names, namespaces
from tests.things import THING, wait_for

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="starts processes with Linux's signals and mounts"
)

fcntl = pytest.importorskip("fcntl")


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
