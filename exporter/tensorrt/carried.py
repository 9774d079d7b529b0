"""Compile kernels into a file that another machine loads: ``python -m exporter.tensorrt.carried LAUNCHES OUT --sm 80,90``.

LAUNCHES is a JSON list of an operation's name and its launch parameters each, which are the fields of its launch::

    [["SpatialDecayStep", {"rows": 40, "slots": 25, "matrices": 24, "key_dim": 64, "value_dim": 64, "dtype": "float16"}]]

OUT is for :func:`runtime.plugins.carried.read_kernels`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from exporter.tensorrt.build import parse_capabilities
from exporter.tensorrt.compile import kernels_of
from runtime.errors import ExportError, LinertError
from runtime.output import atomic_file
from runtime.plugins import OPERATIONS
from runtime.plugins.base import Launch
from runtime.plugins.carried import Carried

NAMES = {operation.launch_type: name for name, operation in OPERATIONS.items()}


def write_kernels(path: Path, launches: Sequence[Launch], capabilities: Sequence[int]) -> None:
    """Compile the kernels of ``launches`` for GPUs of ``capabilities`` (80 means 8.0), and as text for later ones.

    Must not run where ``TRITON_INTERPRET`` is set.

    Raises:
        ExportError: a kernel needs memory that nobody gives it.
        OutputError: the file cannot be written.
    """
    entries = [
        Carried(NAMES[type(launch)], msgspec.to_builtins(launch), kernels_of(launch, capabilities))
        for launch in launches
    ]
    with atomic_file(path) as file:
        file.write(zlib.compress(msgspec.msgpack.encode(entries)))


def parse_launches(text: bytes) -> list[Launch]:
    """The launches that a JSON list describes.

    Raises:
        ExportError: it is no such list, names an operation that is not there, or a shape that its kernels cannot do.
    """
    try:
        described = msgspec.json.decode(text, type=list[tuple[str, dict[str, Any]]])
        return [msgspec.convert(fields, OPERATIONS[name].launch_type) for name, fields in described]
    except KeyError as error:
        raise ExportError(f"no operation {error}; there are {', '.join(OPERATIONS)}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ExportError(f"launches are a JSON list of names and parameters: {error}") from error


@click.command(help=__doc__)
@click.argument("launches", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--sm", required=True, help="Compute capabilities, as 80,86,89,120.")
def main(launches: Path, out: Path, sm: str) -> None:
    try:
        write_kernels(out, parse_launches(launches.read_bytes()), parse_capabilities(sm))
    except LinertError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
