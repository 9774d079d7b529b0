"""The container of a LASADGen: a folder of ``model.safetensors``, with the module's parameter names, and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from graphs.families.lasadgen import LASADGenConfig


def write_lasadgen(tensors: Mapping[str, Tensor], config: LASADGenConfig, folder: Path) -> None:
    """Write a checkpoint; what is in ``folder`` under its names is replaced.

    Args:
        tensors: a ``state_dict``, of any float dtype.
        config: of the model that it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.settings(), indent=1) + "\n")
