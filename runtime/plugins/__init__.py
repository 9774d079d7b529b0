"""Operations that TensorRT runs as plugins: one file each, registered here."""

from __future__ import annotations

from linert.runtime.plugins import contracts
from linert.runtime.plugins.base import Operation
from linert.runtime.plugins.contracts import DOMAIN
from linert.runtime.plugins.line_attention import LineAttention
from linert.runtime.plugins.line_evict import LineEvict
from linert.runtime.plugins.line_window import LineWindowAttention, LineWindowCommit
from linert.runtime.plugins.spatial_decay_step import SpatialDecayStep
from linert.runtime.plugins.spatial_decay_window import SpatialDecayWindow

NAMESPACE, VERSION = DOMAIN, str(contracts.VERSION)
CONTENTS = "linert_contents"
"""The field in which a plan stores a plugin: attributes, launch parameters, kernels."""


OPERATIONS: dict[str, type[Operation]] = {
    operation.name: operation
    for operation in (
        LineAttention,
        LineEvict,
        LineWindowAttention,
        LineWindowCommit,
        SpatialDecayStep,
        SpatialDecayWindow,
    )
}
