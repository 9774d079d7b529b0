"""Tell the files of a bundle from those of others, so that ``--force`` replaces nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from linert.runtime.backends.trt_flavour import FLAVOURS
from linert.runtime.bundles.engines import ENGINES_FOLDER, RECORD_NAME
from linert.runtime.files.locks import is_hidden_name
from linert.runtime.files.records import RecordError, read_record
from linert.runtime.files.replacement import FolderKind, visible

_MANIFEST = re.compile(r"manifest(\.[1-9]\d*x[1-9]\d*)?\.json")
_PLANS = re.compile(rf"{ENGINES_FOLDER}/({'|'.join(FLAVOURS)})(\.[1-9]\d*x[1-9]\d*)?/[^/]+")


def foreign_to_bundle(folder: Path) -> list[str] | None:
    """Names in ``folder`` that no manifest of a bundle in it knows; None if it holds no manifest of linert's, of any version."""
    manifests = {name: _manifest(folder / name) for name in visible(folder) if _MANIFEST.fullmatch(name)}
    known = {name for name, files in manifests.items() if files is not None}
    if not known:
        return None
    for files in manifests.values():
        known.update(files or ())
    return [name for name in _all_names(folder) if name not in known and not _is_plan(name)]


def foreign_to_plans(folder: Path) -> list[str] | None:
    """Names in ``folder`` that are no plans; None if it holds none at all."""
    names = _all_names(folder)
    foreign = [name for name in names if not _is_plan_file(name)]
    return foreign if len(foreign) < len(names) else None


BUNDLE = FolderKind("a bundle", foreign_to_bundle)
PLANS = FolderKind("plans", foreign_to_plans)


def _manifest(path: Path) -> list[str] | None:
    """The files that a manifest lists; None if it is not linert's."""
    try:
        manifest = read_record(path, dict[str, Any])
        return list(manifest["files"]) if "linert" in manifest["producer"] else None
    except (FileNotFoundError, RecordError, KeyError, TypeError):
        return None


def _all_names(folder: Path) -> list[str]:
    """Everything in a folder but folders, links to folders included, without what systems and unfinished work put there."""
    names = []
    for place, folders, files in os.walk(folder):
        shown = visible(Path(place))
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not is_hidden_name(name)]
        names += [Path(place, name) for name in (*files, *links) if name in shown]
    return sorted(name.relative_to(folder).as_posix() for name in names)


def _is_plan(name: str) -> bool:
    return _PLANS.fullmatch(name) is not None and _is_plan_file(name.rpartition("/")[2])


def _is_plan_file(name: str) -> bool:
    return name == RECORD_NAME or (name.endswith(".plan") and "/" not in name)
