"""Metrics of somebody's own, from a file or a module.

A file is loaded under a name that nothing else has, and what stands beside it comes last on the path: neither can take
the place of one of our modules or of the standard library's.
"""

from __future__ import annotations

import ast
import filecmp
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from linert.runtime.errors import LinertError, RequestError
from linert.runtime.measuring.metrics import Metric

DEFAULT_FACTORY = "metrics"

OURS = ("runtime", "exporter", "graphs")
"""What metrics import of linert is the linert that runs, even beside a checkout of another."""


def load_metrics(source: str) -> Sequence[Metric]:
    """The metrics that ``source`` makes: ``package.module[:function]`` or ``path/to/file.py[:function]``.

    The function (``metrics`` unless named) takes nothing and returns a sequence of :class:`Metric`.

    Raises:
        RequestError: there is no such file, module or function, it fails, it imports a neighbour whose name is taken, or it
            does not return metrics that can be told apart.
    """
    place, _, name = source.partition(":")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    factory = getattr(module, name or DEFAULT_FACTORY, None)
    if not callable(factory):
        raise RequestError(f"{place} has no function {name or DEFAULT_FACTORY}() that makes metrics")
    try:
        metrics = list(cast("Sequence[Metric]", factory()))
    except LinertError:
        raise
    except Exception as error:
        raise RequestError(f"{source} makes no metrics: {_words(error)}") from error
    if not metrics or not all(isinstance(metric, Metric) for metric in metrics):
        raise RequestError(f"{source} returned no linert.runtime.measuring.metrics.Metric objects")
    for metric in metrics:
        if missing := [part for part in ("name", "higher_is_better") if not hasattr(metric, part)]:
            raise RequestError(f"{source}: {type(metric).__name__} does not say its {' and '.join(missing)}")
    names = [metric.name for metric in metrics]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"{source} returned two metrics of one name: {', '.join(twice)}")
    return metrics


def _module(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except LinertError:
        raise
    except Exception as error:
        raise RequestError(f"cannot import {place} for its metrics: {_words(error)}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RequestError(f"there is no file {path} to take metrics from")
    path = path.resolve()
    for name, taken in _taken(path, set()):
        raise RequestError(
            f"{path} imports {name}, which stands beside it, but that name is taken by {taken}: rename {name}"
        )
    # Another file, or the same one when it was changed, has another name.
    digest = hashlib.sha256(bytes(path) + b"\0" + path.read_bytes()).hexdigest()
    name = f"linert_metrics_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{path} is no Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, LinertError) or not isinstance(error, Exception):
            raise
        raise RequestError(f"cannot load {path} for its metrics: {_words(error)}") from error
    return module


def _taken(path: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """Neighbours that ``path``, or a neighbour that it imports, asks for and would not get: name and who has it."""
    seen.add(path)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, OSError):
        # Loading it says what is wrong.
        return
    for name in sorted(_imported(tree)):
        neighbour = next(
            (
                file
                for file in (path.parent / f"{name}.py", path.parent / name / "__init__.py")
                if file.is_file()
            ),
            None,
        )
        if neighbour is None or neighbour in seen or name in OURS:
            continue
        owner = _owner(name)
        if owner and not _same_text(Path(owner), neighbour):
            yield name, owner
        yield from _taken(neighbour, seen)


def _imported(tree: ast.Module) -> set[str]:
    """Names of the top-level packages that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def _owner(name: str) -> str:
    """Where ``import name`` leads now; empty if nowhere."""
    if name in sys.builtin_module_names:
        return "Python"
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(name)
    if spec is None:
        return ""
    if spec.origin is None:
        return ", ".join(spec.submodule_search_locations or ()) or name
    return str(Path(spec.origin).resolve()) if spec.has_location else f"Python ({spec.origin})"


def _same_text(one: Path, other: Path) -> bool:
    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
