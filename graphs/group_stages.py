"""The decode stage of models that draw an image in groups: feed the newest tokens, and draw the next group at once.

Axes: I images, B sequences (I, or 2 I with guidance: conditional ones first), C tokens that are fed, Q that are drawn, N image tokens,
S slots of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.group_memory import GroupMemory
from linert.graphs.group_transformer import GroupTransformer
from linert.graphs.line_attention import OPSET
from linert.graphs.line_window_attention import HIDDEN
from linert.graphs.memory import Projections
from linert.graphs.sampling import SamplingParams, guide, sample, scheduled
from linert.graphs.stage import Stage
from linert.graphs.stage_tensor import StageTensor
from linert.graphs.stages import SAMPLING_INPUTS, sampling_inputs
from linert.runtime.bundles.schedule import GroupWidth


class GroupDecode(Stage):
    """Feed the newest tokens of every image, at first its condition, and draw the group behind them.

    Every image has an ``order`` of its own, the cell of the token of every rank, and is at a group of its own, of ``group_size`` tokens; one
    whose group has none stays as it is. A group of fewer than Q tokens, like fewer than C that are fed, is filled up with its last: what
    repeats is not seen, and where it was written the next group is.

    The variant without filters leaves top-k and top-p out, as that of :class:`linert.graphs.stages.Decode` does.
    """

    opset: ClassVar[int] = OPSET

    def __init__(
        self, model: GroupTransformer, memory: GroupMemory, width: GroupWidth, *, filtered: bool = True
    ) -> None:
        super().__init__()
        self.name = width.stage(filtered=filtered)
        self.model, self.memory, self.width, self.filtered = model, memory, width, filtered
        self.geometry = geometry = memory.geometry
        config, images = geometry.config, geometry.images
        of_image = StageTensor("group_size", torch.int64, (images,))
        self.inputs = [
            *sampling_inputs(geometry, geometry.config.image_tokens),
            StageTensor("guidance_linear", torch.int64, (images, 1)),
            StageTensor("order", torch.int64, (images, config.image_tokens)),
            of_image,
            *memory.state(),
        ]
        loop = {spec.name: spec for spec in memory.loop_state()}
        self.in_place = frozenset(["tokens", *(spec.name for spec in memory.layer_state())])
        logits = (geometry.sequences, width.drawn, config.vocab_size)
        self.outputs = [
            *(loop[name].next() for name in ("tokens", "drawn", "newest")),
            StageTensor(width.logits, torch.float32, logits),
            *(spec.next() for spec in memory.layer_state()),
        ]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        geometry, model = self.geometry, self.model
        images, branches = geometry.images, geometry.branches
        inputs = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        layers = self.memory.by_layer(tensors[-len(self.memory.layer_state()) :])
        order, tokens, noise = inputs["order"], inputs["tokens"], inputs["noise"]
        drawn, newest, size = inputs["drawn"], inputs["newest"], inputs["group_size"]
        most = geometry.config.image_tokens - 1

        fed = torch.minimum(torch.arange(self.width.fed), newest[:, None] - 1)
        rank = (drawn - newest)[:, None] + fed
        fed_cells = order.gather(1, rank.clamp(min=0, max=most))
        context = model.tokens_in(fed_cells, tokens.gather(1, fed_cells).clamp(min=0))
        asked = torch.minimum(torch.arange(self.width.drawn), size[:, None] - 1).clamp(min=0)
        asked_rank = (drawn[:, None] + asked).clamp(max=most)
        cells = order.gather(1, asked_rank)
        rows = torch.cat([torch.cat([context, model.queries_in(cells)], dim=1)] * branches)
        # The condition is of no rank: the one before the first.
        is_condition = torch.cat([rank, asked_rank], dim=1).repeat(branches, 1) < 0
        x = torch.where(is_condition[:, :, None], inputs["condition"], rows)

        step = _GroupStep(self, drawn - newest + 1, drawn, size)
        written: list[Tensor] = []
        blocks = list(model.blocks())
        for number, (block, state) in enumerate(zip(blocks, layers, strict=True)):
            attended, kept = step.attend(Projections(*block.qkv(x, None)), state)
            written += kept
            if number == len(blocks) - 1:
                # Of tokens that are fed, keys and values are all that is wanted of the last layer.
                x, attended = (part[:, self.width.fed :] for part in (x, attended))
            x = block.finish(x, attended)
        logits = model.logits(x)
        params = SamplingParams(
            *(inputs[name].repeat(1, self.width.drawn).reshape(-1, 1) for name in SAMPLING_INPUTS)
        )
        linear = inputs["guidance_linear"].repeat(1, self.width.drawn).reshape(-1, 1)
        index = asked_rank.flatten()
        params = params._replace(
            guidance=scheduled(params.guidance, linear, index, geometry.config.image_tokens)
        )
        flat = logits.flatten(0, 1)
        guided = guide(flat, params, index) if geometry.guided else flat
        drawn_with = F.embedding(
            (cells + torch.arange(images)[:, None] * (most + 1)).flatten(), noise.flatten(0, 1)
        )
        token = sample(guided, params, drawn_with, filtered=self.filtered).unflatten(0, (images, -1))
        # Repetitions are of the same token, whatever rounding made of them.
        token = token.gather(1, asked)
        token = torch.where(size[:, None] > 0, token, tokens.gather(1, cells))
        tokens_next = tokens.scatter(1, cells, token)
        newest_next = torch.where(size > 0, size, newest)
        return tokens_next, drawn + size, newest_next, logits, *written


class _GroupStep:
    """A step of every layer, after what all share was worked out.

    Args:
        first: ``[I]``, the slot of the first token that is fed.
        drawn: ``[I]``, tokens before the group.
        size: ``[I]``, of the group.
    """

    def __init__(self, stage: GroupDecode, first: Tensor, drawn: Tensor, size: Tensor) -> None:
        geometry, self.width = stage.geometry, stage.width
        branches, slots, width = geometry.branches, geometry.capacities[0], stage.width
        # An image that is finished feeds what nobody sees.
        self.first = first.clamp(max=slots - width.fed).repeat(branches)
        # All that was drawn is in its slot; behind it is what fills up the tokens that are fed, and what images before left there.
        hidden = (torch.arange(slots) > drawn[:, None]).float() * HIDDEN
        self.of_cache = hidden.repeat(branches, 1)[:, None, None]
        not_asked = (torch.arange(width.drawn) >= size[:, None].clamp(min=1)).float() * HIDDEN
        of_fed = torch.full((geometry.images, width.fed, width.drawn), HIDDEN)
        of_asked = not_asked[:, None].expand(-1, width.drawn, -1)
        self.of_group = torch.cat([of_fed, of_asked], dim=1).repeat(branches, 1, 1)[:, None]

    def attend(self, new: Projections, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the rows attended, ``[B, C + Q, heads, D]``, and the layer's keys and values with the tokens that are fed."""
        width, slots = self.width, state[0].shape[2]
        # [B, S, heads, D] -> [B, heads, S, D]
        q, k, v = (part.transpose(1, 2) for part in new)
        (k_fed, k_asked), (v_fed, v_asked) = (part.split([width.fed, width.drawn], dim=2) for part in (k, v))
        k_cache, v_cache = (
            scatter_run(cache, rows, self.first) for cache, rows in zip(state, (k_fed, v_fed), strict=True)
        )
        seen = (q @ k_cache.mT).float() + self.of_cache
        logits = torch.cat([seen, (q @ k_asked.mT).float() + self.of_group], dim=-1)
        of_cache, of_group = logits.softmax(-1).type_as(q).split([slots, width.drawn], dim=-1)
        attended = of_cache @ v_cache + of_group @ v_asked
        return attended.transpose(1, 2), [k_cache, v_cache]


def scatter_run(cache: Tensor, rows: Tensor, first: Tensor) -> Tensor:
    """``cache [B, H, S, D]`` with ``rows [B, H, n, D]`` in the slots from ``first [B]`` on, in a graph by one TensorScatter node."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, rows, first),
            {"axis": -2},
            dtype=cache.dtype,
            shape=cache.shape,
            version=OPSET,
        )
    slots = first[:, None] + torch.arange(rows.shape[2])
    return cache.scatter(2, slots[:, None, :, None].expand_as(rows), rows)
