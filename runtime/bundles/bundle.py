"""Open a bundle: verify that it is whole, unchanged and of this schema before anything is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import MANIFEST_NAME, Manifest
from linert.runtime.bundles.manifest_file import MAX_BYTES, decode
from linert.runtime.errors import BundleError, RequestError
from linert.runtime.files.replacement import recover
from linert.runtime.files.text_files import is_utf8

SIZE = re.compile(r"[0-9]{1,6}x[0-9]{1,6}")
"""Width and height of images in pixels."""

VARIANT = re.compile(rf"(?P<size>{SIZE.pattern})?\.?(?P<lines>[0-9]{{1,6}}lines)?")
"""Name of a variant of a bundle: the size of its images, the lines of its buffers, or both."""


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was verified, without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @staticmethod
    def of(path: Path) -> Stamp:
        """Of the file at ``path``.

        Raises:
            OSError: there is none.
        """
        status = path.stat()
        return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest.

    ``variant``: which of those in the folder it is, by its image size and the lines of its buffers, as in ``512x768``, ``4lines`` or
    ``512x768.4lines``; empty for the first. ``stamps``: of its files when they were verified; of one that was made and not opened
    there are none.
    """

    path: Path
    manifest: Manifest
    variant: str = ""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """The variant's image size; empty for the first."""
        return size_of(self.variant)

    @property
    def sizes(self) -> list[str]:
        """The image sizes that the folder holds, the first one first."""
        return sizes_of(self.path)

    @property
    def capacities(self) -> dict[str, Manifest]:
        """The variants that draw images of this size, by name: the one with the smallest buffers first.

        Raises:
            BundleError: a manifest cannot be read.
        """
        manifests = {
            name: self.manifest if name == self.variant else _read_manifest(self.path, manifest_name(name))
            for name in variants_of(self.path)
            if size_of(name) == self.size
        }
        return dict(sorted(manifests.items(), key=lambda item: sum(item[1].capacity_lines)))

    @property
    def widest(self) -> Manifest:
        """The variant of this size with the largest buffers."""
        return list(self.capacities.values())[-1]

    def other(self, variant: str) -> Bundle:
        """Another variant of the folder; what is verified already is not read again.

        Raises:
            BundleError: as :func:`open_bundle`.
        """
        if variant == self.variant:
            return self
        manifest = _read_manifest(self.path, manifest_name(variant))
        return _verified(self.path, variant, manifest, digests=True, known=self)

    def fitting(self, cache: CacheSettings, *, replayed: bool = False) -> Bundle:
        """The variant with the smallest buffers that hold the budgets of ``cache`` and whose policies have its own; the one with the
        largest if none does.

        Args:
            replayed: no policy is asked: the variant need not hold it.

        Raises:
            BundleError: as :func:`open_bundle`.
        """
        capacities = self.capacities
        fit = (name for name, manifest in capacities.items() if holds(manifest, cache, replayed=replayed))
        return self.other(next(fit, list(capacities)[-1]))

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Raise :class:`BundleError` where a file of these ``names`` was changed or replaced since the bundle was opened."""
        for name in names:
            if name not in self.stamps:
                continue
            try:
                same = Stamp.of(self.file(name)) == self.stamps[name]
            except OSError:
                same = False
            if not same:
                raise BundleError(
                    f"{self.file(name)} was changed since the bundle was opened and verified: open the bundle again"
                )

    def require_not_overwritten(self) -> None:
        """Raise :class:`BundleError` where a file was written to since the bundle was opened: what was loaded of it is mapped, and changes too.

        One that another took the place of stays as it was for whoever loaded it.
        """
        for name, stamp in self.stamps.items():
            with contextlib.suppress(OSError):
                now = Stamp.of(self.file(name))
                if now[:2] == stamp[:2] and now != stamp:
                    raise BundleError(
                        f"{self.file(name)} was written to while the bundle was open: what was drawn since then is thrown away; open the "
                        "bundle again"
                    )

    def files_of(self, stage: str) -> list[str]:
        """Names of the files that a stage is loaded from: its own, and those that are no stage's."""
        stages = self.manifest.stages
        own = {spec.file for spec in stages.values()}
        return [stages[stage].file, *(name for name in self.manifest.files if name not in own)]

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
        BundleError: no bundle there, another schema, a missing or changed file, a file name that leaves the folder, or a folder
            whose name no runtime can read.
        RequestError: it draws no images of that size.
    """
    folder = Path(path)
    if not is_utf8(str(folder)):
        raise BundleError(f"the name of bundle {folder} is not in UTF-8: rename it")
    recover(folder)
    manifest = _read_manifest(folder, MANIFEST_NAME)
    other = "" if size is None or size == manifest.size else size
    if other:
        if not SIZE.fullmatch(other) or not (folder / manifest_name(other)).exists():
            known = ", ".join(sizes_of(folder))
            raise RequestError(f"{folder} draws no images of {size}; it draws {known}: export it with --size")
        manifest = _read_manifest(folder, manifest_name(other))
        if manifest.size != other:
            raise BundleError(
                f"{folder / manifest_name(other)} is of images of {manifest.size}; export the bundle again"
            )
    return _verified(folder, other, manifest, digests=digests)


def _verified(
    folder: Path, variant: str, manifest: Manifest, *, digests: bool, known: Bundle | None = None
) -> Bundle:
    """The variant of a manifest, its files verified but for those that ``known`` was verified with.

    Raises:
        BundleError: as :func:`open_bundle`.
    """
    stamps = {}
    for name, record in sorted(manifest.files.items()):
        if known is not None and known.manifest.files.get(name) == record and name in known.stamps:
            stamps[name] = known.stamps[name]
            continue
        file = _inside(folder, name)
        if not file.is_file():
            raise BundleError(f"{folder} lacks {name}; export the bundle again")
        stamps[name] = Stamp.of(file)
        if stamps[name].size != record.bytes:
            raise BundleError(
                f"{file} has {stamps[name].size} bytes, the manifest says {record.bytes}; export the bundle again"
            )
        if digests and file_sha256(file) != record.sha256:
            raise BundleError(
                f"{file} was changed: its sha256 is not the manifest's; export the bundle again"
            )
    bundle = Bundle(folder, manifest, variant, stamps)
    # A file that was replaced while it was read may be another now than the one whose digest was compared.
    bundle.require_unchanged(manifest.files)
    return bundle


def _read_manifest(folder: Path, name: str) -> Manifest:
    """Read a manifest of the bundle in ``folder``.

    Raises:
        BundleError: no such folder or file, no regular file of a manifest's size, or no manifest of this schema.
    """
    path = folder / name
    if not path.exists():
        what = "no such folder" if not folder.is_dir() else f"it has no {name}"
        raise BundleError(f"{folder} is not a bundle: {what}")
    path = _inside(folder, name)
    # To read a pipe or a device may take for ever.
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: its {name} is no regular file")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BundleError(
                f"{path} has {size} bytes, which is too large for a manifest; export the bundle again"
            )
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    return decode(data, str(path))


def manifest_name(variant: str) -> str:
    """The manifest's file of a variant; empty for the first."""
    stem, dot, suffix = MANIFEST_NAME.rpartition(".")
    return f"{stem}.{variant}{dot}{suffix}" if variant else MANIFEST_NAME


def variants_of(folder: Path) -> list[str]:
    """Names of the variants that a bundle's folder holds, the first, which has none, first."""
    stem, _, suffix = MANIFEST_NAME.rpartition(".")
    names = sorted(path.name for path in folder.glob(manifest_name("*")))
    variants = [name.removeprefix(f"{stem}.").removesuffix(f".{suffix}") for name in names]
    return ["", *(variant for variant in variants if VARIANT.fullmatch(variant))]


def size_of(variant: str) -> str:
    """The image size in a variant's name; empty for the first."""
    named = VARIANT.fullmatch(variant)
    return (named and named["size"]) or ""


def sizes_of(folder: Path) -> list[str]:
    """The image sizes that a bundle's folder holds, the first one first."""
    others = sorted({size for variant in variants_of(folder) if (size := size_of(variant))})
    return [_read_manifest(folder, MANIFEST_NAME).size, *others]


def holds(manifest: Manifest, cache: CacheSettings, *, replayed: bool) -> bool:
    """Whether a variant's buffers, and if it is not ``replayed`` its policies, are enough for settings."""
    lines = manifest.capacity_lines
    return (
        (replayed or cache.policy in manifest.policies)
        and len(lines) == len(cache.budget_lines)
        and all(budget <= most for budget, most in zip(cache.budget_lines, lines, strict=True))
    )


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
