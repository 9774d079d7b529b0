"""Hash a module's source and all that it imports, so that results of older code are not taken for those of newer code."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def source_digest(place: str) -> str:
    """sha256 of a module's source and of what it imports from where it lies, with the versions of what it imports from elsewhere.

    Imports in functions count; modules that are only named by strings, and files that are read as data, do not.

    Args:
        place: ``package.module`` or ``path/to/file.py``, which must exist.
    """
    home, first, package = _origin(place)
    files = {first, *(_files(home, place.split(".")) if not place.endswith(".py") else ())}
    elsewhere: set[str] = set()
    waiting = sorted(files)
    while waiting:
        here = waiting.pop()
        for parts, folder in _imports(here, home):
            # Installed packages lie beside each other and are told by their versions.
            near = folder != home or parts[0] == package or not _is_installed(home)
            modules = list(_files(folder, parts)) if near else []
            if not modules and folder == home:
                elsewhere.add(parts[0])
            waiting += [file for file in modules if file not in files]
            files.update(modules)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{Path(os.path.relpath(file, home)).as_posix()}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for name in sorted(elsewhere):
        digest.update(f"{name} {_version(name)}\0".encode())
    return digest.hexdigest()


def _origin(place: str) -> tuple[Path, Path, str]:
    """The folder that imports of a module look into, its file, and its outermost package."""
    if place.endswith(".py"):
        file = Path(place).resolve()
        return file.parent, file, file.stem
    spec = importlib.util.find_spec(place)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no source of {place}")
    # Not resolved: folders of one package may be links to elsewhere.
    file = Path(os.path.abspath(spec.origin))
    depth = place.count(".") + (file.name == "__init__.py")
    return file.parents[depth], file, place.partition(".")[0]


def _imports(file: Path, home: Path) -> Iterator[tuple[list[str], Path]]:
    """What a file imports: the parts of a name, and the folder that it is looked for in."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), home
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            folder = file.parents[min(node.level, len(file.parents)) - 1] if node.level else home
            for alias in node.names:
                yield [*module, alias.name], folder


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The files in ``folder`` that importing a name runs."""
    for end in range(len(parts) + 1):
        path = folder.joinpath(*parts[:end])
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if end and file.is_file():
                yield file.resolve()


def _is_installed(folder: Path) -> bool:
    """Whether packages of others lie in ``folder``."""
    return folder in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}


def _version(name: str) -> str:
    """The version of a package, empty where none is told."""
    if name in sys.stdlib_module_names:
        return sys.version.split()[0]
    told = getattr(sys.modules.get(name), "__version__", None)
    if told is not None:
        return str(told)
    distribution = "linert" if name == __name__.partition(".")[0] else name
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
