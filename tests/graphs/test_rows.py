"""Images of one batch that stand at different lines: each is what it is alone, and a line's end changes none but those that are due."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from linert.graphs.families.lasadgen import Variant
from linert.graphs.memory import memory_of
from linert.graphs.policies import POLICIES
from tests.eager import Eager
from tests.graphs.test_lasadgen import model as decaying_model
from tests.graphs.test_stages import CLASSES, memory
from tests.graphs.test_stages import model as buffered_model

Tensors = dict[str, torch.Tensor]


def eager_of(policy: str, *, guided: bool, strict: int = 0) -> Eager:
    """A batch of two images; no policy is linear attention."""
    if not policy:
        net = decaying_model(Variant.MANHATTAN)
        return Eager(net, memory_of(net.config, images=2, guided=guided), "", [CLASSES])
    sizes = memory(6 if policy == "full" else 3, guided=guided)
    return Eager(buffered_model(), sizes, policy, [CLASSES], recent_tokens=6, anchor_tokens=2, strict=strict)


def parts_of(eager: Eager, image: int) -> list[tuple[str, int, list[int]]]:
    """Name of each state, the axis that tells images apart, and where on it the image's are."""
    geometry = eager.geometry
    heads = geometry.config.kv_heads
    sequences = range(image, geometry.sequences, geometry.images)
    rows = [sequence * heads + head for sequence in sequences for head in range(heads)]
    where = {"image": [image], "sequence": list(sequences), "row": rows}
    found = []
    for spec in eager.memory.state():
        [axis] = [number for number, name in enumerate(spec.axes) if name in where]
        found.append((spec.name, axis, where[spec.axes[axis]]))
    return found


def state_of(eager: Eager, image: int) -> Tensors:
    """A copy of an image's state."""
    return {
        name: eager.tensors[name].index_select(axis, torch.tensor(places)).clone()
        for name, axis, places in parts_of(eager, image)
    }


def restore(eager: Eager, image: int, state: Tensors) -> None:
    for name, axis, places in parts_of(eager, image):
        eager.tensors[name] = eager.tensors[name].index_copy(axis, torch.tensor(places), state[name])


def due(eager: Eager) -> list[bool]:
    tensors = eager.tensors
    return eager.geometry.due(tensors["position"], tensors["line"])[: eager.geometry.images].tolist()


def finish(eager: Eager, ends: Sequence[int]) -> None:
    """Run until the images' positions are at least ``ends``."""
    while (eager.tensors["position"][: len(ends)] < torch.tensor(ends)).any():
        eager.run("decode")
        which = due(eager)
        if any(which):
            before = [state_of(eager, image) for image in range(2)]
            eager.run("line_end")
            for image, was_due in enumerate(which):
                same = all(
                    torch.equal(part, before[image][name]) for name, part in state_of(eager, image).items()
                )
                assert same is not was_due


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    ("policy", "strict"), [("", 0), *((name, 0) for name in POLICIES), ("linear", 1), ("snapkv", 1)]
)
@pytest.mark.parametrize("behind", [4, 6, 15])
def test_an_image_is_the_same_whatever_line_the_other_is_in(
    policy: str, strict: int, guided: bool, behind: int
) -> None:
    together = eager_of(policy, guided=guided, strict=strict)
    tokens = together.draw().clone()

    apart = eager_of(policy, guided=guided, strict=strict)
    apart.begin()
    begun = state_of(apart, 0)
    prefix = apart.geometry.config.prefix_len
    finish(apart, [prefix + behind] * 2)
    # The first image begins again; the second one ends earlier, and waits for it.
    restore(apart, 0, begun)
    last = prefix + apart.geometry.config.image_tokens - 1
    finish(apart, [last, last])
    assert torch.equal(apart.tensors["tokens"], tokens)
    assert apart.tensors["position"][:2].tolist() == [last, last + 1]


def test_a_line_end_where_none_is_due_changes_nothing() -> None:
    eager = eager_of("linear", guided=True)
    eager.begin()
    finish(eager, [8, 8])
    before = [state_of(eager, image) for image in range(2)]
    eager.run("line_end")
    for image in range(2):
        for name, part in state_of(eager, image).items():
            assert torch.equal(part, before[image][name]), name


def test_a_line_is_ended_once() -> None:
    eager = eager_of("linear", guided=True, strict=1)
    eager.begin()
    while not any(due(eager)):
        eager.run("decode")
    eager.run("line_end")
    once = state_of(eager, 0)
    eager.run("line_end")
    assert all(torch.equal(part, once[name]) for name, part in state_of(eager, 0).items())
    assert eager.tensors["line"].tolist() == [1] * 4
