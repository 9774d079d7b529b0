"""Threads are those that this process may use, not those of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from linert.runtime import machine
from linert.runtime.backends import ort
from linert.runtime.backends.ort import OrtBackend
from linert.runtime.bundles.bundle import open_bundle


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "400000 100000", "a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_the_quota_of_a_control_group_counts(
    files: dict[str, str], quota: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: "1:cpu:/x\n0::/a/b\n" if path == Path("/proc/self/cgroup") else read(path),
    )
    assert machine._quota(root) == quota
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert machine.default_threads() == min(8, max(1, math.ceil(min(quota, 8))))


def test_a_process_that_may_use_fewer_cores_starts_fewer_threads(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(tiny_bundle)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for usable, asked, threads in ((8, 0, 0), (3, 0, 3), (3, 5, 5)):
        monkeypatch.setattr(ort, "default_threads", lambda usable=usable: usable)
        backend = OrtBackend(bundle, ["decode"], threads=asked)
        assert backend._options("decode").intra_op_num_threads == threads
