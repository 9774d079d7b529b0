"""The ``linert`` command. Commands load when they are called, so that ``run`` needs no torch and ``--help`` nothing."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import NoReturn

import click

from runtime.errors import LinertError

COMMANDS = {
    "export": ("exporter.commands.export", "Turn a checkpoint into a bundle (needs torch)."),
    "run": ("runtime.commands.run", "Draw images from a bundle."),
    "render": ("runtime.commands.render", "Turn saved tokens into images again."),
    "validate": (
        "exporter.commands.validate",
        "Prove that a bundle computes what PyTorch computes (needs torch).",
    ),
    "compare": (
        "exporter.commands.compare",
        "Compare cache policies and budgets: quality, memory, speed.",
    ),
    "build": ("exporter.commands.build", "Build TensorRT plans from a bundle."),
    "bench": ("runtime.commands.bench", "Measure a bundle against the limit of this machine."),
    "inspect": ("runtime.commands.inspect", "Tell what a bundle is, costs and needs, without loading it."),
}
"""Command name to the module that holds it (as ``command``) and its line in the help."""

INTERRUPTED = 130


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
            if missing in ("exporter", "runtime", "graphs"):
                raise
            extra = cmd_name if cmd_name in ("compare", "build") else "export"
            raise LinertError(
                f"linert {cmd_name} needs {missing}, which is not installed: pip install 'linert[{extra}]'"
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.command is no click command")
        return command

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
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LinertError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}", 2)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
