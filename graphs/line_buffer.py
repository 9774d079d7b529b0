"""The line buffer: a KV cache of a few lines, the decode steps that fill it, and the line ends that choose what is overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from onnx import FunctionProto
from torch import Tensor

from linert.graphs.line_attention import (
    LineAttentionInputs,
    LineBufferState,
    ScoreParams,
    function_proto,
    line_attention,
    opaque_node,
)
from linert.graphs.line_window import LineWindowStep
from linert.graphs.line_window_attention import function_proto as window_attention_proto
from linert.graphs.line_window_commit import LineWindowCommit
from linert.graphs.memory import LayerStep, Projections, RasterMemory, StepPosition, WindowStep
from linert.graphs.pieces import joined, parted
from linert.graphs.policies import POLICIES, FinishedLine, LineEndParams, Policy, end_line, evict
from linert.graphs.policies.base import carried_scores
from linert.graphs.policies.given import Given
from linert.graphs.stage import Geometry, OwnOperation, Stage
from linert.graphs.stage_tensor import StageTensor, StateTensor
from linert.graphs.transformer import RasterTransformer
from linert.graphs.window import Window
from linert.runtime.plugins.contracts import LINE_ATTENTION, LINE_EVICT, LINE_EVICT_INPUTS

GROUP_ENTRIES = 1 << 15
"""Slots of all rows that a line end works on at a time."""

SCORE_INPUTS = {"score_window": torch.int64, "score_max": torch.int64}
"""How decode accounts for attention: ``score_window`` restarts the scores before the last so many queries of a line
(0 never); ``score_max`` nonzero keeps the largest probability instead of the sum."""


class LineBuffer(RasterMemory):
    """Keys and values of so many lines, in slots of which the next line overwrites those that a policy chose."""

    looks_ahead = True
    written = LINE_ATTENTION.replaced
    unseen = ("k_cache", "v_cache")
    empty: ClassVar[Mapping[str, int]] = {"slot_pos": -1}

    def layer_state(self) -> list[StateTensor]:
        """In the order of :class:`LineBufferState`."""
        geometry = self.geometry
        specs = []
        for layer, slots in enumerate(geometry.capacities):
            held = {"row": geometry.rows, "slot": slots}
            cache = {"row": geometry.rows, "head": 1, "slot": slots, "channel": geometry.config.head_dim}
            specs += [
                StateTensor.of("k_cache", geometry.cache_dtype, cache, layer),
                StateTensor.of("v_cache", geometry.cache_dtype, cache, layer),
                StateTensor.of("scores", torch.float32, held, layer),
                StateTensor.of("slot_pos", torch.int32, held, layer),
            ]
        return specs

    def shared_state(self) -> list[StateTensor]:
        geometry, config = self.geometry, self.geometry.config
        sides = {"layer": config.layers, "row": geometry.rows, "column": config.line_width}
        return [StateTensor.of("write_slots", torch.int64, sides)]

    def first_shared(self) -> list[Tensor]:
        """The first line takes the slots behind the prefix."""
        config = self.geometry.config
        line = torch.arange(config.prefix_len, config.prefix_len + config.line_width)
        return [line.expand(config.layers, self.geometry.rows, -1).contiguous()]

    def settings(self) -> list[StageTensor]:
        return [StageTensor(name, dtype, ()) for name, dtype in SCORE_INPUTS.items()]

    def begin_step(self, model: RasterTransformer, at: StepPosition) -> LayerStep:
        return LineBufferStep(self.geometry, at)

    def begin_window(
        self,
        model: RasterTransformer,
        window: Window,
        inputs: Mapping[str, Tensor],
        state: Sequence[Sequence[Tensor]],
    ) -> WindowStep:
        return LineWindowStep(window, inputs, state)

    def step_operation(self) -> FunctionProto:
        return function_proto(self.geometry.query_group, self.geometry.cache_dtype)

    def window_operations(self, width: int) -> Sequence[FunctionProto | Stage]:
        geometry = self.geometry
        attention = window_attention_proto(geometry.query_group, width, geometry.cache_dtype)
        return attention, LineWindowCommit(geometry, width)

    def line_ends(self, model: RasterTransformer, policies: Sequence[str]) -> list[Stage]:
        ends: list[Stage] = [LineEnd(POLICIES[policy](), self) for policy in policies]
        return [*ends, ReplayLineEnd(self)]


class KeyValueCache:
    """A part of the configurations of models whose layers keep keys and values: a line buffer is what they remember."""

    def memory(self, geometry: Geometry) -> LineBuffer:
        return LineBuffer(geometry)


class LineBufferStep(LayerStep):
    """Write the token into its slot, and attend over the buffer."""

    def __init__(self, geometry: Geometry, at: StepPosition) -> None:
        config = geometry.config
        self.geometry = geometry
        in_prefix = at.in_prefix(config.prefix_len)
        per_row = geometry.per_row(at.column)[None, :, None]
        slots = at.inputs["write_slots"].gather(2, per_row.expand(config.layers, -1, 1)).squeeze(2)
        # The prefix lies in the slots of its positions' numbers.
        own_slot = geometry.per_row(torch.maximum(at.held, at.starts))
        self.slots = torch.where(geometry.per_row(in_prefix), own_slot, slots)
        self.held = geometry.per_row(at.held)[:, None].to(torch.int32)
        window = config.line_width - at.inputs["score_window"]
        restart = geometry.per_row(at.column)[:, None] == window
        self.accounting = ScoreParams(torch.where(restart, -1, self.held), at.inputs["score_max"] != 0)

    def __call__(
        self, layer: int, new: Projections, state: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        geometry = self.geometry
        attended, written = line_attention(
            LineAttentionInputs(
                new.q.reshape(geometry.rows, 1, geometry.query_group, -1),
                new.k.reshape(geometry.rows, 1, 1, -1),
                new.v.reshape(geometry.rows, 1, 1, -1),
                LineBufferState(*state),
                self.slots[layer],
                self.held,
                self.accounting,
            )
        )
        return attended.reshape(geometry.sequences, 1, geometry.config.heads, -1), written


class LineEnd(Stage):
    """Let a policy choose the slots that the next line overwrites, in every layer of the sequences that are due; all others stay.

    Where the LineEvict operation knows the policy's importance, the whole stage is one. Where it does not, the stage works out the
    importance and LineEvict, ``chooser``, the rest.
    """

    def __init__(self, policy: Policy, memory: LineBuffer) -> None:
        super().__init__()
        self.name = f"line_end.{policy.name}"
        self.policy = policy
        self.geometry = geometry = memory.geometry
        self.read = ["k_cache"] * policy.reads_keys + ["v_cache"] * policy.reads_values
        wanted = ["scores", "slot_pos", *self.read]
        replaced = ["scores", "slot_pos"] if policy.replaces_scores else ["slot_pos"]
        layers = memory.layer_state()
        loop = {spec.name: spec for spec in memory.state()}
        config = geometry.config
        sizes = {"L": config.layers, "B": geometry.sequences, "R": geometry.rows, "W": config.line_width}
        self.inputs = [
            *(
                StageTensor(name, getattr(torch, operand.dtype), operand.shape(sizes))
                for name, operand in LINE_EVICT_INPUTS.items()
            ),
            *(spec for kind in wanted for spec in layers if spec.kind == kind),
        ]
        self.outputs = [
            loop["write_slots"].next(),
            loop["line"].next(),
            *(spec.next() for kind in replaced for spec in layers if spec.kind == kind),
        ]
        self.operation = self._operation()
        self.chooser = LineEnd(Given(), memory) if self.operation is None else None

    def operations(self) -> Sequence[FunctionProto | Stage]:
        return [] if self.chooser is None else [self.chooser]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, config = self.geometry, self.geometry.config
        settings, inputs = len(LineEndParams._fields), len(LINE_EVICT_INPUTS)
        params = LineEndParams(*tensors[:settings])
        position, line_number, write_slots = tensors[settings:inputs]
        ended = geometry.due(position, line_number)
        due = geometry.per_row(ended)[:, None]
        position_rows = geometry.per_row(position)[:, None].to(torch.int32)
        state = dict(
            zip(["scores", "slot_pos", *self.read], _chunks(tensors[inputs:], config.layers), strict=True)
        )
        ends: dict[int, tuple[Tensor, ...]] = {}
        for group in self._groups():
            of_group = due[None].expand(len(group), -1, -1).reshape(-1, 1)
            line = self._finished(state, group, position_rows)
            after: tuple[Tensor, ...]
            if self.chooser is not None:
                fresh = carried_scores(self.policy, line)
                after = (self.policy.importance(line, params),)
            else:
                capacity = params.capacity[group[0] : group[-1] + 1, None]
                capacity = capacity.expand(-1, geometry.rows).reshape(-1, 1)
                chosen, left, fresh = end_line(self.policy, line, capacity, params)
                slots_before = write_slots[group[0] : group[-1] + 1].flatten(0, 1)
                chosen = torch.where(of_group, chosen, slots_before)
                after = chosen, torch.where(of_group, left, line.slot_pos)
            pieces = (
                parted(part, geometry.rows) for part in (*after, torch.where(of_group, fresh, line.scores))
            )
            ends |= dict(zip(group, zip(*pieces, strict=True), strict=True))
        *found, scores = zip(*(ends[layer] for layer in range(config.layers)), strict=True)
        replaced = scores if self.policy.replaces_scores else ()
        if self.chooser is not None:
            after_all = self._chosen(tensors[:inputs], found[0], state["slot_pos"])
            return *after_all[:2], *replaced, *after_all[2:]
        slots_next = joined([slots[None] for slots in found[0]])
        return slots_next, line_number + ended.to(torch.int64), *replaced, *found[1]

    def _finished(
        self, state: Mapping[str, Sequence[Tensor]], group: Sequence[int], position_rows: Tensor
    ) -> FinishedLine:
        """The layers of a group, one behind the other, as the policy sees them."""
        scores, slot_pos = (
            joined([state[kind][layer] for layer in group]) for kind in ("scores", "slot_pos")
        )
        keys, values = (
            joined([state[kind][layer].squeeze(1) for layer in group]) if kind in state else None
            for kind in ("k_cache", "v_cache")
        )
        return finished_line(
            self.geometry, scores, slot_pos, position_rows.repeat(len(group), 1), keys, values
        )

    def _chosen(
        self, settings: Sequence[Tensor], importance: Sequence[Tensor], slot_pos: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """What LineEvict makes of every layer's ``importance [R, C]``."""
        assert self.chooser is not None
        assert self.chooser.operation is not None
        inputs = [*settings, *importance, *slot_pos]
        if not torch.compiler.is_exporting():
            after: Sequence[Tensor] = self.chooser(*inputs)
            return after
        kinds = [(spec.dtype, spec.shape) for spec in self.chooser.outputs]
        return opaque_node(self.chooser.operation, inputs, kinds)

    def _operation(self) -> OwnOperation | None:
        """LineEvict; None where it does not know the policy's importance, or how its scores go on."""
        # It restarts scores or leaves them as they are.
        if self.policy.plugin_importance is None or self.policy.carried not in (0, 1):
            return None
        config = self.geometry.config
        attributes = {
            "layers": config.layers,
            "line_width": config.line_width,
            "lines": config.lines,
            "prefix_len": config.prefix_len,
            "kv_heads": config.kv_heads,
            "branches": self.geometry.branches,
            "importance": int(self.policy.plugin_importance),
            "carries_scores": int(not self.policy.replaces_scores),
        }
        return OwnOperation(LINE_EVICT, attributes)

    def _groups(self) -> list[list[int]]:
        """Layers that end their lines together, in one operation instead of one each: runs of the same slots.

        Their number is bounded, so that what is in between stays in the processor's cache and is small beside the state. A
        policy that reads keys or values has many more numbers to look at, which is better done layer by layer.
        """
        capacities = self.geometry.capacities
        groups: list[list[int]] = []
        reads_tokens = self.policy.reads_keys or self.policy.reads_values
        for layer, slots in enumerate(capacities):
            most = 1 if reads_tokens else max(1, GROUP_ENTRIES // (self.geometry.rows * slots))
            if groups and capacities[groups[-1][0]] == slots and len(groups[-1]) < most:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups


def finished_line(
    geometry: Geometry,
    scores: Tensor,
    slot_pos: Tensor,
    position: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
) -> FinishedLine:
    """The buffer of one or more layers as a policy sees it; the shapes are :class:`FinishedLine`'s."""
    config = geometry.config
    return FinishedLine(
        scores=scores,
        slot_pos=slot_pos,
        position=position,
        keys=keys,
        values=values,
        prefix_len=config.prefix_len,
        line_width=config.line_width,
        positions=config.prefix_len + config.image_tokens,
        kv_heads=config.kv_heads,
        branches=geometry.branches,
        layers=len(scores) // geometry.rows,
    )


class ReplayLineEnd(Stage):
    """Evict what a trace says of the sequences that are due, instead of asking a policy."""

    name = "line_end.replay"

    def __init__(self, memory: LineBuffer) -> None:
        super().__init__()
        loop = {spec.name: spec for spec in memory.state()}
        self.geometry = memory.geometry
        slot_pos = [spec for spec in memory.layer_state() if spec.kind == "slot_pos"]
        self.inputs = [
            StageTensor("strict", torch.int64, ()),
            replace(loop["write_slots"], name="replay_slots"),
            loop["position"],
            loop["line"],
            loop["write_slots"],
            *slot_pos,
        ]
        self.outputs = [
            loop["write_slots"].next(),
            loop["line"].next(),
            *(spec.next() for spec in slot_pos),
        ]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        strict, replay_slots, position, line, write_slots, *slot_pos = tensors
        ended = self.geometry.due(position, line)
        due = self.geometry.per_row(ended)[:, None]
        left = [
            torch.where(due, evict(before, chosen, strict), before)
            for before, chosen in zip(slot_pos, replay_slots, strict=True)
        ]
        return torch.where(due, replay_slots, write_slots), line + ended.to(torch.int64), *left


def _chunks(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]
