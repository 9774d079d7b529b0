"""The operations of the domain ``linert``, each described once: what graphs, plugins and kernels are all made from.

A contract says of every tensor its type, its axes and what it is. Axes: R = sequences x KV heads (or heads), G = query heads of a
KV head, C = slots of a layer, T = positions of a window, S = C + T, D = size of a key, E = size of a value, M = matrices of a state,
L = layers, B = sequences, W = line width; a number is the size itself.
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

    ``inputs``: by name, in their order. ``results``: the outputs that have memory of their own. ``replaced``: the inputs that the
    outputs behind them are written over. ``handed_on``: the inputs that come out as they are, where they lie: TensorRT lets a plugin
    write over a tensor that nobody else reads, and so whoever reads it before hands it on.
    """

    name: str
    inputs: Mapping[str, Operand]
    results: Mapping[str, Operand]
    replaced: tuple[str, ...] = ()
    handed_on: tuple[str, ...] = ()

    @property
    def outputs(self) -> dict[str, Operand]:
        """What it makes, by name: its results, then every input that is replaced, as ``X_next``, or handed on, as ``X_read``."""
        return {**self.results, **{output: self.inputs[name] for output, name in self.aliases.items()}}

    @property
    def aliases(self) -> dict[str, str]:
        """Outputs that lie where an input lies, with its name."""
        return {f"{name}_next": name for name in self.replaced} | {
            f"{name}_read": name for name in self.handed_on
        }

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
    results={"attended": Operand(FLOAT_TYPE, "R 1 G D", "values of the slots, weighed by the attention")},
    replaced=("k_cache", "v_cache", "scores", "slot_pos"),
)
"""Write a token into its slot, attend over the line buffer, account for the attention. Softmax and scores are float32."""

LINE_WINDOW_ATTENTION = Contract(
    name="LineWindowAttention",
    inputs={
        "q": Operand(FLOAT_TYPE, "R G T D", "queries, rotated and already multiplied by the softmax scale"),
        "k": Operand(FLOAT_TYPE, "R 1 T D", "rotated keys of the window"),
        "v": Operand(FLOAT_TYPE, "R 1 T D", "values of the window"),
        "k_cache": Operand(FLOAT_TYPE, "R 1 C D", "keys of the line buffer"),
        "v_cache": Operand(FLOAT_TYPE, "R 1 C D", "values of the line buffer"),
        "bias": Operand(
            "float32",
            "R 1 T S",
            "added to the logits of each query, of the slots and behind them of the window: 0, or -1e30 where it does not see them",
        ),
    },
    results={
        "attended": Operand(FLOAT_TYPE, "R G T D", "values, weighed by the attention"),
        "received": Operand(
            "float32", "R T S", "attention of each query to what it sees, averaged over the query heads"
        ),
    },
    handed_on=("k_cache", "v_cache"),
)
"""Attend with a window's queries over the line buffer and over the window itself, and write nothing. Softmax is float32."""

LINE_WINDOW_COMMIT = "LineWindowCommit"

LINE_WINDOW_COMMIT_LAYER = {
    "k": Operand(FLOAT_TYPE, "R 1 T D", "rotated keys of the window"),
    "v": Operand(FLOAT_TYPE, "R 1 T D", "values of the window"),
    "received": Operand(
        "float32", "R T S", "attention of each query to the slots, and behind them to the window"
    ),
    "k_cache": Operand(FLOAT_TYPE, "R 1 C D", "keys of the line buffer"),
    "v_cache": Operand(FLOAT_TYPE, "R 1 C D", "values of the line buffer"),
    "scores": LINE_ATTENTION.inputs["scores"],
    "slot_pos": LINE_ATTENTION.inputs["slot_pos"],
}
"""What LineWindowCommit takes of every layer, layer by layer; C may differ."""

LINE_WINDOW_COMMIT_SHARED = {
    "write_slots": Operand("int64", "L R T", "the slots that are written"),
    "source": Operand(
        "int64",
        "R T",
        "which position of the window is written there; one slot may be named again with the same one",
    ),
    "position": Operand("int32", "R T", "sequence position that the slot then holds"),
    "counted": Operand("float32", "R T", "1 for the queries whose attention is accounted for, else 0"),
    "kept": Operand("float32", "R 1", "1, or 0 where the scores from before count no longer"),
    "score_max": LINE_ATTENTION.inputs["score_max"],
}
"""What it takes behind that.

It writes what was accepted of a window into every layer's buffer and accounts for the attention of the queries accepted. A slot that
is written has the score that its new token received from them. Outputs, layer by layer: the caches and scores, over their inputs, and
the positions, which decode steps read before and so have memory of their own.
"""

LINE_WINDOW_COMMIT_REPLACED = ("k_cache", "v_cache", "scores")
"""What it writes where it lies."""

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
    results={"attended": Operand(FLOAT_TYPE, "R 1 1 E", "what was read")},
    replaced=("k_line", "v_line"),
)
"""One step of linear attention: write the token's key and value, then read the line in progress, the prefix and all lines above.
Sums are float32."""

SPATIAL_DECAY_WINDOW = Contract(
    name="SpatialDecayWindow",
    inputs={
        "q": Operand(FLOAT_TYPE, "R 1 T D", "queries"),
        "k": Operand(FLOAT_TYPE, "R T D", "keys that are written"),
        "v": Operand(FLOAT_TYPE, "R T E", "values that are written"),
        "k_line": SPATIAL_DECAY_STEP.inputs["k_line"],
        "v_line": SPATIAL_DECAY_STEP.inputs["v_line"],
        "above": SPATIAL_DECAY_STEP.inputs["above"],
        "place": Operand(
            "int64",
            "R T 3",
            "where they are written: row, 0 and slot; a slot may be named again with the same key and value",
        ),
        "matrix": Operand("int64", "R T", "which of the M matrices each query reads"),
        "weighed": Operand("float32", "R 1 T C", "how each query weighs the slots"),
        "above_weighed": Operand("float32", "R 1 T 1", "how each weighs its matrix"),
    },
    results={"attended": Operand(FLOAT_TYPE, "R 1 T E", "what was read")},
    replaced=("k_line", "v_line"),
)
"""A window of linear attention: write its keys and values, then read with every query. Sums are float32."""

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
