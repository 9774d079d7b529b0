"""Kernels compiled into a file: read without a compiler, and what their machine code needs of a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

pytest.importorskip("triton")

import triton
from click.testing import CliRunner

from exporter.tensorrt.carried import main
from runtime.errors import DeviceError
from runtime.plugins import OPERATIONS
from runtime.plugins.carried import read_kernels
from runtime.plugins.kernels import CompiledKernel
from runtime.plugins.line_attention import LineAttentionLaunch
from runtime.plugins.line_evict import LineEvictLaunch
from runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch
from tests.conftest import ROOT
from tests.exporter.compiler import run_compiler

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90)
OPERATION_OF = {operation.launch_type: name for name, operation in OPERATIONS.items()}

attention = LineAttentionLaunch.tuned
LAUNCHES: dict[str, Any] = {
    "LlamaGen-XL, batch 256": attention(10240, 1, 601, 64, "float16"),
    "LlamaGen-XL, batch 1": attention(40, 1, 601, 64, "float16"),
    "Lumina, bfloat16": attention(2048, 1, 145, 128, "bfloat16"),
    "LlamaGen-B, float32": attention(1536, 1, 97, 64, "float32"),
    "four query heads": attention(1024, 4, 145, 128, "float16"),
    "sixteen query heads of 256": attention(1024, 16, 145, 256, "float16"),
    "a line's end": LineEvictLaunch((601, 97), 10240, 24, 1, 20, 2, 0, 0),
    "a line's end, pooled": LineEvictLaunch((601, 289), 10240, 128, 1, 20, 2, 4, 0),
    "LASADGen-XL": SpatialDecayStepLaunch(10240, 25, 24, 64, 64, "float16"),
}

REGISTERS = {80: 160, 90: 128}
"""The most that a thread may need, by capability: twelve and sixteen warps on a multiprocessor."""

FEWER = {"line_evict": 96, "spatial_decay_step": 80}
"""The most that a thread of these kernels may need."""

COUNTED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether this Triton is the one whose registers are counted; older ones need more, and may not spill them either."""


class Usage(NamedTuple):
    """What a thread needs: registers, and bytes on a stack, which is where registers are spilled to."""

    registers: int
    stack: int


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the kernels of all launches."""
    folder = tmp_path_factory.mktemp("carried")
    described = [(OPERATION_OF[type(launch)], launch) for launch in LAUNCHES.values()]
    (folder / "launches.json").write_bytes(msgspec.json.encode(described))
    command = "from exporter.tensorrt.carried import main; main()"
    sm = ",".join(map(str, CAPABILITIES))
    run_compiler(command, folder / "launches.json", folder / "kernels", "--sm", sm)
    return folder / "kernels"


def kernels_in(file: Path) -> Iterator[tuple[str, str, CompiledKernel]]:
    """The launch's name in this file, the kernel's, and the kernel."""
    for name, (_, _, found) in zip(LAUNCHES, read_kernels(file), strict=True):
        for kernel in found.kernels:
            yield name, kernel, found.kernels[kernel]


def machine_code(cubin: bytes, folder: Path, tool: str, *options: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([TOOLS / tool, *options, file], capture_output=True, text=True, check=True)
    return done.stdout


def test_what_was_written_is_read(carried: Path) -> None:
    found = read_kernels(carried)
    assert [(name, launch) for name, launch, _ in found] == [
        (OPERATION_OF[type(launch)], launch) for launch in LAUNCHES.values()
    ]
    for _, _, kernel in kernels_in(carried):
        assert tuple(kernel.cubins) == CAPABILITIES
        assert b".target sm_80" in kernel.ptx
        assert kernel.warps in (1, 4)


def test_reading_needs_no_compiler_and_no_pytorch(carried: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('triton', 'torch', 'onnx', 'onnxruntime')))\n"
        "from pathlib import Path\n"
        "from runtime.plugins.carried import read_kernels\n"
        "print(len(read_kernels(Path(sys.argv[1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, carried], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == len(LAUNCHES)


@pytest.mark.parametrize("damage", ["missing", "shorter", "another format"])
def test_a_file_without_kernels_is_refused(damage: str, carried: Path, tmp_path: Path) -> None:
    file = tmp_path / "kernels"
    if damage == "shorter":
        file.write_bytes(carried.read_bytes()[:-1])
    elif damage == "another format":
        file.write_text("kernels")
    with pytest.raises(DeviceError, match=r"python -m exporter\.tensorrt\.carried"):
        read_kernels(file)


def test_launches_that_cannot_be_compiled_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    for launches, words in (
        ([["LinearAttention", {}]], "there are LineAttention, LineEvict, SpatialDecayStep"),
        ([["SpatialDecayStep", {"rows": 1}]], "missing required field"),
        (
            [["LineAttention", msgspec.to_builtins(attention(1, 1, 9, 64, "float16")) | {"slots": 0}]],
            "0 slots",
        ),
    ):
        file.write_text(json.dumps(launches))
        done = CliRunner().invoke(main, [str(file), str(tmp_path / "out"), "--sm", "80"])
        assert done.exit_code == 2
        assert words in done.output
    assert not (tmp_path / "out").exists()


def test_registers_are_few_and_none_is_spilled(carried: Path, tmp_path: Path) -> None:
    for name, kernel, compiled in kernels_in(carried):
        for capability, cubin in compiled.cubins.items():
            told = machine_code(cubin, tmp_path, "cuobjdump", "-res-usage")
            numbers = re.search(r"REG:(\d+) STACK:(\d+)", told)
            assert numbers is not None
            usage = Usage(*map(int, numbers.groups()))
            assert usage.stack == 0, (name, kernel, capability)
            most = FEWER.get(kernel, REGISTERS[capability])
            assert usage.registers <= most or not COUNTED, (name, kernel, capability)


def test_keys_and_values_are_read_by_whole_vectors(carried: Path, tmp_path: Path) -> None:
    for name, kernel, compiled in kernels_in(carried):
        if kernel != "attend":
            continue
        launch = LAUNCHES[name]
        # As many bytes as a thread reads at once.
        bits = 8 * launch.vector * (4 if launch.dtype == "float32" else 2)
        code = machine_code(compiled.cubins[90], tmp_path, "nvdisasm", "-c")
        wide = re.findall(r"LDG\.E" + (rf"\.{bits}" if bits > 32 else r"(?![.\w])"), code)
        # Before the loop and in it, keys and values of every repetition.
        assert len(wide) >= 4 * launch.repeats, name
        if launch.group == 1:
            assert bits == 128
