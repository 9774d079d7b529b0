"""The operations of the domain ``linert``, each described once: what graphs, plugins and kernels are all made from.

A contract says of every tensor its type, its axes and what it is. Axes: R = sequences x KV heads (or heads), G = query heads of a
KV head, C = slots of a layer, D = size of a key, E = size of a value, M = matrices of a state, L = layers, B = sequences,
W = line width; a number is the size itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

DOMAIN = "linert"
VERSION = 1

FLOAT_TYPE = "T"
"""Type of the tensors that have the type of the first input: one of :data:`FLOAT_TYPES`."""

FLOAT_TYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each."""


class Operand(NamedTuple):
    """A tensor of an operation: its type, its ``axes`` one letter or number each, and what it is."""

    dtype: str
    axes: str
    text: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the axes have these ``sizes``."""
        return tuple(sizes[axis] if axis.isalpha() else int(axis) for axis in self.axes.split())


@dataclass(frozen=True)
class Contract:
    """An operation: the tensors that it takes and makes.

    ``inputs``: by name, in their order. ``like``: the input whose type and axes the first output has, but for ``result_axes``
    where these are given. ``replaced``: the inputs that the outputs behind it are written over.
    """

    name: str
    inputs: Mapping[str, Operand]
    result: str
    like: str
    replaced: tuple[str, ...]

    @property
    def outputs(self) -> dict[str, Operand]:
        """What it makes, by name: its result, then every input that is replaced, as ``X_next``."""
        after = {f"{name}_next": self.inputs[name] for name in self.replaced}
        return {self.result: self.inputs[self.like], **after}

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The sizes of the axes where the inputs have these shapes.

        Raises:
            ValueError: a tensor has other axes, or two do not agree.
        """
        sizes: dict[str, int] = {}
        for (name, operand), shape in zip(self.inputs.items(), shapes, strict=True):
            axes = operand.axes.split()
            for axis, size in zip(axes, shape, strict=False):
                sizes.setdefault(axis, size)
            if len(axes) != len(shape) or tuple(shape) != operand.shape(sizes):
                raise ValueError(
                    f"{self.name}: {name} has shape {tuple(shape)}, not [{', '.join(axes)}] with {sizes}"
                )
        return sizes


LINE_ATTENTION = Contract(
    name="LineAttention",
    inputs={
        "q": Operand(FLOAT_TYPE, "R 1 G D", "queries, rotated and already multiplied by the softmax scale"),
        "k": Operand(FLOAT_TYPE, "R 1 1 D", "rotated key of the new token"),
        "v": Operand(FLOAT_TYPE, "R 1 1 D", "value of the new token"),
        "k_cache": Operand(FLOAT_TYPE, "R 1 C D", "keys of the line buffer"),
        "v_cache": Operand(FLOAT_TYPE, "R 1 C D", "values of the line buffer"),
        "scores": Operand(
            "float32", "R C", "attention that the token in each slot received: its sum, or its largest value"
        ),
        "slot_pos": Operand("int32", "R C", "sequence position that each slot holds, -1 where it is empty"),
        "write_slot": Operand("int64", "R", "the slot that the new token overwrites"),
        "position": Operand("int32", "R 1", "sequence position of the new token"),
        "fresh_from": Operand(
            "int32",
            "R 1",
            "scores of slots that hold this position or a later one start again from zero: usually the position of the new token, "
            "whose slot had another token's score; -1 restarts all",
        ),
        "score_max": Operand("bool", "", "keep the largest probability received instead of the sum"),
    },
    result="attended",
    like="q",
    replaced=("k_cache", "v_cache", "scores", "slot_pos"),
)
"""Write a token into its slot, attend over the line buffer, account for the attention. Softmax and scores are float32."""

SPATIAL_DECAY_STEP = Contract(
    name="SpatialDecayStep",
    inputs={
        "q": Operand(FLOAT_TYPE, "R 1 1 D", "queries"),
        "k": Operand(FLOAT_TYPE, "R 1 1 D", "key of the new token"),
        "v": Operand(FLOAT_TYPE, "R 1 1 E", "value of the new token"),
        "k_line": Operand(FLOAT_TYPE, "R 1 C D", "keys of the prefix and of the line in progress"),
        "v_line": Operand(FLOAT_TYPE, "R 1 C E", "values of the same"),
        "above": Operand("float32", "R M D E", "what the lines above have left for every column"),
        "write_slot": Operand("int64", "R", "the slot of the new token"),
        "matrix": Operand("int64", "R", "which of the M matrices it reads"),
        "weighed": Operand("float32", "R 1 1 C", "how it weighs the slots"),
        "above_weighed": Operand("float32", "R 1 1 1", "how it weighs that matrix"),
    },
    result="attended",
    like="v",
    replaced=("k_line", "v_line"),
)
"""One step of linear attention: write the token's key and value, then read the line in progress, the prefix and all lines above.
Sums are float32."""

LINE_EVICT = "LineEvict"

LINE_EVICT_INPUTS = {
    "capacity": Operand("int64", "L", "slots in use, of those that a layer's buffer has"),
    "recent_tokens": Operand("int64", "", "newest tokens that stay"),
    "anchor_tokens": Operand("int64", "", "first image tokens that stay"),
    "strict": Operand(
        "int64", "", "nonzero empties a chosen slot at once; zero leaves it visible until it is overwritten"
    ),
    "score_max": Operand(
        "int64",
        "",
        "nonzero says that a slot's score is the largest attention probability it received, zero that it is the sum",
    ),
    "average_heads": Operand("int64", "", "nonzero makes the heads of a sequence share one choice"),
    "share_guidance": Operand(
        "int64", "", "nonzero makes the conditional and the unconditional sequence of an image share one"
    ),
    "position": Operand("int64", "B", "position of the next token"),
    "line": Operand("int64", "B", "line ends that a sequence has had"),
    "write_slots": Operand("int64", "L R W", "the slots of the lines in progress"),
}
"""What LineEvict takes in front of the state. For the sequences that are due, which have fed all of a line and not ended it, choose the
slots that the next line overwrites, in every layer, and evict what they hold; leave all others as they are.

Behind these come ``scores [R, C]`` float32 and ``slot_pos [R, C]`` int32 of every layer. Outputs: ``write_slots [L, R, W]`` int64,
``line [B]`` int64, new scores of every layer unless they are carried on, new positions.
"""
