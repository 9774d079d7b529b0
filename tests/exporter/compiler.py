"""Triton's compiler in a process of its own: in the tests' one kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from tests.conftest import ROOT


def run_compiler(script: str, *arguments: object, environment: Mapping[str, str] = os.environ) -> str:
    """Run a Python script in which kernels can be compiled; returns what it prints."""
    environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout
