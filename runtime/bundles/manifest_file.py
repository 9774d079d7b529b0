"""The manifest's file: written in one way, and read strictly. What was changed, contradicts itself or is out of bounds is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from linert.runtime.bundles.cache_settings import faults_of
from linert.runtime.bundles.manifest import (
    ITEM_BYTES,
    SCHEMA,
    SLOT,
    CaptionInput,
    ClassInput,
    Manifest,
    PromptInput,
    StageSpec,
    StateSpec,
    TensorSpec,
    decode_stage,
)
from linert.runtime.bundles.schedule import Groups, mixed_pairs
from linert.runtime.errors import BundleError, GeometryError, RequestError
from linert.runtime.text import brief

MAX_BYTES = 64 << 20
"""Of a manifest's file; the largest that were made have one."""

MOST = {
    "images": 1 << 14,
    "layers": 1 << 12,
    "lines": 1 << 14,
    "tokens a line": 1 << 14,
    "prefix": 1 << 20,
    "vocabulary": 1 << 26,
    "pixels a token": 1 << 10,
    "tensor": 1 << 48,
    "work": 1 << 62,
}
"""Bounds of a manifest's numbers (of ``tensor``: bytes; of ``work``: bytes or operations of a stage), far above every model that there is; arithmetic with what is below is safe."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
"""Of stages, tensors and policies."""

MAX_RANK = 8

FORMATS = frozenset({"fp32", "fp16", "bf16", "int8", "int4"})
"""What weights are stored in."""

METHODS = frozenset({"none", "rtn", "gptq"})
"""How integers are found."""

DRIVEN = {
    "decode": frozenset({"noise", "token", "tokens", "position", "logits"}),
    "decode.g": frozenset({"noise", "order", "group_size", "tokens", "drawn", "newest"}),
    "line_end.replay": frozenset({"replay_slots"}),
    "text_encoder": frozenset({"text_tokens", "text_lengths", "text_features"}),
    "vq_decoder": frozenset({"grid_tokens", "pixels"}),
}
"""Tensors that the loop writes and reads by name."""


def encode(manifest: Manifest) -> bytes:
    """The one byte sequence that stands for ``manifest`` on disk."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def seal(manifest: Manifest) -> Manifest:
    """Return ``manifest`` with its digest filled in."""
    empty = msgspec.structs.replace(manifest, sha256="")
    return msgspec.structs.replace(manifest, sha256=hashlib.sha256(encode(empty)).hexdigest())


def contract(manifest: Manifest) -> str:
    """Digest of everything that the stages were traced for: image, batch, buffers, policies, condition, tensors.

    Every ONNX file carries it, so that a file is never run under a manifest that it was not made for. What a run may choose
    (sampling, what the cache keeps) and what only tells of the export (digests, sources, versions) is not part of it.
    """
    values: dict[str, Any] = msgspec.to_builtins(manifest)
    for name in ("producer", "precision", "sampling", "cache", "files", "sha256"):
        del values[name]
    for part in ("model", "image_decoder"):
        del values[part]["source"]
    for policy in values["policies"].values():
        del policy["usual"]
    values["condition"].pop("encoder", None)
    for stage in values["stages"].values():
        del stage["file"], stage["work"]
    values["activations"] = manifest.precision.activations
    return hashlib.sha256(msgspec.json.encode(values, order="deterministic")).hexdigest()


class _Version(msgspec.Struct):
    schema: int


def decode(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: contents of the file.
        where: the file's name, for messages.

    Raises:
        BundleError: not a manifest, of another schema version, with missing or unknown fields, changed since it was written, with
            numbers that no model has, or contradicting itself.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{where} is not a bundle manifest ({brief(str(error))}); export the bundle again"
        ) from error
    if version != SCHEMA:
        age = "older" if version < SCHEMA else "newer"
        remedy = "export the bundle again" if version < SCHEMA else "upgrade linert"
        raise BundleError(
            f"{where} has schema {version}, {age} than the {SCHEMA} that this linert reads; {remedy}"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        written = encode(manifest)
    except (ValueError, RecursionError, OverflowError) as error:
        raise BundleError(f"{where}: {brief(str(error))}; export the bundle again") from error
    if written != data or seal(manifest) != manifest:
        raise BundleError(f"{where} was changed after it was written; export the bundle again")
    try:
        check(manifest)
    except BundleError as error:
        raise BundleError(f"{where}: {error}; export the bundle again") from error
    return manifest


def check(manifest: Manifest) -> None:
    """Hold a manifest's parts against one another.

    Raises:
        BundleError: a number is out of bounds, or two parts contradict each other; the message names all that do.
    """
    # The second calculates with what the first bounds.
    for find in (_out_of_bounds, _contradictions):
        if faults := list(find(manifest)):
            shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise BundleError(f"the manifest contradicts itself: {shown}")
    try:
        manifest.check_cache(manifest.cache)
    except (RequestError, GeometryError) as error:
        raise BundleError(f"the manifest contradicts itself: {error}") from error


def _out_of_bounds(manifest: Manifest) -> Iterable[str]:
    """Numbers and names that no bundle has."""
    raster = manifest.raster
    numbers = [
        ("images", manifest.images, 1, MOST["images"]),
        ("layers", manifest.model.layers, 1, MOST["layers"]),
        ("parameters", manifest.model.parameters, 0, MOST["tensor"]),
        ("vocab_size", manifest.model.vocab_size, 1, MOST["vocabulary"]),
        ("codebook_size", manifest.image_decoder.codebook_size, 1, MOST["vocabulary"]),
        ("patch", manifest.image_decoder.patch, 1, MOST["pixels a token"]),
        ("lines", raster.lines, 2, MOST["lines"]),
        ("line_width", raster.line_width, 2, MOST["tokens a line"]),
        *[
            ("tokens of a group", size, 1, raster.image_tokens)
            for sizes in (manifest.groups.sizes if manifest.groups else ())
            for size in sizes
        ],
        ("newlines", raster.newlines, 0, 1),
        ("prefix_len", raster.prefix_len, 1, MOST["prefix"]),
        *[("capacity_lines", lines, 1, raster.lines) for lines in manifest.capacity_lines],
        *[("score_window", spec.score_window, 0, raster.line_width) for spec in manifest.policies.values()],
        *[
            (f"{what} of {name}", number, 0, MOST["work"])
            for name, stage in manifest.stages.items()
            for what, number in msgspec.structs.asdict(stage.work).items()
        ],
        *[(f"bytes of {name}", record.bytes, 0, MOST["tensor"]) for name, record in manifest.files.items()],
    ]
    if isinstance(manifest.condition, ClassInput):
        numbers.append(("num_classes", manifest.condition.num_classes, 1, MOST["vocabulary"]))
    if isinstance(manifest.condition, CaptionInput):
        numbers.append(("feature_dim", manifest.condition.feature_dim, 1, MOST["prefix"]))
    if isinstance(manifest.condition, PromptInput):
        ids = (*manifest.condition.first, *manifest.condition.last)
        numbers += [("token id", number, 0, MOST["vocabulary"]) for number in ids]
        if not manifest.condition.first:
            yield "a prompt without a first token"
    for name, number, least, most in numbers:
        if not least <= number <= most:
            yield f"{name} is {number}, not {least} to {most}"
    precision = manifest.precision
    for stored in (
        *(precision.weights, precision.activations, precision.image_decoder),
        *precision.parts.values(),
    ):
        if stored not in FORMATS:
            yield f"a precision of {stored[:40]!r}"
    if precision.method not in METHODS:
        yield f"integers found by {precision.method[:40]!r}"
    names = [*manifest.stages, *manifest.policies, *(spec.name for spec in _tensors(manifest))]
    for stage in manifest.stages.values():
        names += [*stage.updates, *stage.updates.values(), *stage.in_place]
    yield from (f"the name {name[:40]!r}" for name in names if not NAME.fullmatch(name))
    for spec in _tensors(manifest):
        if spec.dtype not in ITEM_BYTES:
            yield f"{spec.name} of dtype {spec.dtype[:40]!r}"
        elif len(spec.shape) > MAX_RANK or min(spec.shape, default=1) < 1 or _bytes_above(spec):
            yield f"{spec.name} of shape {list(spec.shape[:MAX_RANK])}"


def _bytes_above(spec: TensorSpec) -> bool:
    # Sides are checked one by one: the product of huge ones takes long.
    return any(side > MOST["tensor"] for side in spec.shape) or spec.nbytes > MOST["tensor"]


def _tensors(manifest: Manifest) -> Iterable[TensorSpec]:
    yield from manifest.state
    for stage in manifest.stages.values():
        yield from (*stage.inputs, *stage.outputs)


def _contradictions(manifest: Manifest) -> Iterable[str]:
    """Parts that do not belong together, of a manifest within bounds."""
    raster, states = manifest.raster, {spec.name: spec for spec in manifest.state}
    if len(states) != len(manifest.state):
        yield "two states of one name"
    wanted = {"prefill", "admit", "vq_decoder"}
    if (groups := manifest.groups) is None:
        wanted |= {
            decode_stage(window, filtered=filtered)
            for window in manifest.windows
            for filtered in (True, False)
        }
    else:
        wanted |= {width.stage(filtered=filtered) for width in groups.widths for filtered in (True, False)}
        yield from _group_contradictions(groups, manifest)
    if 1 not in manifest.windows or not all(1 <= window <= raster.line_width for window in manifest.windows):
        yield f"windows of {', '.join(map(str, manifest.windows))} positions in lines of {raster.line_width}"
    if manifest.cache is None:
        wanted |= {"line_end"} if groups is None else set()
        if manifest.capacity_lines or manifest.policies:
            yield "capacities or policies of no cache"
    else:
        wanted |= {"line_end.replay", *(f"line_end.{policy}" for policy in manifest.policies)}
        if len(manifest.capacity_lines) != manifest.model.layers:
            yield f"{len(manifest.capacity_lines)} capacities for {manifest.model.layers} layers"
    for policy, policy_spec in manifest.policies.items():
        under = f"what is usual under {policy[:40]!r}"
        yield from (f"{under}: {fault}" for fault in faults_of(policy_spec.usual))
        if policy_spec.usual.get("share_guidance") and not manifest.guided:
            yield f"{under}: share_guidance, and there are no unconditional rows"
    if isinstance(manifest.condition, CaptionInput) and manifest.condition.encoder:
        wanted.add("text_encoder")
    if missing := sorted(wanted - set(manifest.stages)):
        yield f"no stage {', '.join(missing)}"
    for name, stage in manifest.stages.items():
        yield from _stage_contradictions(name, stage, manifest, states)
    tokenizer = "" if isinstance(manifest.condition, ClassInput) else manifest.condition.tokenizer
    if tokenizer and tokenizer not in manifest.files:
        yield f"the tokenizer {tokenizer} is not among the files"
    sequences = manifest.images * manifest.branches
    for state, shape in (
        ("token", (manifest.images,)),
        ("tokens", (manifest.images, raster.image_tokens)),
        ("position", (sequences,)),
    ):
        if state in states and states[state].shape != shape:
            yield f"{state} of shape {states[state].shape} for {manifest.images} images of {raster.image_tokens} tokens"
    if "write_slots" in states and not (
        len(slots := states["write_slots"].shape) == 3
        and (slots[0], slots[1] % sequences, slots[2]) == (manifest.model.layers, 0, raster.line_width)
    ):
        yield f"write_slots of shape {slots} for {manifest.model.layers} layers, {sequences} sequences, {raster.line_width} tokens a line"
    if isinstance(manifest.condition, CaptionInput) and "prefill" in manifest.stages:
        width = (raster.prefix_len, manifest.condition.feature_dim)
        for tensor in manifest.stages["prefill"].inputs:
            if tensor.name == "caption_features" and tensor.shape[1:] != width:
                yield f"caption_features of shape {tensor.shape} for features of {width}"
    held = raster.image_tokens if groups is not None else 2 * raster.line_width
    for name, stage in manifest.stages.items():
        for tensor in stage.inputs:
            if tensor.name == "noise" and (
                tensor.shape[:2] != (manifest.images, held) or len(tensor.shape) != 3
            ):
                yield f"noise of shape {tensor.shape} in {name} for {manifest.images} images, {held} tokens of each"
    for tensor in manifest.stages["vq_decoder"].inputs if "vq_decoder" in manifest.stages else ():
        if tensor.name == "grid_tokens" and tensor.shape[1:] != (raster.image_tokens,):
            yield f"grid_tokens of shape {tensor.shape} for images of {raster.image_tokens} tokens"
    for spec in manifest.state:
        if len(spec.axes) != len(spec.shape):
            yield f"{spec.name} of shape {spec.shape} with axes {', '.join(spec.axes)}"
        elif spec.layer is not None and not 0 <= spec.layer < manifest.model.layers:
            yield f"{spec.name} of layer {spec.layer}; there are {manifest.model.layers}"
        elif spec.layer is not None and len(manifest.capacity_lines) == manifest.model.layers:
            capacity = raster.slots(manifest.capacity_lines[spec.layer])
            if spec.with_slots(capacity) != spec:
                yield f"{spec.name} of shape {spec.shape} in a layer of {capacity} slots"


def _group_contradictions(groups: Groups, manifest: Manifest) -> Iterable[str]:
    """Groups that are none of the image, or that no stage draws."""
    raster = manifest.raster
    if not groups.sizes or not groups.widths:
        yield "no groups, or no stage that draws them"
        return
    if len(set(groups.counts)) != len(groups.sizes):
        yield "two lists of as many groups"
    if (
        manifest.cache is not None
        or raster.prefix_len != 1
        or raster.newlines
        or raster.lines != raster.line_width
    ):
        yield "groups of an image that is drawn line by line"
    for sizes in groups.sizes:
        if min(sizes, default=0) < 1 or sum(sizes) != raster.image_tokens:
            yield f"groups of {sum(sizes)} tokens in an image of {raster.image_tokens}"
    for fed, drawn in sorted(mixed_pairs(groups.sizes)):
        if not any(width.fits(fed, drawn) for width in groups.widths):
            yield f"steps that feed {fed} tokens and draw {drawn}, which no stage does"
    if not 0 <= groups.repulsion <= raster.lines:
        yield f"a repulsion of {groups.repulsion}"
    for spec in manifest.state:
        slots = [side for axis, side in zip(spec.axes, spec.shape, strict=False) if axis == SLOT]
        if slots not in ([], [groups.slots]):
            yield f"{spec.name} of shape {spec.shape} for {groups.slots} slots"


def _stage_contradictions(
    name: str, stage: StageSpec, manifest: Manifest, states: dict[str, StateSpec]
) -> Iterable[str]:
    if stage.file not in manifest.files:
        yield f"stage {name} names {stage.file}, which is not among the files"
    inputs, outputs = ({spec.name: spec for spec in side} for side in (stage.inputs, stage.outputs))
    kinds = [kind for kind in ("decode.g", "decode") if name.startswith(kind)]
    driven = DRIVEN[kinds[0]] if kinds else DRIVEN.get(name, frozenset())
    if missing := sorted(driven - inputs.keys() - outputs.keys()):
        yield f"stage {name} has no tensor {', '.join(missing)}"
    if len(inputs) != len(stage.inputs) or len(outputs) != len(stage.outputs):
        yield f"stage {name} has two tensors of one name"
    for tensor in stage.inputs:
        if tensor.name in states and tensor != states[tensor.name].tensor:
            yield f"stage {name} reads {tensor.name} in another shape or dtype than the state has"
    for output, state in stage.updates.items():
        if output not in outputs or state not in states:
            yield f"stage {name} replaces {state} by {output}: no such tensors"
        elif (outputs[output].shape, outputs[output].dtype) != (states[state].shape, states[state].dtype):
            yield f"stage {name}: {output} has not the shape and dtype of {state}"
    if len(set(stage.updates.values())) != len(stage.updates):
        yield f"stage {name} replaces a state twice"
    if unknown := sorted(set(stage.in_place) - set(stage.updates.values())):
        yield f"stage {name} updates {', '.join(unknown[:3])} in place and does not replace it"
