"""Checks of the plugins' kernels on a GPU, for gpu_check.py: right, and how fast."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.cuda import Device

ROOT = Path(__file__).parents[1]
# The tests' inputs are measured as well.
sys.path.insert(0, str(ROOT))
KERNEL_TESTS = (
    "test_line_attention_kernels.py",
    "test_line_evict_kernels.py",
    "test_spatial_decay_step_kernels.py",
)
SLOTS = (97, 145, 289, 433, 601)
HEADS, HEAD_DIM, LAYERS = 20, 64, 36
"""Of LlamaGen-XL."""

SHARE_OF_COPY = 0.70
"""Of the measured copy bandwidth that the kernels of a step have to reach at batch 64 and above."""

SHARE_OF_UNFUSED = 0.5
"""Of the time of the same in standard operators that LineAttention may take."""


@dataclass
class Outcome:
    """Of one check: ``passed``, ``failed``, ``measured`` (no bar), or ``not run`` and why; with figures."""

    name: str
    status: str
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class NotRunError(Exception):
    """A check that cannot be run here; the message says why."""


Check = Callable[[], Outcome]


def kernel_checks(device: Device | None) -> Iterator[tuple[str, Check]]:
    """The plugins' kernels: right, and how fast."""
    yield "kernels against the reference, compiled", kernel_tests
    yield "kernels as a plan carries them, by the driver", lambda: carried_kernels(_needed(device))
    for batch in (1, 8, 64, 256):
        for slots in SLOTS:
            name = f"LineAttention, batch {batch}, {slots} slots"
            yield name, lambda batch=batch, slots=slots: line_attention_speed(_needed(device), batch, slots)
    for batch in (1, 8, 64, 256):
        name = f"SpatialDecayStep, batch {batch}"
        yield name, lambda batch=batch: spatial_decay_speed(_needed(device), batch)
    for batch in (1, 64):
        for slots in (97, 601):
            name = f"LineEvict, batch {batch}, {slots} slots"
            yield name, lambda batch=batch, slots=slots: line_evict_speed(batch, slots)


def kernel_tests() -> Outcome:
    """The tests that CI runs interpreted."""
    _torch_with_cuda()
    files = [str(ROOT / "tests" / "exporter" / name) for name in KERNEL_TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return Outcome(
        "kernels against the reference, compiled",
        "passed" if done.returncode == 0 else "failed",
        last,
        {"output": done.stdout[-4000:]} if done.returncode else {},
    )


def carried_kernels(device: Device) -> Outcome:
    """Compile ahead of time, load machine code and text through the driver, launch as the plugin does, compare."""
    import torch

    from exporter.tensorrt.compile import kernels_of
    from graphs.line_attention import reference
    from runtime.plugins.base import Call, TensorKind
    from runtime.plugins.kernels import DeviceKernels, LoadedKernel
    from runtime.plugins.line_attention import LineAttention
    from tests.graphs.test_line_attention import bundled, random_inputs

    _torch_with_cuda()
    worst = {}
    for slots in (97, 601):
        inputs = random_inputs(6, 2, slots, 64)
        operation = LineAttention()
        kinds = [TensorKind(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in inputs.values()]
        launch = operation.launch(kinds)
        kernels = kernels_of(launch, [device.capability]).kernels
        wanted, after = reference(bundled(inputs))
        for form in ("machine code", "text"):
            capability = device.capability if form == "machine code" else 0
            loaded = {
                name: LoadedKernel(kernel, device.driver, capability) for name, kernel in kernels.items()
            }
            there = {name: tensor.cuda() for name, tensor in inputs.items()}
            attended = torch.empty_like(there["q"])
            scratch = torch.empty(launch.scratch_bytes, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            places = [attended, *(there[name] for name in ("k_cache", "v_cache", "scores", "slot_pos"))]
            operation.enqueue(
                launch,
                DeviceKernels(loaded, device.driver),
                Call(
                    [tensor.data_ptr() for tensor in there.values()],
                    [tensor.data_ptr() for tensor in places],
                    scratch.data_ptr(),
                    device.stream,
                ),
            )
            device.synchronize()
            error = (attended.cpu() - wanted).abs().max().item()
            scores = (there["scores"].cpu() - after.scores).abs().max().item()
            worst[f"{form}, {slots} slots"] = max(error, scores)
            if not torch.equal(there["slot_pos"].cpu(), after.slot_pos):
                raise AssertionError(f"{form}: positions differ")
    largest = max(worst.values())
    status = "passed" if largest <= 1e-5 else "failed"
    return Outcome(
        "kernels as a plan carries them, by the driver", status, f"largest error {largest:.1e}", worst
    )


def line_attention_speed(device: Device, batch: int, slots: int) -> Outcome:
    """Milliseconds in fp16 at LlamaGen-XL's shape, against a copy of K and V and against standard operators."""
    import torch
    from triton.testing import do_bench_cudagraph

    from exporter.tensorrt.launch import line_attention
    from graphs.line_attention import accumulate
    from tests.exporter.test_line_attention_kernels import inputs_of
    from tests.graphs.test_line_attention import bundled

    _torch_with_cuda()
    rows = 2 * batch * HEADS
    inputs = bundled(
        {name: t.cuda() for name, t in inputs_of(rows, 1, slots, HEAD_DIM, torch.float16).items()}
    )
    state, every = inputs.state, torch.arange(rows, device="cuda")

    def unfused() -> torch.Tensor:
        state.k_cache[every, 0, inputs.write_slot] = inputs.k[:, 0, 0]
        state.v_cache[every, 0, inputs.write_slot] = inputs.v[:, 0, 0]
        state.slot_pos[every, inputs.write_slot] = inputs.position[:, 0]
        logits = (inputs.q @ state.k_cache.mT).float()
        probs = logits.masked_fill((state.slot_pos < 0)[:, None, None], float("-inf")).softmax(-1)
        state.scores.copy_(accumulate(state.scores, probs.mean((1, 2)), state.slot_pos, inputs.accounting))
        return probs.half() @ state.v_cache

    fused = do_bench_cudagraph(lambda: line_attention(inputs), return_mode="median")
    standard = do_bench_cudagraph(unfused, return_mode="median")
    read = 2 * rows * slots * HEAD_DIM * 2
    bandwidth = read / (fused / 1e3)
    share, ratio = bandwidth / device.copy_bandwidth(), fused / standard
    barred = batch >= 64
    fine = (share >= SHARE_OF_COPY or not barred) and ratio <= SHARE_OF_UNFUSED
    return Outcome(
        f"LineAttention, batch {batch}, {slots} slots",
        "passed" if fine else "failed",
        f"{fused * 1e3:.1f} us, {bandwidth / 1e9:.0f} GB/s, {share:.0%} of a copy; {ratio:.2f} x standard operators",
        {"ms": fused, "unfused_ms": standard, "bytes": read, "share_of_copy": share, "over_unfused": ratio},
    )


def spatial_decay_speed(device: Device, batch: int) -> Outcome:
    """Milliseconds in fp16 at LASADGen-XL's shape and 24 tokens a row, against a copy of what it reads."""
    import torch
    from triton.testing import do_bench_cudagraph

    from exporter.tensorrt.launch import spatial_decay_step
    from graphs.spatial_decay import RowState
    from graphs.spatial_decay_step import StepInputs, reference
    from tests.exporter.test_spatial_decay_step_kernels import inputs_of

    _torch_with_cuda()
    rows, slots = 2 * batch * HEADS, 25
    flat = [tensor.cuda() for tensor in inputs_of(rows, slots, 24, HEAD_DIM, HEAD_DIM, torch.float16).flat()]
    inputs = StepInputs(*flat[:3], RowState(*(part.nan_to_num() for part in flat[3:6])), *flat[6:])
    fused = do_bench_cudagraph(lambda: spatial_decay_step(inputs), return_mode="median")
    standard = do_bench_cudagraph(lambda: reference(inputs), return_mode="median")
    read = rows * (4 * HEAD_DIM**2 + 2 * slots * HEAD_DIM * 2)
    bandwidth = read / (fused / 1e3)
    share, ratio = bandwidth / device.copy_bandwidth(), fused / standard
    fine = share >= SHARE_OF_COPY or batch < 64
    return Outcome(
        f"SpatialDecayStep, batch {batch}",
        "passed" if fine else "failed",
        f"{fused * 1e3:.1f} us, {bandwidth / 1e9:.0f} GB/s, {share:.0%} of a copy; {ratio:.2f} x standard operators",
        {"ms": fused, "unfused_ms": standard, "bytes": read, "share_of_copy": share, "over_unfused": ratio},
    )


def line_evict_speed(batch: int, slots: int) -> Outcome:
    """Milliseconds of a line's end of LlamaGen-XL, all layers."""
    import torch
    from triton.testing import do_bench

    from exporter.tensorrt.launch import line_evict
    from graphs.line_evict import Importance
    from runtime.plugins.line_evict import LineEvictLaunch

    _torch_with_cuda()
    rows = 2 * batch * HEADS
    kind = int(Importance.ATTENTION_PER_QUERY)
    launch = LineEvictLaunch((slots,) * LAYERS, rows, 24, 1, HEADS, 2, kind, 0)
    now = torch.full((2 * batch,), slots, dtype=torch.int64, device="cuda")
    numbers = [torch.tensor(value, device="cuda") for value in (24, 16, 0, 0, 0, 0)]
    settings = [torch.full((LAYERS,), slots, dtype=torch.int64, device="cuda"), *numbers, now]
    scores = [torch.rand(rows, slots, device="cuda") for _ in range(LAYERS)]
    positions = torch.arange(slots, dtype=torch.int32, device="cuda").expand(rows, -1).contiguous()
    ms = do_bench(lambda: line_evict(launch, settings, scores, [positions] * LAYERS), return_mode="median")
    return Outcome(f"LineEvict, batch {batch}, {slots} slots", "measured", f"{ms:.3f} ms a line", {"ms": ms})


def _needed(device: Device | None) -> Device:
    if device is None:
        raise NotRunError("no CUDA device")
    return device


def _torch_with_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise NotRunError(f"PyTorch {torch.__version__} sees no CUDA device")
