"""Eviction maps: which image positions stayed in the cache at each line, as a picture."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import cast

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.manifest import SLOT_POSITIONS, Manifest
from linert.runtime.drawing.loop import LineEnds

Shares = NDArray[np.float32]

GAP, CAPTION, PANEL = 6, 16, 96
EVICTED, RESIDENT, TO_COME = "#1b1b3a", "#ffd166", "#e8e8e8"


class MapKind(StrEnum):
    """One panel a line, averaged over the layers; or one row of panels a layer."""

    AVERAGED = "averaged"
    LAYERS = "layers"


class Residency:
    """Collects, line end by line end, the share of a layer's rows that hold each image position."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        raster, layers = manifest.raster, manifest.model.layers
        self.shares = np.zeros((manifest.images, raster.lines - 1, layers, raster.image_tokens), np.float32)

    def __call__(self, backend: Backend, ends: LineEnds) -> None:
        """Look at what slots hold after line ends."""
        shares = resident_shares(backend, self.manifest)
        for image, line in ends.pairs():
            self.shares[image, line] = shares[image]

    def image(self, number: int) -> Shares:
        """``[lines - 1, layers, N]`` of the batch's image ``number``."""
        shares: Shares = self.shares[number]
        return shares


def resident_shares(backend: Backend, manifest: Manifest) -> Shares:
    """``[I, layers, N]``: share of an image's branches and heads that hold each of its tokens now."""
    raster = manifest.raster
    layers = []
    for spec in manifest.states_of(SLOT_POSITIONS):
        slot_pos = cast("NDArray[np.int32]", backend.read(spec.name))
        resident = np.zeros((len(slot_pos), raster.slots(raster.lines) + 1), np.float32)
        np.put_along_axis(resident, np.where(slot_pos < 0, resident.shape[1] - 1, slot_pos), 1.0, axis=1)
        image_part = resident[:, raster.prefix_len : -1]
        split = image_part.reshape(manifest.branches, manifest.images, -1, raster.image_tokens)
        layers.append(split.mean(axis=(0, 2)))
    return np.stack(layers, axis=1)


def draw_map(picture: PIL.Image.Image, shares: Shares, manifest: Manifest, kind: MapKind) -> PIL.Image.Image:
    """The picture, and beside it a panel for every line: bright positions are in the cache while that line is drawn.

    Args:
        picture: the finished image.
        shares: ``[lines - 1, layers, N]`` as of :meth:`Residency.image`.
        manifest: of the bundle that drew it.
        kind: average the layers, or a row of panels for each.
    """
    raster = manifest.raster
    zoom = max(1, round(PANEL / max(raster.lines, raster.line_width)))
    size = (raster.line_width * zoom, raster.lines * zoom)
    if kind is MapKind.AVERAGED:
        columns = math.ceil(math.sqrt(2 * len(shares)))
        panels = [
            (_panel(share.mean(axis=0), line + 1, manifest, size), f"line {line + 2}")
            for line, share in enumerate(shares)
        ]
    else:
        columns = len(shares)
        panels = [
            (_panel(shares[line, layer], line + 1, manifest, size), f"{layer} · line {line + 2}")
            for layer in range(shares.shape[1])
            for line in range(len(shares))
        ]
    rows = math.ceil(len(panels) / columns)
    cell = (size[0] + GAP, size[1] + CAPTION + GAP)
    side = 2 * cell[1] - CAPTION - GAP
    shown = picture.resize((side * picture.width // picture.height, side), PIL.Image.Resampling.NEAREST)
    left = shown.width + 2 * GAP
    sheet = PIL.Image.new(
        "RGB", (left + columns * cell[0], max(rows * cell[1], side + CAPTION) + GAP), "white"
    )
    sheet.paste(shown, (GAP, GAP))
    drawing = PIL.ImageDraw.Draw(sheet)
    font = PIL.ImageFont.load_default(size=12)
    for number, (panel, caption) in enumerate(panels):
        x, y = left + number % columns * cell[0], GAP + number // columns * cell[1]
        sheet.paste(panel, (x, y))
        drawing.text((x, y + size[1] + 1), caption, fill="black", font=font)
    return sheet


def _panel(shares: Shares, line: int, manifest: Manifest, size: tuple[int, int]) -> PIL.Image.Image:
    """Shares ``[N]`` while ``line`` is drawn; lines that are not drawn yet are grey, the line itself is framed."""
    raster = manifest.raster
    levels = (shares.reshape(raster.lines, raster.line_width) * 255).round().astype(np.uint8)
    small = PIL.ImageOps.colorize(PIL.Image.fromarray(levels), EVICTED, RESIDENT)
    panel = small.resize(size, PIL.Image.Resampling.NEAREST)
    drawing = PIL.ImageDraw.Draw(panel)
    zoom = size[1] // raster.lines
    drawing.rectangle((0, line * zoom, size[0], size[1]), fill=TO_COME)
    drawing.rectangle((0, line * zoom, size[0] - 1, (line + 1) * zoom - 1), outline="#d62828")
    return panel
