"""Traces: which slots a run overwrote, so that its evictions can be imposed on another run.

A trace belongs to images, not to batches: the recorded images may be replayed in any company, on any backend and in
PyTorch, whatever the scores say there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.geometry import CacheSettings
from runtime.manifest import Manifest, Record, SamplingSettings
from runtime.output import read_arrays, write_arrays
from runtime.samples import Sample


class TraceHeader(Record, frozen=True):
    """What the recorded run was."""

    bundle_sha256: str
    sampling: SamplingSettings
    cache: CacheSettings
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Trace:
    """The recorded run of n images.

    ``write_slots [n, lines - 1, layers, branches, KV heads, W]`` int32: the slots that the line after each line end
    overwrote. ``tokens [n, N]`` int64. The images themselves are the header's ``samples``.
    """

    header: TraceHeader
    write_slots: NDArray[np.int32]
    tokens: NDArray[np.int64]

    def check(self, manifest: Manifest) -> None:
        """Raise :class:`RequestError` if the run cannot be imposed on the bundle of ``manifest``."""
        manifest.require_cache("a trace")
        shape = self.write_slots.shape
        branches = manifest.branches
        rows = manifest.state_spec("write_slots").shape[1]
        wanted = (
            manifest.raster.lines - 1,
            manifest.model.layers,
            branches,
            rows // (manifest.images * branches),
            manifest.raster.line_width,
        )
        if shape[1:] != wanted:
            raise RequestError(
                f"the trace was recorded from another kind of model: its write slots are {shape[1:]} an image "
                f"(lines, layers, branches, heads, width), the bundle's {wanted}"
            )
        capacity = [manifest.raster.slots(lines) for lines in manifest.capacity_lines]
        for layer, slots in enumerate(capacity):
            used = self.write_slots[:, :, layer]
            if used.size and not (used.min() >= manifest.raster.prefix_len and used.max() < slots):
                raise RequestError(
                    f"the trace writes slots {used.min()} to {used.max()} of layer {layer}; the bundle's buffer has "
                    f"{manifest.raster.prefix_len} to {slots - 1}"
                )

    @property
    def digest(self) -> str:
        """sha256 of the recorded choices."""
        return hashlib.sha256(self.write_slots.tobytes()).hexdigest()

    def batch(self, images: Sequence[int]) -> NDArray[np.int64]:
        """The ``replay`` of a batch of these recorded images: ``[lines - 1, L, R, W]`` int64."""
        chosen = self.write_slots[list(images)].transpose(1, 2, 3, 0, 4, 5)
        lines, layers, branches, count, heads, width = chosen.shape
        return chosen.reshape(lines, layers, branches * count * heads, width).astype(np.int64)

    def write(self, path: Path) -> None:
        """Write an npz file; its array ``header`` is JSON."""
        write_arrays(
            path,
            {
                "header": np.frombuffer(msgspec.json.encode(self.header), np.uint8),
                "write_slots": self.write_slots,
                "tokens": self.tokens,
            },
        )


def per_image(recorded: Sequence[NDArray[np.generic]], images: int, branches: int) -> NDArray[np.int32]:
    """``[I, lines - 1, layers, branches, heads, W]`` of the ``[L, R, W]`` write slots of every line end."""
    stacked = np.stack(recorded)
    lines, layers, _, width = stacked.shape
    split = stacked.reshape(lines, layers, branches, images, -1, width)
    return split.transpose(3, 0, 1, 2, 4, 5).astype(np.int32)


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        RequestError: no such file, or no trace.
    """
    arrays = read_arrays(path)
    try:
        header = msgspec.json.decode(arrays["header"].tobytes(), type=TraceHeader)
        trace = Trace(
            header,
            *(arrays[name] for name in ("write_slots", "tokens")),  # type: ignore[arg-type]
        )
    except (KeyError, msgspec.DecodeError) as error:
        raise RequestError(f"{path} is no trace of linert run --record-trace: {error}") from error
    shapes = trace.write_slots.shape, trace.tokens.shape
    whole = all(values.dtype.kind in "iu" for values in (trace.write_slots, trace.tokens))
    if (
        not whole
        or tuple(map(len, shapes)) != (6, 2)
        or {shape[0] for shape in shapes} != {len(header.samples)}
    ):
        raise RequestError(f"{path} is damaged: its arrays do not belong together")
    return trace
