"""The recurrent state of linear attention: keys and values of the line in progress, one matrix a column for all lines above, and
the end of a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from onnx import FunctionProto
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.memory import LayerStep, Projections, RasterMemory, StepPosition, WindowStep
from linert.graphs.pieces import joined
from linert.graphs.spatial_decay import Decay, DecayState, factors, fold, step_index
from linert.graphs.spatial_decay_step import StepInputs, function_proto, spatial_decay_step
from linert.graphs.spatial_decay_window import WindowInputs, spatial_decay_window
from linert.graphs.spatial_decay_window import function_proto as window_proto
from linert.graphs.stage import Geometry, Stage
from linert.graphs.stage_tensor import StateTensor
from linert.graphs.transformer import RasterTransformer
from linert.graphs.window import Accepted, Window
from linert.runtime.plugins.contracts import SPATIAL_DECAY_STEP

Decays = Callable[[RasterTransformer], Iterable[Decay]]
"""What a model's layers have learned, in order."""


class DecayMemory(RasterMemory):
    """Keys and values of the prefix and of the line in progress, and what is above.

    Args:
        decays: tells a model's.
        matrices: of a layer's state, M: one a column, or where the decay is signed one.
    """

    written = SPATIAL_DECAY_STEP.replaced
    unseen = SPATIAL_DECAY_STEP.replaced

    def __init__(self, geometry: Geometry, decays: Decays, matrices: int) -> None:
        super().__init__(geometry)
        self.decays, self.matrices = decays, matrices

    def layer_state(self) -> list[StateTensor]:
        """In the order of :class:`DecayState`."""
        geometry, config = self.geometry, self.geometry.config
        size = config.head_dim
        slots = config.prefix_len + config.line_width
        line = {"row": geometry.rows, "head": 1, "slot": slots, "channel": size}
        above = {"row": geometry.rows, "matrix": self.matrices, "key channel": size, "channel": size}
        return [
            spec
            for layer in range(config.layers)
            for spec in (
                StateTensor.of("k_line", geometry.cache_dtype, line, layer),
                StateTensor.of("v_line", geometry.cache_dtype, line, layer),
                StateTensor.of("above", torch.float32, above, layer),
            )
        ]

    def factors(self, model: RasterTransformer) -> Tensor:
        """:func:`linert.graphs.spatial_decay.factors` of all layers, side by side: ``[W + 2, L x H]``."""
        width = self.geometry.config.line_width
        return joined([factors(width, decay) for decay in self.decays(model)], dim=1)

    def begin_step(self, model: RasterTransformer, at: StepPosition) -> LayerStep:
        return DecayStep(self, self.factors(model), at)

    def begin_window(
        self,
        model: RasterTransformer,
        window: Window,
        inputs: Mapping[str, Tensor],
        state: Sequence[Sequence[Tensor]],
    ) -> WindowStep:
        return DecayWindowStep(self, self.factors(model), window, state)

    def step_operation(self) -> FunctionProto:
        return function_proto(self.matrices)

    def window_operations(self, width: int) -> Sequence[FunctionProto | Stage]:
        return [window_proto(self.matrices)]

    def line_ends(self, model: RasterTransformer, policies: Sequence[str]) -> list[Stage]:
        return [DecayLineEnd(model, self)]


class DecayStep(LayerStep):
    """Write the token into the line in progress, and read the line and what is above its column.

    Args:
        memory: of the layers.
        table: its :meth:`DecayMemory.factors`.
        at: where the token stands.
    """

    def __init__(self, memory: DecayMemory, table: Tensor, at: StepPosition) -> None:
        self.geometry = geometry = memory.geometry
        config = geometry.config
        prefix, width = config.prefix_len, config.line_width
        in_row = torch.where(at.in_prefix(prefix), torch.maximum(at.held, at.starts), prefix + at.column)
        self.slot = geometry.per_row(in_row)
        signed = memory.matrices == 1
        self.matrix = geometry.per_row(torch.zeros_like(at.column) if signed else at.column)
        index = step_index(at.held, at.starts, prefix, width, signed=signed)
        # All layers look their factors up at once.
        found = F.embedding(index, table).permute(0, 2, 1).unflatten(1, (config.layers, -1))
        self.weighed = found.transpose(0, 1).reshape(config.layers, geometry.rows, 1, 1, -1)

    def __call__(
        self, layer: int, new: Projections, state: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        geometry = self.geometry
        q, k, v = (part.reshape(geometry.rows, 1, 1, -1) for part in new)
        weighed, above_weighed = self.weighed[layer].split([state[0].shape[2], 1], dim=-1)
        attended, *line = spatial_decay_step(
            StepInputs(q, k, v, DecayState(*state), self.slot, self.matrix, weighed, above_weighed)
        )
        return attended.reshape(geometry.sequences, 1, geometry.config.heads, -1), tuple(line)


class DecayWindowStep(WindowStep):
    """A window of the line in progress. It is written at once: a query sees no columns behind its own, and a draft that is rejected is
    written over by the token that comes in its place before anybody sees that column.

    Args:
        memory, table: as for :class:`DecayStep`.
        window: where it lies.
        state: every layer's.
    """

    def __init__(
        self, memory: DecayMemory, table: Tensor, window: Window, state: Sequence[Sequence[Tensor]]
    ) -> None:
        self.state = [DecayState(*tensors) for tensors in state]
        self.geometry = geometry = memory.geometry
        self.window = window
        config = geometry.config
        prefix, width = config.prefix_len, config.line_width
        heads = config.kv_heads
        own = torch.maximum(window.at, window.starts[:, None])
        slot = torch.where(window.in_prefix[:, None], own, prefix + window.columns)
        # What is not fed takes the place of the last that is.
        source = self._per_row(torch.minimum(window.offset, window.last_fed[:, None]), heads)
        row = torch.arange(geometry.rows)[:, None].expand_as(source)
        written = self._per_row(slot, heads).gather(1, source)
        self.place = torch.stack([row, torch.zeros_like(row), written], dim=-1)
        self.source = (source + row * window.width).flatten()
        signed = memory.matrices == 1
        matrix = torch.zeros_like(window.columns) if signed else window.columns
        self.matrix = self._per_row(matrix, heads)
        index = step_index(
            window.at.flatten(),
            window.starts[:, None].expand(-1, window.width).flatten(),
            prefix,
            width,
            signed=signed,
        )
        # [B T, C + 1, L H] -> [L, R, T, C + 1]
        weighed = F.embedding(index, table).unflatten(0, (-1, window.width))
        weighed = weighed.unflatten(-1, (config.layers, -1)).permute(3, 0, 4, 1, 2)
        self.weighed = weighed.flatten(1, 2)

    def _per_row(self, values: Tensor, heads: int) -> Tensor:
        return values[:, None].expand(-1, heads, -1).flatten(0, 1)

    def attend(self, layer: int, new: Projections) -> tuple[Tensor, tuple[Tensor, ...]]:
        geometry, width = self.geometry, self.window.width
        rows, state = geometry.rows, self.state[layer]
        # [B, T, heads, D] -> [R, T, D]
        q, k, v = (part.transpose(1, 2).reshape(rows, width, -1) for part in new)
        k, v = (part.flatten(0, 1).index_select(0, self.source).unflatten(0, (rows, -1)) for part in (k, v))
        weighed, above_weighed = self.weighed[layer][:, None].split([state.k_line.shape[2], 1], dim=-1)
        attended, *line = spatial_decay_window(
            WindowInputs(q[:, None], k, v, state, self.place, self.matrix, weighed, above_weighed)
        )
        attended = attended.reshape(geometry.sequences, geometry.config.heads, width, -1)
        return attended.transpose(1, 2), tuple(line)

    def commit(self, seen: Sequence[tuple[Tensor, ...]], accepted: Accepted) -> Sequence[tuple[Tensor, ...]]:
        return seen


class DecayLineEnd(Stage):
    """Take the finished line into what is above the next, in every layer of the sequences that are due; all others stay."""

    name = "line_end"

    def __init__(self, model: RasterTransformer, memory: DecayMemory) -> None:
        super().__init__()
        self.model = model
        self.memory = memory
        self.geometry = memory.geometry
        loop = {spec.name: spec for spec in memory.state()}
        above = [spec for spec in memory.layer_state() if spec.kind == "above"]
        self.inputs = [loop["position"], loop["line"], *memory.layer_state()]
        self.outputs = [loop["line"].next(), *(spec.next() for spec in above)]
        self.in_place = frozenset(spec.name for spec in above)

    def forward(self, position: Tensor, line: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        width = self.geometry.config.line_width
        states = [DecayState(*state) for state in self.memory.by_layer(layers)]
        ended = self.geometry.due(position, line)
        due = self.geometry.per_row(ended)
        return line + ended.to(torch.int64), *(
            fold(state, width, decay, due)
            for state, decay in zip(states, self.memory.decays(self.model), strict=True)
        )
