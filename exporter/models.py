"""Checkpoints as models: configuration, tensors and where they came from."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from exporter.checkpoint import check_tensors, load_tensors, shapes_of
from graphs.families import llamagen, vq
from runtime.bundle import file_sha256
from runtime.errors import CheckpointError
from runtime.manifest import Source

Config = TypeVar("Config", llamagen.LlamaGenConfig, vq.VQConfig)
ModelT = TypeVar("ModelT", bound=nn.Module)

FILE_NAME_SIDE = re.compile(r"_(256|384|512)(?=[._]|$)")


@dataclass(frozen=True)
class Loaded(Generic[Config, ModelT]):
    """A checkpoint's model: ``tensors`` are exactly what the model needs, memory-mapped where possible."""

    config: Config
    tensors: Mapping[str, Tensor]
    path: Path
    part: str
    build: Callable[[Config], ModelT]

    def hollow(self, dtype: torch.dtype = torch.float32) -> ModelT:
        """The module for tracing: parameters have shapes, ``dtype``, and no memory that was ever touched."""
        with torch.device("meta"):
            model = self.build(self.config)
        empty = {name: torch.empty(tuple(t.shape), dtype=dtype) for name, t in self.tensors.items()}
        model.load_state_dict(empty, strict=True, assign=True)
        return model.eval()

    def eager(self) -> ModelT:
        """The module with its weights, in float32."""
        with torch.device("meta"):
            model = self.build(self.config)
        model.load_state_dict({name: t.float() for name, t in self.tensors.items()}, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    @functools.cached_property
    def source(self) -> Source:
        """Digest and origin, for the manifest. Reads the whole file, once."""
        return Source(
            path=str(self.path.resolve()),
            sha256=file_sha256(self.path),
            bytes=self.path.stat().st_size,
            weights=self.part,
        )


LoadedTransformer = Loaded[llamagen.LlamaGenConfig, llamagen.LlamaGen]
LoadedImageDecoder = Loaded[vq.VQConfig, vq.VQModel]


def load_image_decoder(path: Path) -> LoadedImageDecoder:
    """Load a VQ checkpoint; its encoder is left in the file.

    Raises:
        CheckpointError: unreadable, or not a VQ tokenizer of this architecture.
    """
    tensors, part = load_tensors(path)
    shapes = shapes_of(tensors)
    try:
        config = vq.infer_config(shapes)
    except (KeyError, ValueError) as error:
        raise _not_a(path, "a VQ tokenizer", shapes, error) from error
    expected = config.tensor_shapes()
    check_tensors(
        path,
        tensors,
        expected,
        what=f"a VQ tokenizer ({config})",
        ignored=vq.IGNORED_KEYS,
        ignored_prefixes=vq.ENCODER_PREFIXES,
    )
    return Loaded(config, {n: tensors[n] for n in expected}, path, part, vq.VQModel)


def load_transformer(
    path: Path, *, patch: int, grid: int | None, heads: int | None, ema: bool = False
) -> LoadedTransformer:
    """Load a class-conditional LlamaGen checkpoint.

    Args:
        patch: pixels along the side of a token, to read the grid from a ``_256/_384/_512`` file name.
        grid: tokens in an image row, or None to take it from the file name.
        heads: attention heads, or None for the published sizes.
        ema: take the moving average of a training file.

    Raises:
        CheckpointError: unreadable, not a LlamaGen model, or grid or heads cannot be known.
    """
    tensors, part = load_tensors(path, ema=ema)
    shapes = shapes_of(tensors)
    side = grid if grid is not None else _grid_of_name(path, patch)
    try:
        config = llamagen.infer_config(shapes, grid=side, heads=heads)
    except KeyError as error:
        raise _not_a(path, "a LlamaGen transformer", shapes, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.caption_dim:
        raise CheckpointError(
            f"{path} is a text-conditional LlamaGen; only class-conditional ones can be exported"
        )
    expected = config.tensor_shapes()
    check_tensors(
        path,
        tensors,
        expected,
        what=f"a class-conditional LlamaGen of {config.layers} layers of width {config.dim}",
        ignored=llamagen.IGNORED_KEYS,
    )
    return Loaded(config, {n: tensors[n] for n in expected}, path, part, llamagen.LlamaGen)


def _grid_of_name(path: Path, patch: int) -> int:
    match = FILE_NAME_SIDE.search(path.name)
    if match is None:
        raise CheckpointError(
            f"{path}: the checkpoint does not hold the size of its image, and the file name has no "
            "_256, _384 or _512: give the tokens in an image row with --grid (16, 24, 32, ...)"
        )
    return int(match.group(1)) // patch


def _not_a(path: Path, what: str, shapes: Mapping[str, tuple[int, ...]], error: Exception) -> CheckpointError:
    if isinstance(error, KeyError):
        names = sorted(shapes)
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return CheckpointError(f"{path} is not {what}: it has no tensor {error.args[0]} (it has {shown})")
    return CheckpointError(f"{path} is not {what}: {error}")
