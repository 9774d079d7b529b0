"""Open a bundle: verify that it is whole, unchanged and of this schema before anything is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from runtime.conditions import Conditioner, conditioner_of
from runtime.errors import BundleError, RequestError
from runtime.manifest import MANIFEST_NAME, Manifest, decode

if TYPE_CHECKING:
    from runtime.backend import Backend


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest.

    ``size``: which of the image sizes in the folder it is, as in ``512x768``; empty for the first.
    """

    path: Path
    manifest: Manifest
    size: str = ""

    @property
    def sizes(self) -> list[str]:
        """The image sizes that the folder holds, the first one first."""
        return sizes_of(self.path)

    @cached_property
    def conditioner(self) -> Conditioner:
        """Turns what people ask for into what the bundle takes. A text encoder is run on the CPU."""
        manifest = self.manifest
        return conditioner_of(
            manifest.condition,
            manifest.raster.prefix_len,
            self.path,
            self._open_text_encoder,
            guided=manifest.guided,
            vocabulary=rows
            if isinstance(rows := manifest.model.config.get("text_vocab_size"), int)
            else None,
        )

    def sharing(self, conditioner: Conditioner) -> Bundle:
        """The same bundle with a conditioner that knows features already."""
        shared = Bundle(self.path, self.manifest, self.size)
        vars(shared)["conditioner"] = conditioner
        return shared

    def _open_text_encoder(self) -> Backend:
        # Backends are made of bundles.
        from runtime.backends import BackendOptions

        return BackendOptions().open(self, ["text_encoder"])

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.path / name

    def stage_path(self, stage: str) -> Path:
        """Path of a stage's ONNX file.

        Raises:
            BundleError: the bundle has no such stage.
        """
        stages = self.manifest.stages
        if stage not in stages:
            raise BundleError(f"{self.path} has no stage {stage}; it has {', '.join(sorted(stages))}")
        return self.file(stages[stage].file)


def open_bundle(path: str | Path, size: str | None = None, *, digests: bool = True) -> Bundle:
    """Verify and open the bundle in folder ``path``.

    Args:
        path: the bundle's folder.
        size: width and height of the images in pixels, as in ``512x768``; the first that was exported if None.
        digests: compare the sha256 of every file; without, only presence and size (enough to describe it).

    Raises:
        BundleError: no bundle there, another schema, a missing or changed file, or a file name that leaves
            the folder.
        RequestError: it draws no images of that size.
    """
    folder = Path(path)
    other = "" if size is None or size == _first_size(folder) else size
    manifest_path = folder / manifest_name(other)
    if other and (folder / MANIFEST_NAME).is_file() and not manifest_path.is_file():
        raise RequestError(
            f"{folder} draws no images of {size}; it draws {', '.join(sizes_of(folder))}: export it with --size"
        )
    try:
        data = manifest_path.read_bytes()
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else f"it has no {MANIFEST_NAME}"
        raise BundleError(f"{folder} is not a bundle: {what}") from None
    except OSError as error:
        raise BundleError(f"cannot read {manifest_path}: {error.strerror}") from error
    manifest = decode(data, str(manifest_path))
    for name, record in sorted(manifest.files.items()):
        file = _inside(folder, name)
        if not file.is_file():
            raise BundleError(f"{folder} lacks {name}; export the bundle again")
        held = file.stat().st_size
        if held != record.bytes:
            raise BundleError(
                f"{file} has {held} bytes, the manifest says {record.bytes}; export the bundle again"
            )
        if digests and file_sha256(file) != record.sha256:
            raise BundleError(
                f"{file} was changed: its sha256 is not the manifest's; export the bundle again"
            )
    return Bundle(folder, manifest, other)


def manifest_name(size: str) -> str:
    """The manifest's file for images of ``size``; empty for the first size."""
    stem, dot, suffix = MANIFEST_NAME.rpartition(".")
    return f"{stem}.{size}{dot}{suffix}" if size else MANIFEST_NAME


def sizes_of(folder: Path) -> list[str]:
    """The image sizes that a bundle's folder holds, the first one first."""
    others = sorted(path.name.split(".")[1] for path in folder.glob(manifest_name("*")))
    return [_first_size(folder), *others]


def _first_size(folder: Path) -> str:
    """Of the manifest that every bundle has; empty if there is none that can be read."""
    path = folder / MANIFEST_NAME
    try:
        return decode(path.read_bytes(), str(path)).size
    except (OSError, BundleError):
        return ""


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """Path of ``name`` in ``folder``; refuses names and links that lead out of it."""
    pure = PurePosixPath(name)
    path = folder / name
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(f"{folder}: the manifest names {name!r}, a path that leaves the bundle")
    if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(
            f"{folder}: {name} is a link that leaves the bundle, as those of a hub's cache do: make a copy whose files are files, by "
            f"cp -rL {folder} COPY, or download it into a folder of its own"
        )
    return path
