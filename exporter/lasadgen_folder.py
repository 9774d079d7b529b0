"""The container of a LASADGen: a folder of ``model.safetensors``, with the module's parameter names, and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from linert.graphs.families.lasadgen import LASADGenConfig
from linert.runtime.files.atomic_files import atomic_file, make_folder


def write_lasadgen(tensors: Mapping[str, Tensor], config: LASADGenConfig, folder: Path) -> None:
    """Write a checkpoint; what is in ``folder`` under its names is replaced, each file in one step.

    Args:
        tensors: a ``state_dict``, of any float dtype.
        config: of the model that it belongs to.
    """
    make_folder(folder)
    with atomic_file(folder / "model.safetensors") as file:
        # It is streamed to the file's name and never whole in memory.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.name)
    with atomic_file(folder / "config.json") as file:
        file.write(json.dumps(config.settings(), indent=1).encode() + b"\n")
