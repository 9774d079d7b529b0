"""Drives a bundle with numpy and one inference runtime. Importing it never imports torch.

from runtime import Generator
images = Generator("bundle").generate([3, 7], seed=1)
images[0].picture().save("three.png")
"""

from __future__ import annotations

from runtime.backends import BackendName, BackendOptions
from runtime.errors import LinertError
from runtime.generator import Generator, Image

__all__ = ["BackendName", "BackendOptions", "Generator", "Image", "LinertError"]
