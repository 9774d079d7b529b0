"""The stages in PyTorch, run as a backend would run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from linert.graphs import stages
from linert.graphs.memory import Memory
from linert.graphs.policies import POLICIES, LineEndParams
from linert.graphs.sampling import noise_size
from linert.graphs.stage_tensor import NEXT
from linert.graphs.transformer import FamilyConfig, RasterTransformer
from linert.runtime.drawing.noise import noise_table

GUIDANCE = 3.0


def usual_inputs(geometry: stages.Geometry, **settings: float) -> dict[str, torch.Tensor]:
    """Inputs of decode and of a line's end that are neither state nor condition; zeros for the settings that are not given."""
    config = geometry.config
    tensors = {
        "noise": torch.from_numpy(
            noise_table(range(3, 3 + geometry.images), config.image_tokens, noise_size(config.vocab_size))
        ),
        "capacity": torch.tensor(geometry.capacities),
    }
    reals = {"guidance": GUIDANCE, "temperature": 1.0, "top_p": 1.0}
    integers = {"guidance_interval": -1, "top_k": 0, "greedy": 0, "score_window": 0}
    integers |= dict.fromkeys((name for name in LineEndParams._fields if name != "capacity"), 0)
    for name, usual in (reals | integers).items():
        kind = torch.float32 if name in reals else torch.int64
        shape = (geometry.images, 1) if name in stages.SAMPLING_INPUTS else ()
        tensors[name] = torch.full(shape, settings.get(name, usual), dtype=kind)
    return tensors


def fed_stages(config: FamilyConfig, position: int) -> Iterator[str]:
    """The stages behind a prefill that left the position at ``position``, in order."""
    for current in range(position, config.prefix_len + config.image_tokens - 1):
        yield "decode"
        index = current + 1 - config.prefix_len
        if index > 0 and index % config.line_width == 0:
            yield "line_end"


class Eager:
    """Runs the stages on named tensors.

    Args:
        policy: empty for a model without a cache.
        condition: the prefill stage's inputs, in order.
        settings: those that differ from :func:`usual_inputs`.
    """

    def __init__(
        self,
        net: RasterTransformer,
        memory: Memory,
        policy: str,
        condition: Sequence[torch.Tensor],
        **settings: float,
    ) -> None:
        self.memory = memory
        self.geometry = geometry = memory.geometry
        self.stages: Mapping[str, stages.Stage] = {
            "prefill": stages.Prefill(net, memory),
            "decode": stages.Decode(net, memory),
            "line_end": memory.line_ends(net, (policy,))[0],
        }
        window = POLICIES[policy]().score_window(geometry.config.line_width) if policy else 0
        self.tensors = usual_inputs(geometry, **{"score_window": window, **settings})
        for spec, value in zip(self.stages["prefill"].inputs, condition, strict=True):
            assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype), spec.name
            self.tensors[spec.name] = value

    @property
    def position(self) -> int:
        return int(self.tensors["position"][0])

    def begin(self) -> None:
        """Feed the condition."""
        self.run("prefill")
        while self.position < self.geometry.config.prefix_len:
            self.run("decode")

    def draw(self) -> torch.Tensor:
        """Tokens ``[I, N]`` of whole images."""
        self.run("prefill")
        for stage in fed_stages(self.geometry.config, self.position):
            self.run(stage)
        return self.tensors["tokens"]

    def run(self, name: str) -> None:
        stage = self.stages[name]
        outputs = stage(*(self.tensors[spec.name] for spec in stage.inputs))
        for spec, value in zip(stage.outputs, outputs, strict=True):
            assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype), spec.name
            self.tensors[spec.name.removesuffix(NEXT)] = value
