"""Time of decode steps by their nodes."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from linert.runtime.bundles.bundle import Bundle
from linert.runtime.drawing.loop import Batch, begin, run_group
from linert.runtime.files.replacement import scratch_folder


@dataclass(frozen=True)
class NodeTime:
    """Milliseconds a step of a node, or of all nodes of a type (``count`` of them)."""

    name: str
    kind: str
    count: int
    ms: float


def profile(
    bundle: Bundle, batch: Batch, *, threads: int, steps: int = 50
) -> tuple[list[NodeTime], list[NodeTime]]:
    """Time of a decode step by node type, and of single nodes, the longest first.

    Of images that are drawn in groups it is that of a mean step; nodes of the same name in stages of different widths count as one.

    Recording costs a few microseconds a node, so that the sum is more than a step takes without.
    """
    from linert.runtime.backends.ort import OrtBackend

    with scratch_folder() as folder:
        backend = OrtBackend(bundle, batch.stages.values(), threads=threads, profile=folder)
        begin(backend, batch)
        if batch.groups:
            for group in batch.groups:
                run_group(backend, batch, group)
            steps = len(batch.groups)
            stages = {batch.group(group) for group in batch.groups}
        else:
            raster, position = bundle.manifest.raster, backend.specs["position"]
            for step in range(steps):
                at = raster.prefix_len + step % raster.line_width
                backend.write("position", np.full(position.shape, at, np.int64))
                backend.run(batch.stages["decode"])
            stages = {batch.stages["decode"]}
        events = [event for stage in stages for event in json.loads(backend.end_profile(stage).read_text())]
    kinds: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    nodes: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind, name = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
            kinds[kind].append((name, event["dur"]))
            nodes[name, kind].append(event["dur"])
    by_kind = [
        NodeTime(kind, kind, len({name for name, _ in times}), sum(t for _, t in times) / steps / 1e3)
        for kind, times in kinds.items()
    ]
    single = [NodeTime(name, kind, 1, sum(times) / steps / 1e3) for (name, kind), times in nodes.items()]

    def longest(times: list[NodeTime]) -> list[NodeTime]:
        return sorted(times, key=lambda time: -time.ms)

    return longest(by_kind), longest(single)
