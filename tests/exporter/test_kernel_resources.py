"""Registers and local memory of the compiled kernels, by the tool that comes with Triton: what decides how many run at a time."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from tests.exporter.compiler import run_compiler

SCRIPT = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from exporter.tensorrt.compile import kernels_of
from runtime.plugins.line_attention import LineAttentionLaunch
from runtime.plugins.line_evict import LineEvictLaunch
from runtime.plugins.spatial_decay_step import SpatialDecayStepLaunch

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
tuned = LineAttentionLaunch.tuned
launches = {
    "XL, float16": tuned(2560, 1, 97, 64, "float16", [90]),
    "XL, bfloat16": tuned(2560, 1, 601, 64, "bfloat16", [90]),
    "XL, float32": tuned(2560, 1, 601, 64, "float32", [90]),
    "XL, few rows": tuned(40, 1, 601, 64, "float16", [90]),
    "heads of 128": tuned(2048, 1, 601, 128, "float16", [90]),
    "4 query heads": tuned(512, 4, 601, 128, "float16", [90]),
    "16 query heads of 256, float16": tuned(64, 16, 601, 256, "float16", [90]),
    "16 query heads of 256, float32": tuned(640, 16, 601, 256, "float32", [90]),
    "line end, linear": LineEvictLaunch((601,) * 4, 2560, 24, 1, 20, 2, 0, 0),
    "line end, snapkv": LineEvictLaunch((601,) * 4, 2560, 24, 1, 20, 2, 4, 0),
    "spatial decay": SpatialDecayStepLaunch(2560, 25, 24, 64, 64, "float16"),
}
told = []
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "kernel.cubin"
    for shape, launch in launches.items():
        for name, kernel in kernels_of(launch, [80, 90]).kernels.items():
            for capability, code in kernel.cubins.items():
                file.write_bytes(code)
                said, code = (
                    subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout
                    for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
                )
                numbers = {key: int(re.search(key + r":(\d+)", said)[1]) for key in ("REG", "STACK", "LOCAL")}
                loads = [int(bits or 32) for bits in re.findall(r"LDG\.E(?:\.(64|128))? ", code)]
                told.append({"shape": shape, "kernel": name, "capability": capability, "loads": loads, **numbers})
                if name == "attend":
                    size = 4 if launch.dtype == "float32" else 2
                    told[-1] |= {"vector": 8 * launch.vector * size, "repeats": launch.repeats}
print(json.dumps(told))
"""

REGISTERS = 65536
"""Of a multiprocessor."""

MOST = {"attend": 200, "combine": 100, "line_evict": 96, "spatial_decay_step": 80}
"""Registers a thread on any of the GPUs; above 255 the compiler spills."""


COUNTED = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="older Tritons need more registers"
)


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return json.loads(run_compiler(SCRIPT))


def test_no_kernel_spills(told: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in told} == set(MOST)
    assert not [kernel for kernel in told if kernel["STACK"] or kernel["LOCAL"]]


@COUNTED
def test_registers_are_bounded(told: list[dict[str, Any]]) -> None:
    assert not [kernel for kernel in told if kernel["REG"] > MOST[kernel["kernel"]]]


@COUNTED
def test_sixteen_warps_of_attention_fit_a_multiprocessor_of_sm_90(told: list[dict[str, Any]]) -> None:
    """At LlamaGen-XL's head size, in every type: each has 4 KiB of keys or values on their way."""
    for kernel in told:
        if kernel["kernel"] == "attend" and kernel["capability"] == 90 and re.match("XL", kernel["shape"]):
            # Registers are given to a warp eight a thread at a time.
            of_warp = 32 * (-(-kernel["REG"] // 8) * 8)
            assert REGISTERS // of_warp >= 16, kernel


def test_keys_and_values_are_read_by_whole_vectors(told: list[dict[str, Any]]) -> None:
    """Sixteen bytes a thread at once; less where many query heads share a key."""
    for kernel in told:
        if kernel["kernel"] == "attend":
            # Keys and values, every repetition, before the loop and in it.
            assert kernel["loads"].count(kernel["vector"]) >= 4 * kernel["repeats"], kernel
            assert kernel["vector"] == 128 or re.search("query heads", kernel["shape"])
