"""Traces: which slots a run overwrote, so that its evictions can be imposed on another run.

A trace belongs to images, not to batches: the recorded images may be replayed in any company, on any backend and in
PyTorch, whatever the scores say there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from linert.runtime.backends.base import Backend
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.manifest import Manifest, Record
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.loop import LineEnds, rows_of
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import RequestError
from linert.runtime.files.array_files import read_arrays, write_arrays
from linert.runtime.files.records import RecordError, decode_record


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

    @property
    def digest(self) -> str:
        """sha256 of the recorded choices."""
        return hashlib.sha256(self.write_slots.tobytes()).hexdigest()

    def of(self, images: Sequence[int]) -> Trace:
        """The part of the trace that is of these recorded images."""
        chosen = list(images)
        samples = tuple(self.header.samples[number] for number in chosen)
        header = msgspec.structs.replace(self.header, samples=samples)
        return Trace(header, self.write_slots[chosen], self.tokens[chosen])

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


class SlotRecorder:
    """Records which slots every line of every image of a batch is written to, as its lines begin.

    Attributes:
        slots: ``[lines - 1, L, R, W]`` int64.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        shape = manifest.state_spec("write_slots").shape
        self.slots = np.zeros((manifest.raster.lines - 1, *shape), np.int64)

    def __call__(self, backend: Backend, ends: LineEnds) -> None:
        """Take the slots of the lines that begin behind ``ends``."""
        written = backend.read("write_slots")
        for image, line in ends.pairs():
            rows = rows_of(self.manifest, [image], written.shape[1])
            self.slots[line][:, rows] = written[:, rows]

    def by_image(self) -> NDArray[np.int32]:
        """``[I, lines - 1, layers, branches, heads, W]``."""
        lines, layers, _, width = self.slots.shape
        split = self.slots.reshape(lines, layers, self.manifest.branches, self.manifest.images, -1, width)
        return split.transpose(3, 0, 1, 2, 4, 5).astype(np.int32)


def read_trace(path: Path, manifest: Manifest) -> Trace:
    """Read a trace that can be imposed on the bundle of ``manifest``. Nothing larger than such a trace is read.

    Raises:
        RequestError: no such file, no trace, or one of another kind of model.
    """
    manifest.require_cache("a trace")
    try:
        header = decode_record(read_arrays(path, ["header"])["header"].tobytes(), TraceHeader)
    except (KeyError, RecordError) as error:
        raise _no_trace(path, error) from error
    raster, count = manifest.raster, len(header.samples)
    if not count:
        raise RequestError(f"{path} holds no images")
    heads = manifest.state_spec("write_slots").shape[1] // (manifest.images * manifest.branches)
    slots = (raster.lines - 1, manifest.model.layers, manifest.branches, heads, raster.line_width)
    # Whatever its integers: eight bytes each, and the members' headers.
    most_bytes = 8 * count * (math.prod(slots) + raster.image_tokens) + (64 << 10)
    try:
        arrays = read_arrays(path, ["write_slots", "tokens"], most_bytes)
        write_slots, tokens = arrays["write_slots"], arrays["tokens"]
    except KeyError as error:
        raise _no_trace(path, error) from error
    if any(values.dtype.kind not in "iu" for values in (write_slots, tokens)):
        raise RequestError(f"{path} is damaged: its slots or tokens are no integers")
    shapes = write_slots.shape, tokens.shape
    if shapes != ((count, *slots), (count, raster.image_tokens)):
        raise RequestError(
            f"{path} was recorded from another kind of model: for {count} images it holds slots {shapes[0]} and tokens {shapes[1]}, "
            f"not {(count, *slots)} (images, lines, layers, branches, heads, width) and {(count, raster.image_tokens)}"
        )
    for layer, lines in enumerate(manifest.capacity_lines):
        used, capacity = write_slots[:, :, layer], raster.slots(lines)
        if used.size and not (used.min() >= raster.prefix_len and used.max() < capacity):
            raise RequestError(
                f"{path} writes slots {used.min()} to {used.max()} of layer {layer}; the bundle's buffer has "
                f"{raster.prefix_len} to {capacity - 1}"
            )
    most = manifest.model.vocab_size - 1 + raster.newlines
    if not (tokens.min() >= 0 and tokens.max() <= most):
        raise RequestError(f"{path} holds tokens {tokens.min()} to {tokens.max()}; the model has 0 to {most}")
    # Other machines write numbers in other orders of bytes.
    return Trace(header, write_slots.astype(np.int32), tokens.astype(np.int64))


def _no_trace(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path} is no trace of linert run --record-trace: {error}")
