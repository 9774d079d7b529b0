"""What a training reports as it goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click


class Log:
    """One JSON line a report, to the terminal and to a file beside the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)
        self.began = time.monotonic()

    def __call__(self, **values: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self.began, 1), **values})
        click.echo(line)
        print(line, file=self.file)
