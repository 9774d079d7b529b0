"""The pictures and what they are called.

Pictures: npm's ``@lobehub/fluent-emoji-3d`` (MIT), Microsoft's Fluent emoji as webp files named by code point. Names, groups
and keywords: npm's ``emojibase-data`` (MIT), Unicode's emoji data and CLDR's annotations. Neither is kept in the repository.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import tarfile
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PICTURES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "emojibase-data@17.0.0"

SIDE = 96
FILE = "pictures.zip"
LISTING = "pictures.json"

LEFT_OUT_GROUPS = {"component", "flags"}
"""Flags are told apart by crests of a few pixels, and which there are is no question for a demo."""

LEFT_OUT_SUBGROUPS = {
    # Letters and line drawings on squares of one colour, and dozens of grey families that differ by a head.
    *("alphanum", "keycap", "transport-sign", "arrow", "av-symbol", "religion", "zodiac", "gender"),
    *("math", "punctuation", "currency", "family"),
}
LEFT_OUT_NAMES = {"middle finger", "no one under eighteen", "copyright", "registered", "trade mark"}

HELD_OUT_SHARE = 0.2
"""Of the names: their pictures are learned by the exact name alone."""

HAIR = ("blond hair", "red hair", "curly hair", "white hair", "beard")


@dataclass(frozen=True)
class Picture:
    """What a picture is called.

    ``name``: in lower case. ``group``, ``subgroup``: words of what it belongs to. ``keywords``: words that people look for it by.
    ``held_out``: whether it is learned by its exact name alone.
    """

    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]
    held_out: bool = False


def plain(text: str) -> str:
    """``text`` in small letters without accents, quotes and curls."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    for curled, straight in (("\u2019", "'"), ("\u201c", ""), ("\u201d", ""), ("!", ""), (".", "")):
        bare = bare.replace(curled, straight)
    return bare.lower().strip()


def spoken_name(label: str) -> str:
    """Unicode's name as people would say it: what stands behind a colon goes where it belongs."""
    whole, _, detail = plain(label).partition(": ")
    if not detail:
        return whole
    return f"{whole} with {detail}" if detail in HAIR else f"{detail} {whole}"


def code_points(name: str) -> tuple[int, ...]:
    """The code points of a file's or an entry's name, without the selector of colour, which some leave out."""
    return tuple(int(part, 16) for part in name.split("-") if part.lower() != "fe0f")


def fetched(package: str, folder: Path) -> dict[str, bytes]:
    """The files of a package of npm's registry, which is downloaded to ``folder`` if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.is_file():
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # In one pass: an archive that is compressed as a whole would be read from its beginning for every file.
    with tarfile.open(path) as archive:
        return {
            entry.name.removeprefix("package/"): file.read()
            for entry in archive
            if (file := archive.extractfile(entry)) is not None
        }


def listed(files: Mapping[str, bytes]) -> list[tuple[tuple[int, ...], Picture]]:
    """Code points and names of all that there might be a picture of, in Unicode's order."""
    entries: list[dict[str, Any]] = json.loads(files["en/data.json"])
    messages = json.loads(files["en/messages.json"])
    groups, subgroups = (
        {kind["order"]: kind["key"] for kind in messages[key]} for key in ("groups", "subgroups")
    )
    chosen = []
    for entry in entries:
        if "group" not in entry or groups[entry["group"]] in LEFT_OUT_GROUPS:
            continue
        group, subgroup = groups[entry["group"]], subgroups[entry["subgroup"]]
        name = spoken_name(entry["label"])
        if subgroup in LEFT_OUT_SUBGROUPS or name in LEFT_OUT_NAMES:
            continue
        keywords = tuple(dict.fromkeys(plain(word) for word in entry.get("tags", ())))
        words = [kind.replace("-", " ") for kind in (group, subgroup)]
        chosen.append((code_points(entry["hexcode"]), Picture(name, *words, keywords)))
    return chosen


def with_held_out(pictures: Sequence[Picture], seed: int = 0) -> list[Picture]:
    """``pictures`` with a share of the names, not of the pictures, held out."""
    names = sorted({picture.name for picture in pictures})
    held_out = set(random.Random(seed).sample(names, round(HELD_OUT_SHARE * len(names))))
    return [Picture(**{**asdict(p), "held_out": p.name in held_out}) for p in pictures]


def on_white(data: bytes) -> Image.Image:
    """A webp with alpha as a small picture on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def fetch(out: Path) -> list[Picture]:
    """Write :data:`FILE`: every picture without loss, and a listing. Variants of skin tones are left out: they are the same shapes
    in five colours, would take a third of what a small model can learn, and would make most of what it draws people."""
    packages = out / "packages"
    files = fetched(PICTURES_PACKAGE, packages)
    paths = {code_points(Path(path).stem): path for path in sorted(files) if path.endswith(".webp")}
    wanted = listed(fetched(NAMES_PACKAGE, packages))
    pairs = [(paths[points], picture) for points, picture in wanted if points in paths]
    pictures = with_held_out([picture for _, picture in pairs])
    with zipfile.ZipFile(out / FILE, "w", zipfile.ZIP_STORED) as packed:
        for number, (path, _) in enumerate(pairs):
            buffer = io.BytesIO()
            on_white(files[path]).save(buffer, "WEBP", lossless=True, quality=100, method=4)
            packed.writestr(f"{number:04d}.webp", buffer.getvalue())
        packed.writestr(LISTING, json.dumps([asdict(picture) for picture in pictures], indent=1))
    return pictures


def load(out: Path) -> tuple[list[Picture], NDArray[np.uint8]]:
    """What :func:`fetch` wrote: names, and pixels ``[n, SIDE, SIDE, 3]``."""
    with zipfile.ZipFile(out / FILE) as packed:
        entries: list[Mapping[str, Any]] = json.loads(packed.read(LISTING))
        pictures = [Picture(**{**entry, "keywords": tuple(entry["keywords"])}) for entry in entries]
        pixels = [
            np.asarray(Image.open(io.BytesIO(packed.read(f"{number:04d}.webp"))).convert("RGB"))
            for number in range(len(pictures))
        ]
    return pictures, np.stack(pixels)


def sheet(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """Pictures ``[n, h, w, 3]`` beside and below each other."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    whole = np.full((rows * columns, height, width, 3), 255, np.uint8)
    whole[:n] = pixels
    whole = whole.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(whole.reshape(rows * height, columns * width, 3)))
