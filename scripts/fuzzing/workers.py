"""Cases in processes of their own: whatever one does, the next one runs. Limits on time and memory."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from linert.runtime.errors import LinertError
from linert.runtime.machine import forget_peak, peak_resident_bytes, resident_bytes

SECONDS = 10
"""That a case may take at the most."""

SPARE_BYTES = 1 << 30
"""That a case may take beside twice its input."""


class Verdict(msgspec.Struct, frozen=True):
    """How a case ended.

    ``kind``: ``refused`` (one sentence and no traceback), ``loaded`` (with the ``fingerprint`` of what came out), or a fault:
    ``traceback``, ``puzzle`` (a refusal that is no sentence), ``hang``, ``died``, ``memory``.
    """

    kind: str
    text: str = ""
    fingerprint: str = ""
    seconds: float = 0.0
    bytes: int = 0


FAULTS = ("traceback", "puzzle", "hang", "died", "memory", "otherwise")


def in_process(action: Callable[[], str], input_bytes: int) -> Verdict:
    """Run ``action``, which returns a fingerprint, and judge how it ends."""
    forget_peak()
    before = resident_bytes() or 0
    begun = time.perf_counter()
    kind, text, fingerprint = "loaded", "", ""
    try:
        fingerprint = action()
    except RefusedError as error:
        kind, text = "refused", str(error)
    except (LinertError, click.ClickException) as error:
        kind, text = "refused", str(error)
    except BaseException as error:  # tokenizers raise panics that are no Exceptions
        kind, text = "traceback", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    if kind == "refused" and ("Traceback" in text or not text.strip() or len(text) > 4000):
        kind = "puzzle"
    grown = peak_resident_bytes() - before
    if kind in ("loaded", "refused") and grown > 2 * input_bytes + SPARE_BYTES:
        kind, text = "memory", f"{grown >> 20} MiB for an input of {input_bytes} bytes; {text}"
    return Verdict(kind, text, fingerprint, time.perf_counter() - begun, grown)


class RefusedError(Exception):
    """The command refused: exit code 2 and this message."""


def command(*arguments: object) -> str:
    """Run ``linert`` in this process; its standard output.

    Raises:
        RefusedError: it refused with a message.
        AssertionError: another exit code, or a traceback.
    """
    from linert.runtime.cli import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["linert", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as done:
        code = done.code
    finally:
        sys.argv = before
    said = err.getvalue()
    if "Traceback" in said:
        raise AssertionError(f"exit code {code} with a traceback: {said[-2000:]}")
    if code == 2:
        raise RefusedError(said.strip().splitlines()[-1] if said.strip() else "")
    if code not in (0, None):
        raise AssertionError(f"exit code {code}: {said[-2000:]}")
    return out.getvalue()


@dataclass
class Running:
    """A forked case: its process, the pipe that its verdict comes through, and what it is."""

    process: int
    pipe: int
    began: float
    case: Any


def start(case: Any, action: Callable[[], str], input_bytes: int) -> Running:
    """Fork a process for ``action``."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return Running(process, read, time.monotonic(), case)
    code = 1
    try:
        os.close(read)
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        verdict = in_process(action, input_bytes)
        os.write(write, msgspec.msgpack.encode(msgspec.structs.replace(verdict, text=verdict.text[-3500:])))
        code = 0
    finally:
        os._exit(code)


def finish(running: Running, *, wait: float) -> Verdict | None:
    """The verdict of a case, None if it is not over within ``wait`` seconds; one that takes too long is ended."""
    ready, _, _ = select.select([running.pipe], [], [], wait)
    late = time.monotonic() - running.began > SECONDS
    if not ready and not late:
        return None
    data = b""
    if ready:
        while part := os.read(running.pipe, 1 << 16):
            data += part
    os.close(running.pipe)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.process, signal.SIGKILL)
    _, status = os.waitpid(running.process, 0)
    if data:
        return msgspec.msgpack.decode(data, type=Verdict)
    if not ready:
        return Verdict("hang", f"more than {SECONDS} seconds")
    return Verdict(
        "died", f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
    )
