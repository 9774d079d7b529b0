"""Export and deploy autoregressive image models with a line-buffer KV cache.

    >>> import linert
    >>> with linert.Generator("bundle") as generator:
    ...     images = generator.generate([3, 7], seed=1)
    >>> images[0].picture().save("three.png")

Importing it imports neither torch nor an inference runtime: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version

    from linert.runtime.backends.options import BackendName, BackendOptions
    from linert.runtime.bundles.bundle import Bundle, open_bundle
    from linert.runtime.bundles.cache_settings import CacheSettings
    from linert.runtime.bundles.manifest import Manifest
    from linert.runtime.bundles.sampling_settings import SamplingSettings
    from linert.runtime.drawing.generator import Generator, Image, PixelDecoder, picture
    from linert.runtime.drawing.samples import Caption, ClassLabel, Condition, Prompt, Sample
    from linert.runtime.errors import (
        BundleError,
        CheckpointError,
        DeviceError,
        ExportError,
        GeometryError,
        LinertError,
        OutputError,
        RequestError,
    )
    from linert.runtime.measuring.metrics import ClassAccuracy, FrechetDistance, Metric

    __version__ = version("linert")

_PLACES = {
    "linert.runtime.backends.options": ("BackendName", "BackendOptions"),
    "linert.runtime.bundles.bundle": ("Bundle", "open_bundle"),
    "linert.runtime.bundles.cache_settings": ("CacheSettings",),
    "linert.runtime.bundles.manifest": ("Manifest",),
    "linert.runtime.bundles.sampling_settings": ("SamplingSettings",),
    "linert.runtime.drawing.generator": ("Generator", "Image", "PixelDecoder", "picture"),
    "linert.runtime.drawing.samples": ("Caption", "ClassLabel", "Condition", "Prompt", "Sample"),
    "linert.runtime.measuring.metrics": ("ClassAccuracy", "FrechetDistance", "Metric"),
    "linert.runtime.errors": (
        "BundleError",
        "CheckpointError",
        "DeviceError",
        "ExportError",
        "GeometryError",
        "LinertError",
        "OutputError",
        "RequestError",
    ),
}
"""Where the public names are defined."""

__all__ = [
    "BackendName",
    "BackendOptions",
    "Bundle",
    "BundleError",
    "CacheSettings",
    "Caption",
    "CheckpointError",
    "ClassAccuracy",
    "ClassLabel",
    "Condition",
    "DeviceError",
    "ExportError",
    "FrechetDistance",
    "Generator",
    "GeometryError",
    "Image",
    "LinertError",
    "Manifest",
    "Metric",
    "OutputError",
    "PixelDecoder",
    "Prompt",
    "RequestError",
    "Sample",
    "SamplingSettings",
    "__version__",
    "open_bundle",
    "picture",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("linert")
    else:
        place = next((place for place, names in _PLACES.items() if name in names), None)
        if place is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
