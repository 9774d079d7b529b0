"""What the machine code of the compiled kernels needs of a GPU: registers, and loads as wide as they can be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

pytest.importorskip("triton")

import triton

from linert.runtime.plugins import OPERATIONS
from linert.runtime.plugins.kernels import CompiledKernel, KernelSet
from linert.runtime.plugins.line_attention import LineAttentionLaunch
from linert.runtime.plugins.line_evict import LineEvictLaunch
from linert.runtime.plugins.line_window import LineWindowAttentionLaunch, LineWindowCommitLaunch
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindowLaunch
from tests.exporter.compiler import run_compiler

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATION_OF = {operation.launch_type: name for name, operation in OPERATIONS.items()}

attention = LineAttentionLaunch.tuned
LAUNCHES: dict[str, Any] = {
    "LlamaGen-XL, batch 256": attention(10240, 1, 601, 64, "float16"),
    "LlamaGen-XL, batch 1": attention(40, 1, 601, 64, "float16"),
    "Lumina, bfloat16": attention(2048, 1, 145, 128, "bfloat16"),
    "LlamaGen-B, float32": attention(1536, 1, 97, 64, "float32"),
    "four query heads": attention(1024, 4, 145, 128, "float16"),
    "sixteen query heads of 256": attention(1024, 16, 145, 256, "float16"),
    "a line's end": LineEvictLaunch((601, 97), 10240, 24, 24, 1, 20, 2, 0, 0),
    "a line's end, pooled": LineEvictLaunch((601, 289), 10240, 128, 128, 1, 20, 2, 4, 0),
    "LASADGen-XL": SpatialDecayStepLaunch(10240, 25, 24, 64, 64, "float16"),
    "windows, LlamaGen-XL": LineWindowAttentionLaunch(40, 1, 8, 601, 64, "float16"),
    "windows, float32": LineWindowAttentionLaunch(1536, 1, 8, 97, 64, "float32"),
    "windows, Lumina": LineWindowAttentionLaunch(64, 1, 16, 145, 128, "bfloat16"),
    "windows, four query heads": LineWindowAttentionLaunch(64, 4, 8, 145, 128, "float16"),
    "what a window commits": LineWindowCommitLaunch((145, 601), 40, 8, 64, "float16"),
    "windows, LASADGen-XL": SpatialDecayWindowLaunch(
        SpatialDecayStepLaunch(40, 25, 24, 64, 64, "float16"), 8
    ),
}

REGISTERS = {80: 160, 90: 128}
"""The most that a thread may need, by capability: twelve and sixteen warps on a multiprocessor."""

OTHERWISE = {"line_evict": 96, "spatial_decay_step": 80, "attend_window": 208}
"""The most that a thread of these kernels may need; one that multiplies matrices holds parts of them."""

COUNTED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether this Triton is the one whose registers are counted; older ones need more, and may not spill them either."""


class Usage(NamedTuple):
    """What a thread needs: registers, and bytes on a stack, which is where registers are spilled to."""

    registers: int
    stack: int


COMPILE = """
import sys
from pathlib import Path
import msgspec
from linert.exporter.tensorrt.compile import kernels_of
from linert.runtime.plugins import OPERATIONS
sets = []
for name, fields in msgspec.json.decode(Path(sys.argv[1]).read_bytes()):
    sets.append(kernels_of(msgspec.convert(fields, OPERATIONS[name].launch_type), [80, 90]))
Path(sys.argv[2]).write_bytes(msgspec.msgpack.encode(sets))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, CompiledKernel]]:
    """The kernels of all launches: the launch's name here, the kernel's, and the kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    described = [(OPERATION_OF[type(launch)], launch) for launch in LAUNCHES.values()]
    (folder / "launches.json").write_bytes(msgspec.json.encode(described))
    run_compiler(COMPILE, folder / "launches.json", folder / "kernels")
    sets = msgspec.msgpack.decode((folder / "kernels").read_bytes(), type=list[KernelSet])
    return [
        (name, kernel, kernel_set.kernels[kernel])
        for name, kernel_set in zip(LAUNCHES, sets, strict=True)
        for kernel in kernel_set.kernels
    ]


def machine_code(cubin: bytes, folder: Path, tool: str, *options: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([TOOLS / tool, *options, file], capture_output=True, text=True, check=True)
    return done.stdout


def test_registers_are_few_and_none_is_spilled(
    compiled: list[tuple[str, str, CompiledKernel]], tmp_path: Path
) -> None:
    for name, kernel, binary in compiled:
        for capability, cubin in binary.cubins.items():
            told = machine_code(cubin, tmp_path, "cuobjdump", "-res-usage")
            numbers = re.search(r"REG:(\d+) STACK:(\d+)", told)
            assert numbers is not None
            usage = Usage(*map(int, numbers.groups()))
            assert usage.stack == 0, (name, kernel, capability)
            most = OTHERWISE.get(kernel, REGISTERS[capability])
            assert usage.registers <= most or not COUNTED, (name, kernel, capability)


def test_keys_and_values_are_read_by_whole_vectors(
    compiled: list[tuple[str, str, CompiledKernel]], tmp_path: Path
) -> None:
    for name, kernel, binary in compiled:
        if kernel != "attend":
            continue
        launch = LAUNCHES[name]
        # As many bytes as a thread reads at once.
        bits = 8 * launch.vector * (4 if launch.dtype == "float32" else 2)
        code = machine_code(binary.cubins[90], tmp_path, "nvdisasm", "-c")
        wide = re.findall(r"LDG\.E" + (rf"\.{bits}" if bits > 32 else r"(?![.\w])"), code)
        # Before the loop and in it, keys and values of every repetition.
        assert len(wide) >= 4 * launch.repeats, name
        if launch.group == 1:
            assert bits == 128


def test_threads_that_add_each_others_products_have_one_sum(
    compiled: list[tuple[str, str, CompiledKernel]],
) -> None:
    """A fused multiply-add rounds one of two products: the sums of two threads would differ, and both write theirs to one place."""
    for name, kernel, binary in compiled:
        # The sums of a product of matrices are one thread's each, or two have the same products in the same order.
        if kernel == "attend_window":
            continue
        # What is not told how to round may be fused by whoever compiles the text.
        fused = re.findall(rb"\b(?:fma[.\w]*|(?:mul|add)\.f32)\b", binary.ptx)
        assert fused == [], (name, kernel)
        assert kernel == "line_evict" or b"mul.rn.f32" in binary.ptx, (name, kernel)
