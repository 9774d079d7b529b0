"""The interface of what layers keep between decode steps: a KV cache, or the state of linear attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from onnx import FunctionProto
from torch import Tensor

from linert.graphs.stage import Geometry, Stage
from linert.graphs.stage_tensor import StageTensor, StateTensor
from linert.graphs.transformer import Condition, FamilyConfig, RasterTransformer
from linert.graphs.window import NO_DRAFT, Accepted, Window


class Projections(NamedTuple):
    """Queries, keys and values of a layer's new tokens, ``[B, 1, heads or KV heads, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class StepPosition:
    """Where the new token of every sequence stands.

    ``held``: ``[B]``, its position. ``starts``: ``[B]``, padding at the beginning. ``column``: ``[B]``, in its line.
    ``inputs``: the decode stage's, by name.
    """

    held: Tensor
    starts: Tensor
    column: Tensor
    inputs: Mapping[str, Tensor]

    def in_prefix(self, prefix_len: int) -> Tensor:
        """``[B]`` bool."""
        return self.held < prefix_len


class LayerStep(ABC):
    """One decode step, after what all layers share was worked out."""

    @abstractmethod
    def __call__(
        self, layer: int, new: Projections, state: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Attend.

        Args:
            layer: its number.
            new: of its new tokens.
            state: the layer's, in the order of :meth:`Memory.layer_state`.

        Returns:
            What was attended, ``[B, 1, heads, D]``, and what replaces the state's tensors of the kinds in
            :attr:`Memory.written`, in their order.
        """


class WindowStep(ABC):
    """One decode step of a window of positions, after what all layers share was worked out."""

    @abstractmethod
    def attend(self, layer: int, new: Projections) -> tuple[Tensor, Any]:
        """Attend with every position of the window.

        Args:
            layer: its number.
            new: of its new tokens, ``[B, T, heads or KV heads, D]``.

        Returns:
            What was attended, ``[B, T, heads, D]``, and what :meth:`commit` needs of it.
        """

    @abstractmethod
    def commit(self, seen: Sequence[Any], accepted: Accepted) -> Sequence[tuple[Tensor, ...]]:
        """What replaces every layer's tensors of the kinds in :attr:`Memory.written` when it is known what is accepted.

        Args:
            seen: what :meth:`attend` handed on, of every layer.
        """


class Memory(ABC):
    """The state of all layers.

    ``written``: kinds that decode replaces, where they lie. ``unseen``: kinds of which nothing is read that a batch did not write
    before. ``empty``: what kinds hold at first, where it is not 0.
    """

    written: ClassVar[tuple[str, ...]]
    unseen: ClassVar[tuple[str, ...]]
    empty: ClassVar[Mapping[str, int]] = {}

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def state(self) -> list[StateTensor]:
        """The whole state of a batch: the loop's, what belongs to all layers, and every layer's."""
        return self.loop_state() + self.shared_state() + self.layer_state()

    @abstractmethod
    def loop_state(self) -> list[StateTensor]:
        """Where every image is, and what was drawn of it."""

    @abstractmethod
    def first_loop(self, condition: Condition, position: Tensor) -> list[Tensor]:
        """What :meth:`loop_state` holds at first; ``position [B]`` of a raster is fed first."""

    @abstractmethod
    def layer_state(self) -> list[StateTensor]:
        """Every layer's tensors, layer by layer."""

    def shared_state(self) -> list[StateTensor]:
        """Tensors that belong to all layers; decode reads them."""
        return []

    def first_shared(self) -> list[Tensor]:
        """What they hold at first."""
        return []

    def by_layer(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """``tensors`` of :meth:`layer_state`, split."""
        size = len(tensors) // self.geometry.config.layers
        return [tensors[start : start + size] for start in range(0, len(tensors), size)]


class RasterMemory(Memory):
    """The memory of a model that draws token after token, line by line.

    ``looks_ahead``: what a window draws behind its line's end says something of what will be drawn there.
    """

    looks_ahead: ClassVar[bool] = False

    def loop_state(self) -> list[StateTensor]:
        return self.geometry.loop_state()

    def first_loop(self, condition: Condition, position: Tensor) -> list[Tensor]:
        geometry = self.geometry
        token = torch.zeros(geometry.images, dtype=torch.int64)
        tokens = torch.full((geometry.images, geometry.config.image_tokens), NO_DRAFT)
        # A graph's output is no input of it.
        rows, starts = (part.clone() for part in condition)
        return [token, tokens, position, torch.zeros_like(position), rows, starts]

    def settings(self) -> list[StageTensor]:
        """Numbers that decode takes."""
        return []

    @abstractmethod
    def begin_step(self, model: RasterTransformer, at: StepPosition) -> LayerStep:
        """Work out what all layers share of a step."""

    @abstractmethod
    def begin_window(
        self,
        model: RasterTransformer,
        window: Window,
        inputs: Mapping[str, Tensor],
        state: Sequence[Sequence[Tensor]],
    ) -> WindowStep:
        """Work out what all layers share of a step of a window.

        Args:
            inputs: the decode stage's, by name.
            state: every layer's tensors, in the order of :meth:`layer_state`.
        """

    @abstractmethod
    def line_ends(self, model: RasterTransformer, policies: Sequence[str]) -> list[Stage]:
        """The stages of which one ends a line.

        Args:
            model: whose layers they are.
            policies: those that are wanted, of a memory that has any.
        """

    @abstractmethod
    def step_operation(self) -> FunctionProto:
        """The body of the operation that a decode graph of single steps holds for every layer; its output ``x_next`` replaces ``x``."""

    @abstractmethod
    def window_operations(self, width: int) -> Sequence[FunctionProto | Stage]:
        """The bodies of the operations that a decode graph of windows holds."""


class RememberingConfig(FamilyConfig, Protocol):
    """A configuration that says what its layers remember."""

    def memory(self, geometry: Geometry) -> Memory:
        """The state between steps, of a batch of these sizes."""
        ...


def memory_of(
    config: RememberingConfig,
    *,
    images: int,
    guided: bool,
    capacities: Sequence[int] = (),
    cache_dtype: torch.dtype = torch.float32,
) -> Memory:
    """What the layers of a model of ``config`` remember of a batch; the arguments are those of :class:`Geometry`."""
    return config.memory(Geometry(config, images, guided, tuple(capacities), cache_dtype))
