"""Bundles that differ from one in batch, policy, budget, precision or grid, to be measured beside each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import msgspec
import torch

from linert.exporter.bundle_export import export_bundle
from linert.exporter.bundle_request import BundleRequest, raster_of
from linert.exporter.cache_wishes import difference, usual_settings
from linert.exporter.calibration import with_integer_decoder
from linert.exporter.models import LoadedImageDecoder, LoadedTransformer
from linert.exporter.precision import Method, Precision
from linert.exporter.sources import precision_settings
from linert.graphs.policies import POLICIES
from linert.runtime.bundles.bundle import Bundle
from linert.runtime.bundles.cache_settings import FULL
from linert.runtime.drawing.cache_request import CacheRequest, budget_lines
from linert.runtime.errors import RequestError

AXES = ("batch", "policy", "budget", "precision", "grid")


@dataclass(frozen=True)
class SweepCell:
    """One combination; ``labels`` are its values along the axes swept. ``policy``: None where there is no cache."""

    labels: Mapping[str, str]
    batch: int
    policy: str | None
    budget: str | None
    precision: Precision
    grid: int


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``["batch=1,8", "precision=fp32,int8"]`` as axes and their values.

    Raises:
        RequestError: no such axis, one twice, or no values.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        axis, _, values = text.partition("=")
        listed = tuple(value.strip() for value in values.split(",") if value.strip())
        if axis not in AXES or axis in axes or not listed:
            raise RequestError(
                f"--axis {text}: say AXIS=VALUE,VALUE with each of {', '.join(AXES)} at most once"
            )
        axes[axis] = listed
    return axes


def cells(bundle: Bundle, axes: Mapping[str, Sequence[str]]) -> list[SweepCell]:
    """Every combination of the axes' values; what is not swept is the bundle's.

    Raises:
        RequestError: a value that its axis does not know.
    """
    manifest = bundle.manifest
    combinations = []
    for values in itertools.product(*axes.values()):
        labels = dict(zip(axes, values, strict=True))
        policy = labels.get("policy", manifest.cache.policy if manifest.cache else None)
        precision = labels.get("precision", manifest.precision.weights)
        for axis in ("policy", "budget"):
            if axis in labels:
                manifest.require_cache(f"--axis {axis}")
        if "grid" in labels and manifest.groups is not None:
            raise RequestError(
                "--axis grid: the bundle draws the image that its checkpoint was trained for; leave that out"
            )
        if policy is not None and policy not in POLICIES:
            raise RequestError(f"no policy {policy}; there are {', '.join(POLICIES)}")
        if precision not in list(Precision):
            raise RequestError(f"no precision {precision}; there are {', '.join(Precision)}")
        numbers = {axis: labels[axis] for axis in ("batch", "grid") if axis in labels}
        if wrong := [f"{axis} {text}" for axis, text in numbers.items() if not text.isdecimal()]:
            raise RequestError(f"{', '.join(wrong)}: not a number")
        combinations.append(
            SweepCell(
                labels,
                int(labels.get("batch", manifest.images)),
                policy,
                labels.get("budget"),
                Precision(precision),
                int(labels.get("grid", manifest.raster.line_width)),
            )
        )
    return combinations


def export_cells(
    bundle: Bundle,
    wanted: Sequence[SweepCell],
    folder: Path,
    loaded: Mapping[int, tuple[LoadedTransformer, LoadedImageDecoder]],
) -> Iterator[Path]:
    """Export a bundle for every cell into ``folder``, with just the buffer that its budget needs.

    Integers are rounded to the nearest: how they are found does not change how fast they are.

    Args:
        loaded: the checkpoints by the cells' grids.
    """
    for number, cell in enumerate(wanted):
        request = cell_request(bundle, cell, *loaded[cell.grid])
        yield export_bundle(request, folder / str(number), report=lambda line: None)


def cell_request(
    bundle: Bundle, cell: SweepCell, transformer: LoadedTransformer, image_decoder: LoadedImageDecoder
) -> BundleRequest:
    """The request of a cell's bundle. A budget that is not swept is the bundle's share of the lines."""
    manifest, config = bundle.manifest, transformer.config
    raster = raster_of(config)
    cache = None
    if manifest.cache is not None:
        defaults = manifest.require_cache("the sweep", cell.policy)
        default = defaults.policy
        if cell.policy is not None and cell.policy not in manifest.policies and default in POLICIES:
            others = usual_settings(default, guided=manifest.guided)
            usual = difference(cell.policy, others, CacheRequest(), guided=manifest.guided)
            defaults = msgspec.structs.replace(defaults, **usual)
        share = Fraction(max(manifest.cache.budget_lines), manifest.raster.lines)
        everything = cell.policy == FULL or (cell.budget is None and share == 1)
        kept = raster.lines if everything else budget_lines(cell.budget or str(share), raster.lines)
        cache = CacheRequest(policy=cell.policy, budget_lines=kept).settle(
            raster, (raster.lines,) * config.layers, defaults
        )
    precision = replace(precision_settings(manifest.precision), method=Method.RTN)
    if cell.precision is not precision.weights:
        precision = replace(precision, weights=cell.precision, parts={}, image_decoder=None)
    # Any tokens: what the activations span does not change how fast they are.
    tokens = torch.randint(config.vocab_size, (1, config.image_tokens))
    precision = with_integer_decoder(precision, image_decoder, tokens, raster)
    return BundleRequest(
        transformer=transformer,
        image_decoder=image_decoder,
        policies=(cache.policy,) if cache else (),
        capacity_lines=cache.budget_lines if cache else (),
        cache=cache,
        images=cell.batch,
        schedule=manifest.schedule,
        sampling=manifest.sampling,
        precision=precision,
    )
