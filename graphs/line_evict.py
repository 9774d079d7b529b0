"""The LineEvict operation: at a line's end, choose the KV slots that the next line overwrites, by one of the kinds of importance
that its plugin computes.

Its meaning is :class:`linert.graphs.line_buffer.LineEnd`; a traced line end becomes the ONNX model-local function of that name, which
runtimes without the plugin take.
"""

from __future__ import annotations

from enum import IntEnum


class Importance(IntEnum):
    """What makes a slot worth keeping."""

    ATTENTION_PER_QUERY = 0
    """Attention received, divided by the queries of the line that could see it."""

    ATTENTION = 1
    POSITION = 2
    NOTHING = 3

    POOLED_ATTENTION = 4
    """Attention averaged over five neighbours in the raster."""
