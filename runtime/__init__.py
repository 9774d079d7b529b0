"""Drives a bundle with numpy and one inference runtime. Importing it never imports torch.

from linert import Generator
images = Generator("bundle").generate([3, 7], seed=1)
images[0].picture().save("three.png")
"""

from __future__ import annotations

from linert.runtime.backends.options import BackendName, BackendOptions
from linert.runtime.drawing.generator import Generator, Image
from linert.runtime.errors import LinertError

__all__ = ["BackendName", "BackendOptions", "Generator", "Image", "LinertError"]
