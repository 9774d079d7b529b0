"""The four stages, each a torch module with named, static-shape inputs and outputs.

    prefill      condition -> state
    decode       state -> state', next token                        once a token
    line_end     state -> state'                                    once a line, one a policy
    vq_decoder   token grid -> pixels

State X is replaced by the output ``X.next``. Axes: I = images, B = sequences (I, or 2 I with guidance:
conditional rows first), H = KV heads, R = B H, C = slots of a layer, W = line width, N = image tokens, L = layers.

An input that a runtime may update in place has exactly one consumer in the graph: a second reader could be
scheduled after the write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.families.base import FamilyConfig, RasterTransformer
from graphs.families.vq import VQModel
from graphs.line_attention import LineAttentionInputs, LineBufferState, ScoreParams, line_attention
from graphs.policies import FinishedLine, LineEndParams, Policy, end_line, evict
from graphs.sampling import SamplingParams, guide, sample
from graphs.tensor_spec import NEXT, TensorSpec

GROUP_ENTRIES = 1 << 15
"""Slots of all rows that a line end works on at a time."""

SAMPLING_INPUTS = {
    "guidance": torch.float32,
    "guidance_interval": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "greedy": torch.int64,
}
SCORE_INPUTS = {"score_window": torch.int64, "score_max": torch.int64}
"""How decode accounts for attention: ``score_window`` restarts the scores before the last so many queries of a line
(0 never); ``score_max`` nonzero keeps the largest probability instead of the sum."""


@dataclass(frozen=True)
class Geometry:
    """Static sizes of a bundle's state.

    ``images``: images in a batch. ``guided``: whether every image has an unconditional row. ``capacities``:
    slots of each layer's buffer. ``cache_dtype``: of K and V.
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

    def loop_state(self) -> list[TensorSpec]:
        """State that is not a layer's."""
        config = self.config
        return [
            TensorSpec("token", torch.int64, (self.images,)),
            TensorSpec("tokens", torch.int64, (self.images, config.image_tokens)),
            TensorSpec("position", torch.int64, (self.sequences,)),
            TensorSpec("write_slots", torch.int64, (config.layers, self.rows, config.line_width)),
            TensorSpec("condition", self.cache_dtype, (self.sequences, config.prefix_len, config.dim)),
            TensorSpec("starts", torch.int64, (self.sequences,)),
        ]

    def layer_state(self) -> list[TensorSpec]:
        """Every layer's line buffer, layer by layer in the order of :class:`LineBufferState`."""
        specs = []
        for layer, slots in enumerate(self.capacities):
            cache = (self.rows, 1, slots, self.config.head_dim)
            specs += [
                TensorSpec(f"k_cache.{layer}", self.cache_dtype, cache),
                TensorSpec(f"v_cache.{layer}", self.cache_dtype, cache),
                TensorSpec(f"scores.{layer}", torch.float32, (self.rows, slots)),
                TensorSpec(f"slot_pos.{layer}", torch.int32, (self.rows, slots)),
            ]
        return specs

    def state(self) -> list[TensorSpec]:
        return self.loop_state() + self.layer_state()


class Stage(nn.Module):
    """A traced unit: ``forward`` takes ``inputs`` and returns ``outputs``, in order.

    ``in_place`` names the states that a runtime may update where they lie.
    """

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    in_place: frozenset[str] = frozenset()

    def updates(self) -> dict[str, str]:
        """Output name to the state that it replaces."""
        return {spec.name: spec.name.removesuffix(NEXT) for spec in self.outputs if spec.name.endswith(NEXT)}


def sampling_inputs(geometry: Geometry) -> list[TensorSpec]:
    table = (geometry.images, geometry.config.image_tokens)
    return [
        TensorSpec("uniforms", torch.float32, table),
        *(TensorSpec(name, dtype, ()) for name, dtype in SAMPLING_INPUTS.items()),
    ]


def logits_output(geometry: Geometry) -> TensorSpec:
    return TensorSpec("logits", torch.float32, (geometry.sequences, geometry.config.vocab_size))


class Prefill(Stage):
    """Embed the condition and lay out the whole state with nothing cached.

    The condition's positions then go through decode like any others, into slots 0 .. prefix_len - 1, where they stay. So a
    batch begins without a second copy of the weights. The first line takes the slots behind them. Where all conditions are
    padding nothing need be fed: the position begins behind that.
    """

    name = "prefill"

    def __init__(self, model: RasterTransformer, geometry: Geometry) -> None:
        super().__init__()
        self.model = model
        self.geometry = geometry
        self.inputs = model.condition_inputs(geometry.images, guided=geometry.guided)
        self.outputs = [spec.next() for spec in geometry.state()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        geometry, config = self.geometry, self.geometry.config
        condition, starts = self.model.condition(inputs, guided=geometry.guided)
        token = torch.zeros(geometry.images, dtype=torch.int64)
        tokens = torch.zeros(geometry.images, config.image_tokens, dtype=torch.int64)
        position = starts.amin(0, keepdim=True).repeat(geometry.sequences)
        line = torch.arange(config.prefix_len, config.prefix_len + config.line_width)
        write_slots = line.expand(config.layers, geometry.rows, -1).contiguous()
        empty = {"slot_pos": -1}
        layers = [
            torch.full(spec.shape, empty.get(spec.name.partition(".")[0], 0), dtype=spec.dtype)
            for spec in geometry.layer_state()
        ]
        # A graph's output is no input of it.
        return token, tokens, position, write_slots, condition.clone(), starts.clone(), *layers


class Decode(Stage):
    """Feed one token (at first the condition's positions), write it into its slots, and draw the next.

    A position of padding is written where the condition begins, sees nothing but itself, and is overwritten by what follows.
    What is drawn before the condition's end is drawn again.

    The variant ``decode.unfiltered`` leaves top-k and top-p out: a tenth of a small model's step, for runs that
    use neither.
    """

    def __init__(self, model: RasterTransformer, geometry: Geometry, *, filtered: bool = True) -> None:
        super().__init__()
        self.name = "decode" if filtered else "decode.unfiltered"
        self.filtered = filtered
        self.model = model
        self.geometry = geometry
        loop, layers = geometry.loop_state(), geometry.layer_state()
        scalars = [TensorSpec(name, dtype, ()) for name, dtype in SCORE_INPUTS.items()]
        self.inputs = [*sampling_inputs(geometry), *scalars, *loop, *layers]
        advanced = [spec for spec in loop if spec.name in ("token", "tokens", "position")]
        self.in_place = frozenset(spec.name for spec in [*advanced, *layers])
        self.outputs = [
            *(spec.next() for spec in advanced),
            logits_output(geometry),
            *(spec.next() for spec in layers),
        ]

    def forward(
        self,
        uniforms: Tensor,
        guidance: Tensor,
        guidance_interval: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        greedy: Tensor,
        score_window: Tensor,
        score_max: Tensor,
        token: Tensor,
        tokens: Tensor,
        position: Tensor,
        write_slots: Tensor,
        condition: Tensor,
        starts: Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, ...]:
        geometry, config, model = self.geometry, self.geometry.config, self.model
        params = SamplingParams(guidance, guidance_interval, temperature, top_k, top_p, greedy)
        # The only reader of `position`; everything else counts back from the next one.
        position_next = position + 1
        held = position_next - 1
        in_prefix = held < config.prefix_len
        drawn_index = (position_next - config.prefix_len).clamp(min=0)
        column = (held - config.prefix_len) % config.line_width
        per_row = _per_row(column, geometry)[None, :, None]
        slots = write_slots.gather(2, per_row.expand(config.layers, -1, 1)).squeeze(2)
        # The prefix lies in the slots of its positions' numbers.
        own_slot = _per_row(torch.maximum(held, starts), geometry)
        slots = torch.where(_per_row(in_prefix, geometry), own_slot, slots)
        held_rows = _per_row(held, geometry)[:, None].to(torch.int32)
        restart = _per_row(column, geometry)[:, None] == config.line_width - score_window
        accounting = ScoreParams(torch.where(restart, -1, held_rows), score_max != 0)

        fed = torch.cat([token, token]) if geometry.guided else token
        row = torch.arange(geometry.sequences) * config.prefix_len + held.clamp(max=config.prefix_len - 1)
        conditions = F.embedding(row, condition.flatten(0, 1))[:, None]
        x = torch.where(in_prefix[:, None, None], conditions, model.embed(fed[:, None]))
        rope = model.rope(held[:, None], starts)
        written: list[Tensor] = []
        for layer, block in enumerate(model.blocks()):
            q, k, v = block.qkv(x, rope)
            attended, state = line_attention(
                LineAttentionInputs(
                    q.reshape(geometry.rows, 1, geometry.query_group, -1),
                    k.reshape(geometry.rows, 1, 1, -1),
                    v.reshape(geometry.rows, 1, 1, -1),
                    LineBufferState(*layers[4 * layer : 4 * layer + 4]),
                    slots[layer],
                    held_rows,
                    accounting,
                )
            )
            x = block.finish(x, attended.reshape(geometry.sequences, 1, config.heads, -1))
            written += state
        logits = model.logits(x).squeeze(1)
        index = drawn_index[: geometry.images]
        uniform = uniforms.gather(1, index[:, None]).squeeze(1)
        token_next = _next_token(geometry, logits, params, uniform, index, self.filtered)
        token_next = with_newlines(config, token_next, index)
        tokens_next = tokens.scatter(1, index[:, None], token_next[:, None])
        return token_next, tokens_next, position_next, logits, *written


class LineEnd(Stage):
    """Let a policy choose the slots that the next line overwrites, in every layer."""

    def __init__(self, policy: Policy, geometry: Geometry) -> None:
        super().__init__()
        self.name = f"line_end.{policy.name}"
        self.policy = policy
        self.geometry = geometry
        wanted = ["scores.", "slot_pos."] + ["k_cache."] * policy.reads_keys
        replaced = ["slot_pos."] if policy.carries_scores else ["scores.", "slot_pos."]
        layers = geometry.layer_state()
        loop = {spec.name: spec for spec in geometry.loop_state()}
        self.inputs = [
            TensorSpec("capacity", torch.int64, (geometry.config.layers,)),
            *(TensorSpec(name, torch.int64, ()) for name in LineEndParams._fields if name != "capacity"),
            loop["position"],
            *(spec for kind in wanted for spec in layers if spec.name.startswith(kind)),
        ]
        self.outputs = [
            loop["write_slots"].next(),
            *(spec.next() for kind in replaced for spec in layers if spec.name.startswith(kind)),
        ]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, config = self.geometry, self.geometry.config
        settings = len(LineEndParams._fields)
        params = LineEndParams(*tensors[:settings])
        position_rows = _per_row(tensors[settings], geometry)[:, None].to(torch.int32)
        scores, slot_pos, *keys = _chunks(tensors[settings + 1 :], config.layers)
        ends: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for group in self._groups():
            line = finished_line(
                geometry,
                torch.cat([scores[layer] for layer in group]),
                torch.cat([slot_pos[layer] for layer in group]),
                position_rows.repeat(len(group), 1),
                torch.cat([keys[0][layer].squeeze(1) for layer in group]) if keys else None,
            )
            capacity = (
                params.capacity[group[0] : group[-1] + 1, None].expand(-1, geometry.rows).reshape(-1, 1)
            )
            found = end_line(self.policy, line, capacity, params)
            ends |= dict(
                zip(group, zip(*(part.chunk(len(group)) for part in found), strict=True), strict=True)
            )
        chosen, left, restarted = zip(*(ends[layer] for layer in range(config.layers)), strict=True)
        replaced = left if self.policy.carries_scores else restarted + left
        return torch.stack(chosen), *replaced

    def plugin_attributes(self) -> dict[str, int] | None:
        """Attributes of the LineEvict operation that this stage is; None where its plugin has no such policy."""
        if self.policy.plugin_importance is None:
            return None
        config = self.geometry.config
        return {
            "layers": config.layers,
            "line_width": config.line_width,
            "prefix_len": config.prefix_len,
            "kv_heads": config.kv_heads,
            "branches": self.geometry.branches,
            "importance": int(self.policy.plugin_importance),
            "carries_scores": int(self.policy.carries_scores),
        }

    def _groups(self) -> list[list[int]]:
        """Layers that end their lines together, in one operation instead of one each: runs of the same slots.

        Their number is bounded, so that what is in between stays in the processor's cache and is small beside the state. A
        policy that reads keys compares them with each other, which is better done layer by layer.
        """
        capacities = self.geometry.capacities
        groups: list[list[int]] = []
        for layer, slots in enumerate(capacities):
            most = 1 if self.policy.reads_keys else max(1, GROUP_ENTRIES // (self.geometry.rows * slots))
            if groups and capacities[groups[-1][0]] == slots and len(groups[-1]) < most:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups


def finished_line(
    geometry: Geometry, scores: Tensor, slot_pos: Tensor, position: Tensor, keys: Tensor | None
) -> FinishedLine:
    """The buffer of one or more layers as a policy sees it; the shapes are :class:`FinishedLine`'s."""
    config = geometry.config
    return FinishedLine(
        scores=scores,
        slot_pos=slot_pos,
        position=position,
        keys=keys,
        prefix_len=config.prefix_len,
        line_width=config.line_width,
        positions=config.prefix_len + config.image_tokens,
        kv_heads=config.kv_heads,
        branches=geometry.branches,
        layers=len(scores) // geometry.rows,
    )


class ReplayLineEnd(Stage):
    """Evict what a trace says, instead of asking a policy."""

    name = "line_end.replay"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        loop = {spec.name: spec for spec in geometry.loop_state()}
        self.held = [s for s in geometry.layer_state() if s.name.startswith("slot_pos.")]
        self.inputs = [
            TensorSpec("strict", torch.int64, ()),
            replace(loop["write_slots"], name="replay_slots"),
            *self.held,
        ]
        self.outputs = [loop["write_slots"].next(), *(spec.next() for spec in self.held)]

    def forward(self, strict: Tensor, replay_slots: Tensor, *slot_pos: Tensor) -> tuple[Tensor, ...]:
        left = [evict(held, chosen, strict) for held, chosen in zip(slot_pos, replay_slots, strict=True)]
        return replay_slots.clone(), *left


class VQDecoder(Stage):
    """Draw the pixels of finished token grids: of the first ``columns`` of ``line_width`` tokens of each of ``rows`` lines."""

    name = "vq_decoder"

    def __init__(self, model: VQModel, *, images: int, rows: int, columns: int, line_width: int) -> None:
        super().__init__()
        self.image_decoder = model
        self.rows, self.columns = rows, columns
        patch = model.config.patch
        self.inputs = [TensorSpec("grid_tokens", torch.int64, (images, rows * line_width))]
        self.outputs = [TensorSpec("pixels", torch.float32, (images, 3, rows * patch, columns * patch))]

    def forward(self, grid_tokens: Tensor) -> tuple[Tensor]:
        lines = grid_tokens.unflatten(1, (self.rows, -1))
        return (self.image_decoder.decode(lines[:, :, : self.columns]),)


def with_newlines(config: FamilyConfig, token: Tensor, index: Tensor) -> Tensor:
    """``token [I]``, drawn as image token ``index [I]``; the family's newline where a line ends."""
    if config.newline_token is None:
        return token
    ends = index % config.line_width == config.line_width - 1
    return torch.where(ends, config.newline_token, token)


def _chunks(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


def _per_row(values: Tensor, geometry: Geometry) -> Tensor:
    """Repeat ``values [B]`` for every KV head: ``[R]``."""
    heads = geometry.config.kv_heads
    return values[:, None].expand(-1, heads).reshape(geometry.rows)


def _next_token(
    geometry: Geometry,
    logits: Tensor,
    params: SamplingParams,
    uniform: Tensor,
    index: Tensor,
    filtered: bool = True,
) -> Tensor:
    """Guide ``logits [B, V]`` where the batch has unconditional rows, and draw ``[I]`` tokens."""
    if geometry.guided:
        logits = guide(logits, params, index)
    return sample(logits, params, uniform, filtered=filtered)
