"""The PyTorch references that a bundle is compared with: every key and value of the image stays in memory.

For a line buffer a mask says which positions each query may see. Slots are bookkeeping of positions only, so that scatter,
overwriting and masking in the stages are checked against something that does none of them. For spatial decay every pair of
tokens has its weight, and there are no states. A whole line is fed at once when its tokens are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from linert.graphs.decay_memory import DecayMemory
from linert.graphs.line_attention import ScoreParams, accumulate
from linert.graphs.line_buffer import finished_line
from linert.graphs.memory import Memory
from linert.graphs.policies import POLICIES, LineEndParams, Policy, end_line, evict
from linert.graphs.spatial_decay import attend, weights
from linert.graphs.stage import Geometry
from linert.graphs.transformer import Condition, RasterTransformer

Attend = Callable[[int, Tensor], Tensor]
"""What a layer's queries ``[R, G, n, D]`` at the newest positions attend, of the same shape."""


class History(ABC):
    """Runs one batch on all that it has seen.

    Args:
        model: the family's module with its weights.
        geometry: sizes of the batch.

    Attributes:
        keys, values: a layer's ``[R, P, D]``, of every position so far.
        position: position of the next token to feed.
    """

    def __init__(self, model: RasterTransformer, geometry: Geometry) -> None:
        self.model, self.geometry = model, geometry
        self.config = model.config

    @torch.no_grad()
    def begin(self, inputs: Sequence[Tensor]) -> Tensor:
        """Feed the condition that ``inputs`` of the prefill stage say; return the logits ``[B, V]`` of token 0."""
        geometry, config = self.geometry, self.geometry.config
        shape = (geometry.rows, config.prefix_len + config.image_tokens, config.head_dim)
        self.keys = [torch.zeros(shape) for _ in range(config.layers)]
        self.values = [torch.zeros(shape) for _ in range(config.layers)]
        self.position = 0
        condition = self.model.condition(inputs, guided=geometry.guided)
        self.starts = condition.starts
        return self._forward(condition.embeddings, self._begun(condition))[:, -1]

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Feed the next tokens of a line, ``[I, n]``; return the logits ``[B, n, V]`` of the tokens after each."""
        geometry, config = self.geometry, self.geometry.config
        count = tokens.shape[1]
        column = (self.position - config.prefix_len) % config.line_width
        if column + count > config.line_width:
            raise ValueError(f"{count} tokens from column {column} leave the line")
        fed = torch.cat([tokens, tokens]) if geometry.guided else tokens
        return self._forward(self.model.embed(fed), self._fed(count))

    @abstractmethod
    def end_line(self, replay: Tensor | None = None) -> Tensor:
        """Choose the next line's slots ``[L, R, W]`` and evict; ``replay`` imposes them instead.

        The model's own choice is returned in either case; it is empty where nothing is evicted.
        """

    @abstractmethod
    def _begun(self, condition: Condition) -> Attend:
        """How the condition's positions attend."""

    @abstractmethod
    def _fed(self, count: int) -> Attend:
        """How the next ``count`` tokens attend."""

    def _forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Run ``x [B, n, dim]`` at the next n positions; return ``[B, n, V]``."""
        geometry, config = self.geometry, self.geometry.config
        count = x.shape[1]
        run = slice(self.position, self.position + count)
        rope = self.model.rope(torch.arange(run.start, run.stop)[None], self.starts)
        for layer, block in enumerate(self.model.blocks()):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
            self.keys[layer][:, run] = k.reshape(geometry.rows, count, -1)
            self.values[layer][:, run] = v.reshape(geometry.rows, count, -1)
            attended = attend(layer, q.reshape(geometry.rows, geometry.query_group, count, -1))
            attended = attended.reshape(geometry.sequences, config.heads, count, -1)
            x = block.finish(x, attended.transpose(1, 2))
        self.position += count
        return self.model.logits(x)


class DecayHistory(History):
    """Spatial decay with the weights of all pairs of tokens, instead of states."""

    def __init__(self, model: RasterTransformer, memory: DecayMemory) -> None:
        super().__init__(model, memory.geometry)
        self.decays = list(memory.decays(model))

    def end_line(self, replay: Tensor | None = None) -> Tensor:
        return torch.empty(0)

    def _begun(self, condition: Condition) -> Attend:
        return self._fed(condition.embeddings.shape[1])

    def _fed(self, count: int) -> Attend:
        config = self.geometry.config
        held = torch.arange(self.position, self.position + count)
        seen = torch.arange(self.position + count)

        def weigh(layer: int, q: Tensor) -> Tensor:
            found = weights(held, seen, config.prefix_len, config.line_width, self.decays[layer])
            keys, values = (past[layer][:, None, : len(seen)] for past in (self.keys, self.values))
            return attend(q, keys, values, found.repeat(self.geometry.sequences, 1, 1)[:, None])

        return weigh


Visibility = Callable[[int], tuple[Tensor, Tensor]]
"""Of a layer: the positions that each query sees ``[R, n, P]``, and those that each slot holds ``[R, n, C]``."""


def full_history(model: RasterTransformer, memory: Memory) -> History:
    """The history of a model from which nothing is evicted; the buffers of ``memory``, if it has any, hold the whole image."""
    geometry = memory.geometry
    if isinstance(memory, DecayMemory):
        return DecayHistory(model, memory)
    never = dict.fromkeys(LineEndParams._fields, torch.tensor(0))
    params = LineEndParams(**never | {"capacity": torch.tensor(geometry.capacities)})
    return HistoryModel(model, geometry, POLICIES["full"](), params)


class HistoryModel(History):
    """The line-buffer model.

    Args:
        model, geometry: as for :class:`History`; the geometry tells the buffer's size.
        policy: chooses slots at line ends.
        params: cache scalars; ``capacity`` holds one number a layer.

    Attributes:
        scores: a layer's ``[R, C]`` attention received, as in the decode stage.
        slot_pos: a layer's ``[R, C]`` positions held, -1 empty.
        write_slots: ``[L, R, W]``, the slots of the line being fed.
    """

    def __init__(
        self, model: RasterTransformer, geometry: Geometry, policy: Policy, params: LineEndParams
    ) -> None:
        super().__init__(model, geometry)
        self.policy, self.params = policy, params

    def _begun(self, condition: Condition) -> Attend:
        geometry, config = self.geometry, self.geometry.config
        prefix = config.prefix_len
        self.scores = [torch.zeros(geometry.rows, slots) for slots in geometry.capacities]
        visible = condition.visible(prefix).repeat_interleave(config.kv_heads, dim=0)
        visible = F.pad(visible, (0, config.image_tokens))
        held = [self._prefix_slots(slots) for slots in geometry.capacities]
        self.slot_pos = [slot_pos[:, -1].to(torch.int32) for slot_pos in held]
        first = torch.arange(prefix, prefix + config.line_width)
        self.write_slots = first.expand(config.layers, geometry.rows, -1).clone()
        return self._masked(lambda layer: (visible, held[layer]))

    def _prefix_slots(self, slots: int) -> Tensor:
        """Positions ``[R, T, slots]`` that each slot holds after each of the prefix, -1 empty.

        What is visible lies in the slot of its number; padding in the slot of the first that is visible, until that comes.
        """
        prefix = self.geometry.config.prefix_len
        start = self.starts.repeat_interleave(self.geometry.config.kv_heads)[:, None, None]
        slot, now = torch.arange(slots), torch.arange(prefix)[:, None]
        held = torch.where((slot >= start) & (slot <= now), slot, -1)
        return torch.where((now < start) & (slot == start), now, held)

    def _fed(self, count: int) -> Attend:
        geometry, config = self.geometry, self.geometry.config
        column = (self.position - config.prefix_len) % config.line_width
        rows = torch.arange(geometry.rows)

        def written(layer: int) -> tuple[Tensor, Tensor]:
            """Visible positions ``[R, n, P]`` and held positions ``[R, n, C]`` after each token's write."""
            held = []
            for offset in range(count):
                slots = self.write_slots[layer, :, column + offset]
                self.slot_pos[layer][rows, slots] = self.position + offset
                held.append(self.slot_pos[layer].clone())
            slot_pos = torch.stack(held, dim=1).long()
            positions = config.prefix_len + config.image_tokens
            visible = torch.zeros(geometry.rows, count, positions + 1, dtype=torch.bool)
            # Empty slots mark the extra column, which is cut off.
            visible.scatter_(2, torch.where(slot_pos < 0, positions, slot_pos), True)
            return visible[:, :, :positions], slot_pos

        return self._masked(written)

    @torch.no_grad()
    def end_line(self, replay: Tensor | None = None) -> Tensor:
        position = torch.full((self.geometry.rows, 1), self.position, dtype=torch.int32)
        own = []
        for layer, (scores, slot_pos) in enumerate(zip(self.scores, self.slot_pos, strict=True)):
            held = slot_pos.clamp(min=0).long()[:, :, None].expand(-1, -1, self.geometry.config.head_dim)
            keys = self.keys[layer].gather(1, held) if self.policy.reads_keys else None
            values = self.values[layer].gather(1, held) if self.policy.reads_values else None
            line = finished_line(self.geometry, scores, slot_pos, position, keys, values)
            chosen, left, fresh = end_line(self.policy, line, self.params.capacity[layer], self.params)
            own.append(chosen)
            if replay is not None:
                left = evict(slot_pos, replay[layer], self.params.strict)
            self.slot_pos[layer], self.scores[layer] = left, fresh
        self.write_slots = torch.stack(own) if replay is None else replay.clone()
        return torch.stack(own)

    def _masked(self, visibility: Visibility) -> Attend:
        """Softmax attention over what is visible, which the scores account for."""

        def softmax(layer: int, q: Tensor) -> Tensor:
            visible, slot_pos = visibility(layer)
            logits = q @ self.keys[layer][:, None].mT
            probs = logits.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
            self._account(layer, probs.mean(1), slot_pos)
            return probs @ self.values[layer][:, None]

        return softmax

    def _account(self, layer: int, probs: Tensor, slot_pos: Tensor) -> None:
        """Add ``probs [R, n, P]`` to the scores of the slots that held each position, ``slot_pos [R, n, C]``."""
        received = probs.gather(2, slot_pos.clamp(min=0)).masked_fill(slot_pos < 0, 0.0)
        config = self.geometry.config
        window = self.policy.score_window(config.line_width)
        for offset in range(probs.shape[1]):
            position = self.position + offset
            restart = (position - config.prefix_len) % config.line_width == config.line_width - window
            fresh_from = torch.tensor([[-1 if restart else position]])
            self.scores[layer] = accumulate(
                self.scores[layer],
                received[:, offset],
                slot_pos[:, offset],
                ScoreParams(fresh_from, self.params.score_max != 0),
            )
