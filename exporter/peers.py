"""Eager and compiled PyTorch generators of the same model, with a static full KV cache or recurrent states: baselines of speed."""

from __future__ import annotations

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from linert.exporter.models import LoadedImageDecoder, LoadedTransformer
from linert.exporter.reference_loop import draw_groups, draw_tokens
from linert.graphs.decay_memory import DecayMemory, DecayStep
from linert.graphs.group_history import GroupHistory
from linert.graphs.group_transformer import GroupTransformer
from linert.graphs.memory import Projections, StepPosition, memory_of
from linert.graphs.sampling import mix
from linert.graphs.spatial_decay import DecayState, fold
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.drawing.conditioning import open_conditioner
from linert.runtime.drawing.generator import make_batch, picture
from linert.runtime.drawing.loop import Batch
from linert.runtime.drawing.samples import list_samples
from linert.runtime.measuring.bench import Timings, measure
from linert.runtime.measuring.measured import Measured, milliseconds

PEER_STEPS = 4
"""Decode steps that a peer takes in every round, after one that is not counted."""


@dataclass(frozen=True)
class PeerTimes:
    """What a PyTorch peer took: milliseconds a decode step, and seconds a batch of ``images``. ``note``: what it keeps."""

    decode_ms: float
    batch_s: float | None
    images: int
    note: str

    @property
    def seconds_per_image(self) -> float | None:
        return self.batch_s / self.images if self.batch_s else None

    def to_json(self) -> dict[str, Any]:
        return {"decode_ms": self.decode_ms, "seconds_per_image": self.seconds_per_image}


class PyTorchPeer(ABC):
    """Draws a batch of images, token by token.

    Args:
        transformer, image_decoder: the checkpoints.
        inputs: the prefill stage's, by name, for as many images as there are to be in a batch.
        guidance: scale; above 1 every image has an unconditional row.
        compiled: compile the step with ``torch.compile``.

    Attributes:
        note: what it keeps, for people.
    """

    note: str

    def __init__(
        self,
        transformer: LoadedTransformer,
        image_decoder: LoadedImageDecoder,
        inputs: Mapping[str, NDArray[Any]],
        guidance: float,
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.image_decoder = transformer.eager(), image_decoder.eager()
        self.guidance, self.compiled = guidance, compiled
        self.images = len(next(iter(inputs.values())))
        self.config = config = self.model.config
        self.position = config.prefix_len
        self.slots = config.prefix_len + config.image_tokens
        specs = self.model.condition_inputs(self.images, guided=guidance > 1)
        self.inputs = [torch.from_numpy(inputs[spec.name]) for spec in specs]
        self.condition = self.model.condition(self.inputs, guided=guidance > 1)
        self.sequences = len(self.condition.starts)
        self.generator = torch.Generator().manual_seed(0)
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._allocate()

    @abstractmethod
    def _allocate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Make what is kept between steps; return the step: logits ``[B, V]`` of ``x [B, 1, dim]`` at a position ``[1]``."""

    @abstractmethod
    def _prefill(self) -> Tensor:
        """Feed the condition; logits ``[B, V]`` of the first token."""

    @abstractmethod
    def _end_line(self) -> None:
        """Do what is to be done when a line is fed."""

    @torch.inference_mode()
    def begin(self, inputs: Sequence[Tensor]) -> Tensor:
        """Feed the condition that the peer was made with; logits ``[B, V]`` of token 0."""
        self.position = self.config.prefix_len
        return self._prefill()

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Feed the next token of every image, ``[I, 1]``; logits ``[B, 1, V]`` of the token after it."""
        fed = tokens.repeat(self.sequences // self.images, 1)
        logits = self._forward(self.model.embed(fed), torch.tensor([self.position]))
        self.position += 1
        return logits[:, None]

    def _choose(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Guide logits ``[B, V]`` and draw, as published loops do."""
        if self.guidance > 1:
            logits = mix(*logits.chunk(2), self.guidance)
        return logits, torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """Milliseconds of ``count`` steps with half of the image drawn."""
        tokens = torch.zeros(self.images, 1, dtype=torch.int64)
        self.position = self.slots // 2
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._choose(self.feed(tokens)[:, 0], 0)
            times.append((time.perf_counter() - start) * 1e3)
        return times

    @torch.inference_mode()
    def image(self) -> float:
        """Seconds of a whole batch, from the condition to encoded PNGs."""
        start = time.perf_counter()
        config = self.config
        drawn = draw_tokens(self, self.inputs, self._choose, lambda line: self._end_line())
        grids = torch.stack([token for _, _, token in drawn], dim=1).unflatten(
            1, (config.lines, config.line_width)
        )
        if config.newline_token is not None:
            grids = grids[:, :, :-1]
        for grid in grids:
            picture(self.image_decoder.decode(grid[None])[0].numpy()).save(io.BytesIO(), format="PNG")
        return time.perf_counter() - start


class CachePeer(PyTorchPeer):
    """The cache is written in place and attention reads as much of it as is filled, as published loops do.

    Where the step is compiled it reads all of the cache under a mask: its shapes must not change.
    """

    note = "full cache"

    def _allocate(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.model.config
        shape = (self.sequences, config.kv_heads, self.slots, config.head_dim)
        self.k_cache = [torch.zeros(shape) for _ in range(config.layers)]
        self.v_cache = [torch.zeros(shape) for _ in range(config.layers)]
        # Padding at the beginning of the cache, which nothing sees.
        self.padded = torch.arange(self.slots) < self.condition.starts[:, None]
        return torch.compile(self._masked_step, dynamic=False) if self.compiled else self._sliced_step

    def _end_line(self) -> None:
        """Nothing is evicted."""

    def _prefill(self) -> Tensor:
        """At once."""
        condition, prefix = self.condition, self.model.config.prefix_len
        visible = condition.visible(prefix)[:, None]
        positions = torch.arange(prefix)
        return self._pass(condition.embeddings, positions, lambda cache: cache[:, :, :prefix], visible)

    def _sliced_step(self, x: Tensor, position: Tensor) -> Tensor:
        """Logits ``[B, V]``; attention reads the filled part of the cache."""
        filled = int(position) + 1
        visible = ~self.padded[:, None, None, :filled] if self.padded.any() else None
        return self._pass(x, position, lambda cache: cache[:, :, :filled], visible)

    def _masked_step(self, x: Tensor, position: Tensor) -> Tensor:
        """The same in static shapes."""
        visible = ((torch.arange(self.slots) <= position) & ~self.padded)[:, None, None]
        return self._pass(x, position, lambda cache: cache, visible)

    def _pass(
        self, x: Tensor, positions: Tensor, seen: Callable[[Tensor], Tensor], mask: Tensor | None
    ) -> Tensor:
        """Run ``x [B, S, dim]`` at ``positions [S]``; logits ``[B, V]`` after the last."""
        rope = self.model.rope(positions[None], self.condition.starts)
        for layer, block in enumerate(self.model.blocks()):
            q, k, v = (part.transpose(1, 2) for part in block.qkv(x, rope))
            k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
            k_cache.index_copy_(2, positions, k)
            v_cache.index_copy_(2, positions, v)
            attended = F.scaled_dot_product_attention(
                q,
                seen(k_cache),
                seen(v_cache),
                attn_mask=mask,
                scale=1.0,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            x = block.finish(x, attended.transpose(1, 2))
        return self.model.logits(x[:, -1])


class StatePeer(PyTorchPeer):
    """Spatial decay: a step reads the line in progress and what is above; the line is folded at its end."""

    note = "recurrent"

    def _allocate(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.model.config
        memory = memory_of(config, images=self.images, guided=self.guidance > 1)
        if not isinstance(memory, DecayMemory):
            raise TypeError(f"{type(config).__name__} has no decays")
        self.geometry, self.memory = memory.geometry, memory
        self.decays = list(self.memory.decays(self.model))
        self.factors = self.memory.factors(self.model)
        empty = [torch.zeros(spec.shape) for spec in self.memory.layer_state()]
        self.states = [DecayState(*state) for state in self.memory.by_layer(empty)]
        return torch.compile(self._step, dynamic=False) if self.compiled else self._step

    def _prefill(self) -> Tensor:
        """Position by position."""
        for state in self.states:
            state.above.zero_()
        for position, x in enumerate(self.condition.embeddings.split(1, dim=1)):
            logits = self._forward(x, torch.tensor([position]))
        return logits

    def _step(self, x: Tensor, position: Tensor) -> Tensor:
        config = self.model.config
        positions = position.expand(self.sequences)
        column = (positions - config.prefix_len) % config.line_width
        starts = self.condition.starts
        attend = DecayStep(self.memory, self.factors, StepPosition(positions, starts, column, {}))
        rope = self.model.rope(positions[:, None], starts)
        for layer, block in enumerate(self.model.blocks()):
            attended, line = attend(layer, Projections(*block.qkv(x, rope)), self.states[layer])
            for kept, new in zip(self.states[layer], line, strict=False):
                kept.copy_(new)
            x = block.finish(x, attended)
        return self.model.logits(x[:, -1])

    def _end_line(self) -> None:
        for state, decay in zip(self.states, self.decays, strict=True):
            state.above.copy_(fold(state, self.model.config.line_width, decay))


class GroupPeer:
    """Draws a batch of images in groups, as :class:`linert.graphs.group_history.GroupHistory` does, in eager PyTorch.

    Args:
        transformer, image_decoder: the checkpoints.
        batch: what is drawn.
        guided: whether every image has an unconditional row.
    """

    note = "everything is kept"

    def __init__(
        self,
        transformer: LoadedTransformer,
        image_decoder: LoadedImageDecoder,
        batch: Batch,
        *,
        guided: bool,
    ) -> None:
        model = transformer.eager()
        if not isinstance(model, GroupTransformer) or batch.orders is None:
            raise TypeError(f"{type(model).__name__} does not draw in groups")
        self.image_decoder, self.config = image_decoder.eager(), model.config
        self.images = len(batch.orders)
        self.history = GroupHistory(model, guided=guided)
        self.sampling, self.sizes = batch.sampling, [step.drawn for step in batch.groups]
        self.orders, self.noise = torch.from_numpy(batch.orders), torch.from_numpy(batch.noise.table)
        specs = model.condition_inputs(self.images, guided=guided)
        self.inputs = [torch.from_numpy(batch.conditions[spec.name]) for spec in specs]

    @torch.inference_mode()
    def _draw(self) -> Tensor:
        tokens = torch.zeros_like(self.orders)
        groups = draw_groups(self.history, self.inputs, self.orders, self.sizes, self.sampling, self.noise)
        for group in groups:
            tokens.scatter_(1, group.cells, group.tokens)
        return tokens

    def steps(self, count: int) -> list[float]:
        """Milliseconds of the mean step of an image, twice: once to warm up."""
        return [milliseconds(self._draw) / len(self.sizes) for _ in range(2)]

    @torch.inference_mode()
    def image(self) -> float:
        """Seconds of a whole batch, from the condition to encoded PNGs."""
        start = time.perf_counter()
        for grid in self._draw().unflatten(1, (self.config.lines, self.config.line_width)):
            picture(self.image_decoder.decode(grid[None])[0].numpy()).save(io.BytesIO(), format="PNG")
        return time.perf_counter() - start


Peer = PyTorchPeer | GroupPeer


def peer_of(transformer: LoadedTransformer, *arguments: Any, **options: Any) -> PyTorchPeer:
    """The peer that fits a transformer that draws line by line; the other arguments are :class:`PyTorchPeer`'s."""
    kind = CachePeer if transformer.family.cached else StatePeer
    return kind(transformer, *arguments, **options)


def peers_of(
    bundle: Bundle,
    loaded: tuple[LoadedTransformer, LoadedImageDecoder],
    *,
    threads: int,
    batch: int,
    console: Console,
) -> dict[str, Peer]:
    """PyTorch with ``loaded`` checkpoints of ``bundle``: eager, and compiled where that works and steps are alike."""
    manifest = bundle.manifest
    conditioner = open_conditioner(bundle)
    samples = list_samples(conditioner.usual(), batch, seed=0)
    inputs = conditioner.inputs([sample.condition for sample in samples])
    torch.set_num_threads(threads)
    if manifest.groups is not None:
        sized = msgspec.structs.replace(manifest, images=batch)
        drawn = make_batch(sized, conditioner, samples, manifest.sampling, None)
        conditioner.close()
        return {"eager": GroupPeer(*loaded, drawn, guided=manifest.guided)}
    conditioner.close()
    guidance = manifest.sampling.guidance
    made: dict[str, Peer] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        peer = peer_of(*loaded, inputs, guidance, compiled=compiled)
        try:
            with console.status(f"PyTorch, {name}: first steps ..."):
                peer.steps(3)
        except Exception as error:
            # torch.compile needs a C++ compiler and raises whatever its parts raise.
            if not compiled:
                raise
            reason = (str(error).splitlines() or [""])[0]
            console.print(f"torch.compile does not work here: {type(error).__name__}: {reason}")
            continue
        made[name] = peer
    return made


def measure_beside(
    under_test: Sequence[Measured],
    peers: Mapping[str, Peer],
    *,
    threads: int,
    rounds: int,
    image_rounds: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Timings], dict[str, PeerTimes]]:
    """:func:`linert.runtime.measuring.bench.measure`, with PyTorch peers in the same rounds."""
    steps: dict[str, list[float]] = {name: [] for name in peers}
    images: dict[str, list[float]] = {name: [] for name in peers}

    def time_steps() -> None:
        for name, peer in peers.items():
            steps[name] += peer.steps(PEER_STEPS + 1)[1:]

    def time_images() -> None:
        for name, peer in peers.items():
            images[name].append(peer.image())

    timings = measure(
        under_test,
        threads=threads,
        rounds=rounds,
        image_rounds=image_rounds,
        each_round=time_steps,
        each_image=time_images,
        progress=progress,
    )
    return timings, {
        name: PeerTimes(
            median(steps[name]), median(images[name]) if image_rounds else None, peer.images, peer.note
        )
        for name, peer in peers.items()
    }
