"""Refuse logits, scores or pixels that are NaN or infinite before they are compared or measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from linert.runtime.errors import BundleError, CheckpointError


def require_finite(values: NDArray[Any], what: str, error: type[BundleError | CheckpointError]) -> None:
    """Raise ``error`` if some of ``values [rows, ...]``, which the message calls ``what``, are NaN or infinite.

    A :class:`CheckpointError` blames the weights, a :class:`BundleError` also the precision that they were exported in.
    """
    finite = np.isfinite(values)
    if finite.all():
        return
    cause = "a weight of the checkpoint is not finite, or so large that what it computes is not"
    remedy = "export from a sound checkpoint"
    if error is BundleError:
        cause += ", or the bundle's precision cannot hold it"
        remedy += ", or with --activations fp32 and wider weights"
    raise error(
        f"{what} are not finite: {finite.size - finite.sum():,} of {finite.size:,} are NaN or infinite, the first in row "
        f"{np.argwhere(~finite)[0][0]}; {cause}: {remedy}"
    )
