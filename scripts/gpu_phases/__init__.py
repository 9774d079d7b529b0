"""The phases of scripts/gpu_check.py, one file each, and what scripts/gpu_prepare.py makes for them beforehand."""

import sys
from pathlib import Path

# The package need not be installed.
sys.path.insert(0, str(Path(__file__).parents[2]))
