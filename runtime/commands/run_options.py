"""The options by which a run is told which files to read and write."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import click

from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.drawing.eviction_map import MapKind
from linert.runtime.drawing.run_folder import PREVIEW_NAME, check_run_folder
from linert.runtime.errors import RequestError
from linert.runtime.files.array_files import check_arrays_target


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run reads and writes, and what it does with what is there; None is not wanted."""

    out: Path
    eviction_map: MapKind | None
    record_trace: Path | None
    replay_trace: Path | None
    orders: Path | None
    save_tokens: Path | None
    preview: bool
    resume: bool
    force: bool

    def check(self) -> None:
        """Raise :class:`RequestError` or :class:`OutputError` for files that cannot be written, or that get in each other's way."""
        for path in (self.save_tokens, self.record_trace):
            check_arrays_target(path)
            if path is not None and path.resolve() in {
                self.out.resolve(),
                (self.replay_trace or self.out).resolve(),
            }:
                raise RequestError(
                    f"{path} is to be written and named by another option too: give another name"
                )
        if (
            self.record_trace is not None
            and self.save_tokens is not None
            and self.record_trace.resolve() == self.save_tokens.resolve()
        ):
            raise RequestError(
                f"--record-trace and --save-tokens both name {self.save_tokens}; give two files"
            )
        if self.record_trace is not None and self.resume:
            raise RequestError("--record-trace cannot record what an earlier run drew: leave --resume out")
        check_run_folder(self.out, resume=self.resume, force=self.force)


def run_options() -> Decorator:
    """Give a command the options of a run's files; it gets them as one ``files``, a :class:`RunFiles`."""
    listed = [
        click.option(
            "--out", required=True, type=click.Path(path_type=Path), help="Folder for the pictures."
        ),
        click.option(
            "--eviction-map",
            type=click.Choice([str(kind) for kind in MapKind]),
            callback=lambda c, p, text: MapKind(text) if text else None,
            is_flag=False,
            flag_value="averaged",
            help="Draw beside each image what stayed in the cache at each line: averaged over the layers, or by layers.",
        ),
        click.option(
            "--record-trace",
            type=click.Path(path_type=Path),
            help="Record which slots were overwritten to this npz file.",
        ),
        click.option(
            "--replay-trace",
            type=click.Path(path_type=Path),
            help="Draw the images of this trace again with its evictions imposed, whatever the scores say.",
        ),
        click.option(
            "--orders",
            type=click.Path(path_type=Path),
            help="Draw image k in the k-th order of this JSON file, a list of lists of cells, instead of in one made of its seed; for models "
            "that draw in groups.",
        ),
        click.option(
            "--save-tokens", type=click.Path(path_type=Path), help="Also write the tokens to this npz file."
        ),
        click.option("--preview", is_flag=True, help=f"Refresh OUT/{PREVIEW_NAME} as lines finish."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run in OUT."),
        click.option(
            "--force", is_flag=True, help="Begin anew in OUT, a run's folder; what that run drew is removed."
        ),
    ]
    return option_group("files", listed, [field.name for field in fields(RunFiles)], RunFiles)
