"""The base class of a stage, one ONNX graph of a bundle, and the static sizes that all stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from onnx import FunctionProto
from torch import Tensor, nn

from linert.graphs.stage_tensor import NEXT, StageTensor, StateTensor
from linert.graphs.transformer import FamilyConfig


@dataclass(frozen=True)
class Geometry:
    """Static sizes of a bundle's state.

    ``images``: images in a batch. ``guided``: whether every image has an unconditional row. ``capacities``:
    slots of each layer's buffer; empty for a model that has none. ``cache_dtype``: of keys and values.
    """

    config: FamilyConfig
    images: int
    guided: bool
    capacities: tuple[int, ...]
    cache_dtype: torch.dtype = torch.float32

    @property
    def sequences(self) -> int:
        return self.images * self.branches

    @property
    def rows(self) -> int:
        return self.sequences * self.config.kv_heads

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    @property
    def query_group(self) -> int:
        return self.config.heads // self.config.kv_heads

    def loop_state(self) -> list[StateTensor]:
        """State that every model has."""
        config = self.config
        images, sequences = {"image": self.images}, {"sequence": self.sequences}
        condition = sequences | {"position": config.prefix_len, "channel": config.dim}
        return [
            StateTensor.of("token", torch.int64, images),
            StateTensor.of("tokens", torch.int64, images | {"token": config.image_tokens}),
            StateTensor.of("position", torch.int64, sequences),
            StateTensor.of("line", torch.int64, sequences),
            StateTensor.of("condition", self.cache_dtype, condition),
            StateTensor.of("starts", torch.int64, sequences),
        ]

    def due(self, position: Tensor, line: Tensor) -> Tensor:
        """Which sequences have fed all of a line and not yet ended it: ``[B]`` bool.

        Args:
            position: ``[B]``, of their next token.
            line: ``[B]``, how many line ends they have had.
        """
        config = self.config
        fed = position - config.prefix_len >= (line + 1) * config.line_width
        return fed & (line + 1 < config.lines)

    def per_row(self, values: Tensor) -> Tensor:
        """Repeat ``values [B]`` for every KV head: ``[R]``."""
        return values[:, None].expand(-1, self.config.kv_heads).reshape(self.rows)


class OwnOperation(NamedTuple):
    """What makes a whole stage one operation of the domain ``linert``: its name, and the attributes of its node."""

    name: str
    attributes: dict[str, int]


class Stage(nn.Module):
    """A traced unit: ``forward`` takes ``inputs`` and returns ``outputs``, in order.

    ``in_place`` names the states that a runtime may update where they lie. ``operation``: where the whole of it is one. ``opset`` is the version of the operators that the
    stage is traced to, the oldest that has all of them: runtimes' kernels lag behind new versions of old operators (ONNX Runtime
    1.31 has none on CUDA for MaxPool and InstanceNormalization of version 22).
    """

    opset: ClassVar[int] = 21
    name: str
    inputs: Sequence[StageTensor]
    outputs: Sequence[StageTensor]
    in_place: frozenset[str] = frozenset()
    operation: OwnOperation | None = None

    def operations(self) -> Sequence[FunctionProto | Stage]:
        """The bodies of the operations of the domain ``linert`` that its graph has: functions, or stages to be traced."""
        return ()

    def updates(self) -> dict[str, str]:
        """Output name to the state that it replaces."""
        return {spec.name: spec.name.removesuffix(NEXT) for spec in self.outputs if spec.name.endswith(NEXT)}
