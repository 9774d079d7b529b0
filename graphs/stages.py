"""The stages, each a torch module with named, static-shape inputs and outputs.

    prefill      condition -> state
    admit        conditions of some images, state -> state'         when these take rows that are free
    decode       state -> state', next token                        once a token, or once a window of them
    line_end     state -> state'                                    once a line, one a policy
    vq_decoder   token grid -> pixels

State X is replaced by the output ``X.next``. Axes: I = images, B = sequences (I, or 2 I with guidance:
conditional rows first), H = KV heads, R = B H, C = slots of a layer, W = line width, N = image tokens, L = layers.

An input that a runtime may update in place has no reader in the graph that its write does not wait for: that one could be
scheduled after the write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from onnx import FunctionProto
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.families.vq import VQModel
from linert.graphs.line_attention import OPSET
from linert.graphs.memory import Memory, Projections, RasterMemory, StepPosition
from linert.graphs.sampling import SamplingParams, guide, noise_size, sample
from linert.graphs.stage import Geometry, Stage
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.transformer import Condition, FamilyConfig, RasterTransformer, Transformer
from linert.graphs.window import Accepted, Window, drafts
from linert.runtime.bundles.manifest import decode_stage
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.bundles.setting import settings_of

SAMPLING_INPUTS = {
    spec.name: getattr(torch, spec.dtype)
    for setting in settings_of(SamplingSettings)
    if (spec := setting.declared.stage_input) is not None and spec.name in SamplingParams._fields
}
"""Dtypes of the numbers that every decode stage takes of the sampler."""


NOISE_LINES = 2
"""Lines of every image whose noise decode stages have: a window draws in the line that it feeds and in the next."""


def sampling_inputs(geometry: Geometry, tokens: int) -> list[StageTensor]:
    """What a decode stage draws with; the noise is that of so many ``tokens`` of every image."""
    table = (geometry.images, tokens, noise_size(geometry.config.vocab_size))
    return [
        StageTensor("noise", torch.float32, table),
        *(StageTensor(name, dtype, (geometry.images, 1)) for name, dtype in SAMPLING_INPUTS.items()),
    ]


def logits_output(geometry: Geometry) -> StageTensor:
    return StageTensor("logits", torch.float32, (geometry.sequences, geometry.config.vocab_size))


class Prefill(Stage):
    """Embed the condition and lay out the whole state with nothing cached.

    The condition's positions then go through decode like any others, into slots 0 .. prefix_len - 1, where they stay. So a
    batch begins without a second copy of the weights. The first line takes the slots behind them. Where all conditions are
    padding nothing need be fed: the position begins behind that.
    """

    name = "prefill"

    def __init__(self, model: Transformer, memory: Memory) -> None:
        super().__init__()
        self.model = model
        self.memory = memory
        self.geometry = geometry = memory.geometry
        self.inputs = model.condition_inputs(geometry.images, guided=geometry.guided)
        self.outputs = [spec.next() for spec in memory.state()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        condition = self.model.condition(inputs, guided=self.geometry.guided)
        return self.empty(condition, condition.starts.amin(0, keepdim=True).repeat(self.geometry.sequences))

    def empty(self, condition: Condition, position: Tensor) -> tuple[Tensor, ...]:
        """The state with nothing fed; ``position [B]`` is fed first."""
        memory = self.memory
        layers = [
            torch.full(spec.shape, memory.empty.get(spec.kind, 0), dtype=spec.dtype)
            for spec in memory.layer_state()
        ]
        return (*memory.first_loop(condition, position), *memory.first_shared(), *layers)


class Admit(Prefill):
    """Let new images take the rows of some; the rows of all others stay as they are, bit by bit.

    ``admitted [I]`` int64 is not 0 for the images that begin, whose conditions the other inputs are. An image begins where its own
    conditions do, whatever the others of the batch are. What caches hold of the image before is left there, and nothing sees it.
    """

    name = "admit"

    def __init__(self, model: Transformer, memory: Memory) -> None:
        super().__init__(model, memory)
        geometry = self.geometry
        self.conditions = len(self.inputs)
        self.replaced = [spec for spec in memory.state() if spec.kind not in memory.unseen]
        self.inputs = [
            *self.inputs,
            StageTensor("admitted", torch.int64, (geometry.images,)),
            *self.replaced,
        ]
        self.outputs = [spec.next() for spec in self.replaced]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, conditions = self.geometry, self.conditions
        condition = self.model.condition(tensors[:conditions], guided=geometry.guided)
        position = condition.starts.unflatten(0, (geometry.branches, -1)).amin(0).repeat(geometry.branches)
        state = zip(self.memory.state(), self.empty(condition, position), strict=True)
        fresh = {spec.name: tensor for spec, tensor in state}
        admitted = tensors[conditions]
        # Not a repetition of truths, which ONNX Runtime has no CUDA kernel for.
        images, sequences = admitted != 0, admitted.repeat(geometry.branches) != 0
        begins = {"image": images, "sequence": sequences, "row": geometry.per_row(sequences)}
        after = []
        for spec, before in zip(self.replaced, tensors[conditions + 1 :], strict=True):
            [axis] = [number for number, name in enumerate(spec.axes) if name in begins]
            shape = [1] * len(spec.axes)
            shape[axis] = -1
            after.append(torch.where(begins[spec.axes[axis]].reshape(shape), fresh[spec.name], before))
        return tuple(after)


class DecodeStage(Stage):
    """What stages that feed positions and draw tokens have in common: their tensors.

    Args:
        model: whose layers they run through.
        memory: what those remember.
        width: positions of every sequence that one run takes.
        filtered: whether top-k and top-p are looked at.
    """

    opset: ClassVar[int] = OPSET
    advanced_in_place: ClassVar[bool]
    """Whether the loop's own state has one reader, so that it may be written where it lies."""

    def __init__(self, model: RasterTransformer, memory: RasterMemory, width: int, *, filtered: bool) -> None:
        super().__init__()
        self.name = decode_stage(width, filtered=filtered)
        self.width, self.filtered = width, filtered
        self.model, self.memory = model, memory
        self.geometry = geometry = memory.geometry
        loop = [spec for spec in geometry.loop_state() if spec.kind != "line"]
        self.inputs = [
            *sampling_inputs(geometry, NOISE_LINES * geometry.config.line_width),
            *memory.settings(),
            *loop,
            *memory.shared_state(),
            *memory.layer_state(),
        ]
        advanced = [spec for spec in loop if spec.kind in ("token", "tokens", "position")]
        written = [spec for spec in memory.layer_state() if spec.kind in memory.written]
        self.in_place = frozenset(spec.name for spec in [*advanced * self.advanced_in_place, *written])
        self.outputs = [
            *(spec.next() for spec in advanced),
            logits_output(geometry),
            *(spec.next() for spec in written),
        ]


class Decode(DecodeStage):
    """Feed one token (at first the condition's positions), write it into its slots, and draw the next.

    Every image is at a position of its own; one that is finished keeps its tokens. Whoever runs the stage ends the lines of those that are
    due before (:meth:`linert.graphs.stage.Geometry.due`). A position of padding is written where the condition begins, sees nothing but itself, and is overwritten by what follows.
    What is drawn before the condition's end is drawn again.

    The variant ``decode.unfiltered`` leaves top-k and top-p out: a tenth of a small model's step, for runs that
    use neither.
    """

    advanced_in_place = True

    def __init__(self, model: RasterTransformer, memory: RasterMemory, *, filtered: bool = True) -> None:
        super().__init__(model, memory, 1, filtered=filtered)

    def operations(self) -> Sequence[FunctionProto | Stage]:
        return [self.memory.step_operation()]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, config, model = self.geometry, self.geometry.config, self.model
        inputs = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        end = config.prefix_len + config.image_tokens
        # The only reader of `position`; everything else counts back from the next one. A finished image goes one position on, and stays.
        position_next = (inputs["position"] + 1).clamp(max=end)
        held = position_next - 1
        finished = held[: geometry.images] == end - 1
        drawn_index = (position_next - config.prefix_len).clamp(min=0, max=config.image_tokens - 1)
        column = (held - config.prefix_len) % config.line_width
        at = StepPosition(held, inputs["starts"], column, inputs)
        attend = self.memory.begin_step(model, at)

        fed = torch.cat([inputs["token"]] * geometry.branches)
        row = torch.arange(geometry.sequences) * config.prefix_len + held.clamp(max=config.prefix_len - 1)
        conditions = F.embedding(row, inputs["condition"].flatten(0, 1))[:, None]
        in_prefix = at.in_prefix(config.prefix_len)[:, None, None]
        x = torch.where(in_prefix, conditions, model.embed(fed[:, None]))
        rope = model.rope(held[:, None], at.starts)
        written: list[Tensor] = []
        state = self.memory.by_layer(tensors[-len(self.memory.layer_state()) :])
        for layer, block in enumerate(model.blocks()):
            attended, replaced = attend(layer, Projections(*block.qkv(x, rope)), state[layer])
            x = block.finish(x, attended)
            written += replaced
        logits = model.logits(x).squeeze(1)
        index = drawn_index[: geometry.images]
        drawn_with = noise_of(index[:, None], inputs["noise"]).squeeze(1)
        params = SamplingParams(*(inputs[name] for name in SAMPLING_INPUTS))
        token_next = _next_token(geometry, logits, params, drawn_with, index, self.filtered)
        token_next = with_newlines(config, token_next, index)
        token_next = torch.where(finished, fed[: geometry.images], token_next)
        tokens_next = inputs["tokens"].scatter(1, index[:, None], token_next[:, None])
        return token_next, tokens_next, position_next, logits, *written


class WindowDecode(DecodeStage):
    """Feed a window of positions of every sequence, and accept the first of what they draw; see :mod:`linert.graphs.window`.

    The variant ``decode.wT.unfiltered`` leaves top-k and top-p out.
    """

    advanced_in_place = False

    def __init__(
        self, model: RasterTransformer, memory: RasterMemory, width: int, *, filtered: bool = True
    ) -> None:
        super().__init__(model, memory, width, filtered=filtered)

    def operations(self) -> Sequence[FunctionProto | Stage]:
        return self.memory.window_operations(self.width)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, config, model = self.geometry, self.geometry.config, self.model
        inputs = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        images = geometry.images
        window = Window.of(
            geometry,
            self.width,
            inputs["position"],
            inputs["starts"],
            looks_ahead=self.memory.looks_ahead,
        )
        state = self.memory.by_layer(tensors[-len(self.memory.layer_state()) :])
        step = self.memory.begin_window(model, window, inputs, state)

        fed = drafts(window, inputs["token"], inputs["tokens"])
        rows = torch.arange(geometry.sequences)[:, None] * config.prefix_len
        rows = rows + window.at.clamp(max=config.prefix_len - 1)
        conditions = F.embedding(rows, inputs["condition"].flatten(0, 1))
        in_prefix = window.in_prefix[:, None, None]
        x = torch.where(in_prefix, conditions, model.embed(torch.cat([fed] * geometry.branches)))
        rope = model.rope(window.at, window.starts)
        seen = []
        for layer, block in enumerate(model.blocks()):
            attended, kept = step.attend(layer, Projections(*block.qkv(x, rope)))
            x = block.finish(x, attended)
            seen.append(kept)
        logits = model.logits(x)
        index = window.drawn_index()[:images]
        drawn_with = noise_of(index, inputs["noise"])
        # One a position.
        params = SamplingParams(
            *(inputs[name].repeat(1, self.width).reshape(-1, 1) for name in SAMPLING_INPUTS)
        )
        drawn = _next_token(
            geometry, logits.flatten(0, 1), params, drawn_with.flatten(0, 1), index.flatten(), self.filtered
        )
        drawn = with_newlines(config, drawn, index.flatten()).unflatten(0, (images, -1))
        accepted = Accepted.of(window, fed, drawn)
        last = accepted.last[:images, None]
        moves = accepted.steps[:images] > 0
        token_next = torch.where(moves, drawn.gather(1, last).squeeze(1), inputs["token"])
        # What is drawn behind the accepted tokens is kept as the next drafts. What is not drawn repeats the last that is.
        drawn_now = window.offset < window.drawn[:images, None]
        kept_draws = drawn_now & (window.at[:images] + 1 >= config.prefix_len)
        tokens_next = inputs["tokens"].scatter(
            1,
            torch.where(kept_draws, index, index.gather(1, last)),
            torch.where(kept_draws, drawn, token_next[:, None]),
        )
        position_next = inputs["position"] + accepted.steps
        logits_last = logits.gather(1, accepted.last[:, None, None].expand(-1, -1, logits.shape[2])).squeeze(
            1
        )
        written = [part for layer in step.commit(seen, accepted) for part in layer]
        return token_next, tokens_next, position_next, logits_last, *written


class VQDecoder(Stage):
    """Draw the pixels of finished token grids: of the first ``columns`` of ``line_width`` tokens of each of ``rows`` lines."""

    name = "vq_decoder"

    def __init__(self, model: VQModel, *, images: int, rows: int, columns: int, line_width: int) -> None:
        super().__init__()
        self.image_decoder = model
        self.rows, self.columns = rows, columns
        patch = model.config.patch
        self.inputs = [StageTensor("grid_tokens", torch.int64, (images, rows * line_width))]
        self.outputs = [StageTensor("pixels", torch.float32, (images, 3, rows * patch, columns * patch))]

    def forward(self, grid_tokens: Tensor) -> tuple[Tensor]:
        lines = grid_tokens.unflatten(1, (self.rows, -1))
        return (self.image_decoder.decode(lines[:, :, : self.columns]),)


def noise_of(index: Tensor, noise: Tensor) -> Tensor:
    """What the image tokens ``index [I, T]`` are drawn with, ``[I, T, S]``: token n is in row n modulo the rows of ``noise [I, K, S]``."""
    row = index % noise.shape[1]
    return noise.gather(1, row[:, :, None].expand(-1, -1, noise.shape[2]))


def with_newlines(config: FamilyConfig, token: Tensor, index: Tensor) -> Tensor:
    """``token [I]``, drawn as image token ``index [I]``; the family's newline where a line ends."""
    if config.newline_token is None:
        return token
    ends = index % config.line_width == config.line_width - 1
    return torch.where(ends, config.newline_token, token)


def _next_token(
    geometry: Geometry,
    logits: Tensor,
    params: SamplingParams,
    noise: Tensor,
    index: Tensor,
    filtered: bool = True,
) -> Tensor:
    """Guide ``logits [B, V]`` where the batch has unconditional rows, and draw ``[I]`` tokens."""
    if geometry.guided:
        logits = guide(logits, params, index)
    return sample(logits, params, noise, filtered=filtered)
