"""The phases of scripts/gpu_check.py, one file each, and what scripts/gpu_prepare.py makes for them beforehand."""
