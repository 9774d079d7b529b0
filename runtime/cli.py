"""The ``linert`` command. Commands load when they are called, so that ``run`` needs no torch and ``--help`` nothing."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import click

from linert.runtime.errors import LinertError

COMMANDS = {
    "export": ("linert.exporter.commands.export", "Turn a checkpoint into a bundle (needs torch)."),
    "run": ("linert.runtime.commands.run", "Draw images from a bundle."),
    "render": ("linert.runtime.commands.render", "Turn saved tokens into images again."),
    "serve": ("linert.runtime.commands.serve", "Serve images over HTTP, as OpenAI's clients ask for them."),
    "validate": (
        "linert.exporter.commands.validate",
        "Prove that a bundle computes what PyTorch computes (needs torch).",
    ),
    "compare": (
        "linert.exporter.commands.compare",
        "Compare cache policies and budgets: quality, memory, speed.",
    ),
    "build": ("linert.exporter.commands.build", "Build TensorRT plans from a bundle."),
    "bench": ("linert.runtime.commands.bench", "Measure a bundle against the limit of this machine."),
    "sweep": (
        "linert.exporter.commands.sweep",
        "Measure variants of a bundle beside each other, and beside PyTorch.",
    ),
    "inspect": (
        "linert.runtime.commands.inspect",
        "Tell what a bundle is, costs and needs, without loading it.",
    ),
}
"""Command name to the module that holds it (as ``command``) and its line in the help."""

INTERRUPTED = 130
GRACE = 3.0
"""Seconds in which further signals do not interrupt again."""


class LazyCommands(click.Group):
    """A group whose commands are imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        try:
            command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing == "linert":
                raise
            extra = cmd_name if cmd_name in ("compare", "build", "serve") else "export"
            raise LinertError(
                f"linert {cmd_name} needs {missing}, which is not installed: pip install 'linert[{extra}]'"
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.command is no click command")
        from linert.runtime.commands.settings_file import with_config

        return with_config(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="linert")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Export and run autoregressive image models with a cache of a few raster lines."""


def main() -> NoReturn:
    """Entry point: errors become one message and an exit code, interruptions clean up and exit with 130."""
    debug = "--debug" in sys.argv[1:]
    asked = threading.Event()
    try:
        try:
            with interruptible(asked):
                code = cli.main(standalone_mode=False)
                # A process may be started without.
                if sys.stdout is not None:
                    sys.stdout.flush()
        except Exception as error:
            # Libraries turn what is raised while they load, call back or close files into errors of their own.
            if asked.is_set():
                raise KeyboardInterrupt from error
            raise
        sys.exit(code if isinstance(code, int) else 0)
    except LinertError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        _say(error.show)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _leave(1)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        _fail(_reason(error), 2)


@contextlib.contextmanager
def interruptible(asked: threading.Event) -> Iterator[None]:
    """Let every signal that asks for an end set ``asked`` and interrupt what is under way, so that it cleans up; what was ignored
    stays so.

    Those that follow within a few seconds are the same request: they do not interrupt the cleaning up.
    """
    last = -GRACE

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        asked.set()
        if now - last >= GRACE:
            last = now
            raise KeyboardInterrupt

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK"):
        number = getattr(signal, name, None)
        # Shells start what runs in the background, and nohup everything, with signals ignored.
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory: {error}".removesuffix(": ")
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        # Everything else that is written has a name.
        return f"standard output or a temporary file cannot be written: {error.strerror}"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _fail(message: str, code: int) -> NoReturn:
    _say(lambda: click.echo(f"Error: {message}", err=True))
    _leave(code)


def _say(tell: Callable[[], object]) -> None:
    """Tell an error, if anybody can be told."""
    with contextlib.suppress(OSError):
        tell()


def _leave(code: int) -> NoReturn:
    """Exit; output that cannot be written is dropped, as Python would complain of it at the very end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
