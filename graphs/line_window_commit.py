"""LineWindowCommit: when it is known what is accepted of a window, write that into the line buffer of every layer, and account for its
attention.

One operation for all layers, since it waits for the draws, and these for all layers. Its tensors are those of
:data:`linert.runtime.plugins.contracts.LINE_WINDOW_COMMIT_LAYER` and :data:`~linert.runtime.plugins.contracts.LINE_WINDOW_COMMIT_SHARED`.
Its ONNX body is what is traced of :class:`LineWindowCommit`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linert.graphs.line_attention import OPSET, LineBufferState, opaque_node, scatter_rows
from linert.graphs.pieces import joined, parted
from linert.graphs.stage import Geometry, OwnOperation, Stage
from linert.graphs.stage_tensor import StageTensor
from linert.runtime.plugins.contracts import (
    FLOAT_TYPE,
    LINE_ATTENTION,
    LINE_WINDOW_COMMIT,
    LINE_WINDOW_COMMIT_LAYER,
    LINE_WINDOW_COMMIT_SHARED,
    Operand,
)


class WindowLayer(NamedTuple):
    """What the operation takes of a layer."""

    k: Tensor
    v: Tensor
    received: Tensor
    k_cache: Tensor
    v_cache: Tensor
    scores: Tensor
    slot_pos: Tensor


class WindowCommit(NamedTuple):
    """What it takes beside: what is written where, and which queries count."""

    write_slots: Tensor
    source: Tensor
    position: Tensor
    counted: Tensor
    kept: Tensor
    score_max: Tensor


class LineWindowCommit(Stage):
    """The operation as a stage, for a window of ``width`` positions."""

    name = "line_window_commit"
    opset = OPSET

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        self.geometry, self.width = geometry, width
        layers = range(geometry.config.layers)
        self.inputs = [
            *(
                self._tensor(f"{name}.{layer}", operand, layer)
                for layer in layers
                for name, operand in LINE_WINDOW_COMMIT_LAYER.items()
            ),
            *(self._tensor(name, operand) for name, operand in LINE_WINDOW_COMMIT_SHARED.items()),
        ]
        self.outputs = [
            self._tensor(f"{name}.{layer}_next", LINE_ATTENTION.inputs[name], layer)
            for layer in layers
            for name in LINE_ATTENTION.replaced
        ]
        self.operation = OwnOperation(LINE_WINDOW_COMMIT, {"layers": geometry.config.layers})

    def _tensor(self, name: str, operand: Operand, layer: int = 0) -> StageTensor:
        geometry, width = self.geometry, self.width
        slots = geometry.capacities[layer]
        sizes = {"R": geometry.rows, "T": width, "C": slots, "S": slots + width}
        sizes |= {"D": geometry.config.head_dim, "L": geometry.config.layers}
        dtype = geometry.cache_dtype if operand.dtype == FLOAT_TYPE else getattr(torch, operand.dtype)
        return StageTensor(name, dtype, operand.shape(sizes))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        size = len(WindowLayer._fields)
        shared = WindowCommit(*tensors[-len(WindowCommit._fields) :])
        layers = [
            WindowLayer(*tensors[number * size : (number + 1) * size])
            for number in range(self.geometry.config.layers)
        ]
        rows, width = self.geometry.rows, self.width
        row = torch.arange(rows)[:, None]
        written = shared.write_slots
        flat = (shared.source + row * width).flatten()
        place = torch.stack([row.expand_as(written), torch.zeros_like(written), written], dim=-1)
        places = parted(place.flatten(0, 2), rows * width)
        after: list[tuple[Tensor, ...]] = []
        # On small models an operation costs more than its numbers: layers of one capacity are reckoned together.
        for group in self._groups():
            scores, slot_pos = self._accounted([layers[layer] for layer in group], group, shared)
            for layer, of_layer, held in zip(
                group, parted(scores, rows), parted(slot_pos, rows), strict=True
            ):
                taken = layers[layer]
                k, v = (
                    scatter_rows(cache, places[layer], part.flatten(0, 2).index_select(0, flat))
                    for cache, part in ((taken.k_cache, taken.k), (taken.v_cache, taken.v))
                )
                after.append((k, v, of_layer, held))
        return tuple(itertools.chain.from_iterable(after))

    def _groups(self) -> list[list[int]]:
        """Layers of one capacity that follow each other."""
        capacities = self.geometry.capacities
        return [
            list(group) for _, group in itertools.groupby(range(len(capacities)), lambda k: capacities[k])
        ]

    def _accounted(
        self, layers: Sequence[WindowLayer], group: Sequence[int], shared: WindowCommit
    ) -> tuple[Tensor, Tensor]:
        """Scores and positions of ``layers``, one behind the other, which are those of ``group``."""
        count, slots = len(layers), layers[0].scores.shape[1]
        received = joined([layer.received for layer in layers]) * shared.counted.repeat(count, 1)[:, :, None]
        received = torch.where(shared.score_max, received.amax(1), received.sum(1))
        of_buffer, of_window = received.split([slots, self.width], dim=-1)
        old = joined([layer.scores for layer in layers]) * shared.kept.repeat(count, 1)
        scores = torch.where(shared.score_max, torch.maximum(old, of_buffer), old + of_buffer)
        source = shared.source.expand([count, -1, -1]).flatten(0, 1)
        of_slots = shared.write_slots[group[0] : group[-1] + 1].flatten(0, 1)
        scores = scores.scatter(1, of_slots, of_window.gather(1, source))
        slot_pos = joined([layer.slot_pos for layer in layers])
        position = shared.position.expand([count, -1, -1]).flatten(0, 1)
        return scores, slot_pos.scatter(1, of_slots, position)


def line_window_commit(
    geometry: Geometry, layers: Sequence[WindowLayer], shared: WindowCommit
) -> list[LineBufferState]:
    """The buffers of all layers with what is accepted, in eager PyTorch or as one opaque node while a graph is being exported.

    The state is not modified.
    """
    stage = LineWindowCommit(geometry, shared.source.shape[1])
    inputs = [*itertools.chain.from_iterable(layers), *shared]
    if not torch.compiler.is_exporting():
        after: Sequence[Tensor] = stage(*inputs)
    else:
        assert stage.operation is not None
        after = opaque_node(stage.operation, inputs, [(spec.dtype, spec.shape) for spec in stage.outputs])
    size = len(LineBufferState._fields)
    return [LineBufferState(*after[start : start + size]) for start in range(0, len(after), size)]
