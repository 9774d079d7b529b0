"""The kernels of windows of a line buffer against the PyTorch references: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from linert.exporter.tensorrt.launch import line_window_attention, line_window_commit
from linert.graphs.families.llamagen import LlamaGenConfig
from linert.graphs.line_window_attention import HIDDEN, LineWindowAttentionInputs
from linert.graphs.line_window_attention import reference as attention_reference
from linert.graphs.line_window_commit import LineWindowCommit, WindowCommit, WindowLayer
from linert.graphs.memory import memory_of
from linert.runtime.plugins.line_window import LineWindowAttentionLaunch, LineWindowCommitLaunch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of what is attended, about 3 at most; what is received is at most 1 and float32, of logits that halves have rounded."""


def attention_inputs(
    rows: int, group: int, width: int, slots: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> LineWindowAttentionInputs:
    """A half-filled buffer. What no query sees holds no number; each query sees the window up to its own position."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    empty = torch.rand(rows, slots, generator=generator) < 0.4
    hidden = empty[:, None] | (torch.rand(rows, width, slots, generator=generator) < 0.1)
    causal = torch.ones(width, width).triu(1).bool().expand(rows, -1, -1)
    bias = torch.cat([hidden, causal], dim=2)[:, None].float() * HIDDEN
    caches = [normal(rows, 1, slots, head_dim).to(dtype) for _ in range(2)]
    for cache in caches:
        cache[:, 0][hidden.all(1)] = float("nan")
    q = normal(rows, group, width, head_dim) * head_dim**-0.5
    new = (normal(rows, 1, width, head_dim).to(dtype) for _ in range(2))
    return LineWindowAttentionInputs(q.to(dtype), *new, *caches, bias)


def check_attention(
    inputs: LineWindowAttentionInputs, launch: LineWindowAttentionLaunch | None = None
) -> None:
    clean = LineWindowAttentionInputs(*(tensor.float().nan_to_num() for tensor in inputs))
    wanted = attention_reference(clean)
    ours = line_window_attention(LineWindowAttentionInputs(*(t.to(DEVICE) for t in inputs)), launch)
    bound = TOLERANCE[inputs.q.dtype]
    torch.testing.assert_close(ours.attended.float().cpu(), wanted.attended, atol=bound, rtol=bound)
    torch.testing.assert_close(ours.received.cpu(), wanted.received, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "group", "width", "slots", "head_dim"),
    [(4, 1, 4, 145, 64), (2, 4, 8, 33, 100), (3, 2, 3, 17, 8), (70, 1, 2, 9, 16), (1, 1, 1, 1, 4)],
)
def test_attention_is_what_the_reference_attends_to(
    rows: int, group: int, width: int, slots: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_attention(attention_inputs(rows, group, width, slots, head_dim, dtype))


def test_entries_of_few_rows_are_shared_by_programs() -> None:
    assert LineWindowAttentionLaunch(4, 1, 8, 600, 64, "float16").parts > 5
    assert LineWindowAttentionLaunch(600, 1, 8, 600, 64, "float16").parts == 1


@given(
    rows=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 9),
    slots=st.integers(1, 80),
    head_dim=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_attention_of_any_shape(
    rows: int, group: int, width: int, slots: int, head_dim: int, seed: int
) -> None:
    check_attention(attention_inputs(rows, group, width, slots, head_dim, torch.float32, seed))


def commit_stage(capacities: tuple[int, ...], width: int, dtype: torch.dtype) -> LineWindowCommit:
    """Of two guided images."""
    config = LlamaGenConfig(len(capacities), 24, 2, 8, 16, 2, grid=4, prefix_len=1)
    memory = memory_of(config, images=2, guided=True, capacities=capacities, cache_dtype=dtype)
    return LineWindowCommit(memory.geometry, width)


def commit_inputs(
    stage: LineWindowCommit, seed: int = 0, *, score_max: bool = False
) -> tuple[list[WindowLayer], WindowCommit]:
    """Of every row some first positions of the window are accepted; what is not written names the last of them again."""
    generator = torch.Generator().manual_seed(seed)
    geometry, width = stage.geometry, stage.width
    rows, head_dim = geometry.rows, geometry.config.head_dim
    dtype = geometry.cache_dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    layers, write_slots = [], []
    last = torch.randint(width, (rows, 1), generator=generator)
    source = torch.minimum(torch.arange(width), last)
    for slots in geometry.capacities:
        chosen = torch.stack([torch.randperm(slots, generator=generator)[:width] for _ in range(rows)])
        write_slots.append(chosen.gather(1, source))
        received = torch.rand(rows, width, slots + width, generator=generator)
        layers.append(
            WindowLayer(
                *(normal(rows, 1, width, head_dim) for _ in range(2)),
                received / received.sum(2, keepdim=True),
                *(normal(rows, 1, slots, head_dim) for _ in range(2)),
                torch.rand(rows, slots, generator=generator),
                torch.randint(-1, 99, (rows, slots), generator=generator, dtype=torch.int32),
            )
        )
    counted = (torch.arange(width) <= last).float()
    counted[:, 0] = torch.randint(2, (rows,), generator=generator).float()
    shared = WindowCommit(
        torch.stack(write_slots),
        source,
        (100 + source).to(torch.int32),
        counted,
        torch.randint(2, (rows, 1), generator=generator).float(),
        torch.tensor(score_max),
    )
    return layers, shared


@pytest.mark.parametrize("score_max", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("capacities", [(9, 9), (40, 300)])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_commit_leaves_what_the_reference_leaves(
    width: int, capacities: tuple[int, ...], dtype: torch.dtype, score_max: bool
) -> None:
    stage = commit_stage(capacities, width, dtype)
    layers, shared = commit_inputs(stage, width, score_max=score_max)
    wanted = stage(*itertools.chain.from_iterable(layers), *shared)
    on_device = [WindowLayer(*(tensor.to(DEVICE).clone() for tensor in layer)) for layer in layers]
    line_window_commit(on_device, WindowCommit(*(tensor.to(DEVICE) for tensor in shared)))
    after = [tensor.cpu() for layer in on_device for tensor in layer[3:]]
    for number, (ours, theirs) in enumerate(zip(after, wanted, strict=True)):
        if number % 4 == 2:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: LineWindowAttentionLaunch(1, 4, 128, 9, 64, "float32"), "128 positions with 4 query heads"),
        (lambda: LineWindowAttentionLaunch(1, 1, 4, 9000, 64, "float32"), "9000 slots; can be 1 to 8192"),
        (lambda: LineWindowAttentionLaunch(1, 1, 4, 9, 300, "int8"), "caches of int8; .*heads of 300"),
        (lambda: LineWindowCommitLaunch((9, 0), 1, 4, 8, "float32"), "0 slots"),
        (lambda: LineWindowCommitLaunch((9,), 0, 1000, 8, "float32"), "0 rows.*windows of 1000"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(launch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch()  # type: ignore[operator]
