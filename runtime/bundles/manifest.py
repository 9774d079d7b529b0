"""The manifest: the contract between the exporter and every runtime. Decoded strictly; nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.raster import Raster
from linert.runtime.bundles.sampling_settings import GuidanceSchedule, SamplingSettings
from linert.runtime.bundles.schedule import Groups, Lines, Schedule
from linert.runtime.errors import RequestError

SCHEMA = 12
MANIFEST_NAME = "manifest.json"
CONTRACT_KEY = "linert.contract"
"""Of the entry in an ONNX file's metadata that holds :func:`linert.runtime.bundles.manifest_file.contract`."""

SLOT = "slot"
"""The axis of a state that counts the slots of a layer."""

SLOT_POSITIONS = "slot_pos"
"""Kind of the state that says which position every slot holds, -1 where it is empty."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of the manifest."""


class TensorSpec(Record, frozen=True):
    """Name, dtype (numpy's name) and static shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class StateSpec(TensorSpec, frozen=True, kw_only=True):
    """A tensor that persists between decode steps.

    ``kind``: what it is. ``layer``: whose; None where it belongs to all. ``axes``: what each side counts; a side of ``slot`` is as long as
    the layer's buffer has slots.
    """

    kind: str
    layer: int | None
    axes: tuple[str, ...]

    @property
    def tensor(self) -> TensorSpec:
        """The same as an input or output of a stage."""
        return TensorSpec(self.name, self.dtype, self.shape)

    def with_slots(self, slots: int) -> StateSpec:
        """The same in a layer of so many slots."""
        sides = (slots if axis == SLOT else side for axis, side in zip(self.axes, self.shape, strict=True))
        return msgspec.structs.replace(self, shape=tuple(sides))


class Work(Record, frozen=True):
    """What one run of a stage reads and computes: bytes of weights and of state, multiply-accumulates."""

    weight_bytes: int
    state_bytes: int
    macs: int


class StageSpec(Record, frozen=True):
    """One ONNX file and how it is bound.

    ``updates`` maps an output to the state that it replaces; the states in ``in_place`` may share memory with
    their outputs.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    updates: dict[str, str]
    in_place: tuple[str, ...]
    work: Work


class Source(Record, frozen=True):
    """A checkpoint that went into the bundle. ``path`` is where it was; only the digest binds."""

    path: str
    sha256: str
    bytes: int
    weights: str


class Model(Record, frozen=True):
    """The transformer: family, its configuration, and the checkpoint."""

    family: str
    config: dict[str, Any]
    parameters: int
    vocab_size: int
    layers: int
    source: Source


class ClassInput(Record, frozen=True, tag="class"):
    """The model draws classes."""

    num_classes: int

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.num_classes} classes"


class PromptInput(Record, frozen=True, tag="prompt"):
    """The model draws what prompts say: ids, the tokens of ``template`` with the prompt in place of ``{prompt}``, ids.

    ``tokenizer``: a file of the bundle. ``stripped``: white space around the prompt goes.
    """

    tokenizer: str
    first: tuple[int, ...]
    template: str
    last: tuple[int, ...]
    stripped: bool

    @property
    def text(self) -> str:
        return f"prompts, {self.template!r}"


class CaptionInput(Record, frozen=True, tag="caption"):
    """The model draws what features of captions say, vectors of ``feature_dim``.

    ``tokenizer``: a file of the bundle, where it has a stage ``text_encoder`` that makes features of text; else empty.
    ``encoder``: the checkpoint of that stage.
    """

    feature_dim: int
    tokenizer: str = ""
    encoder: Source | None = None

    @property
    def text(self) -> str:
        what = "prompts, by its text encoder, or " if self.encoder else ""
        return f"{what}features of captions, {self.feature_dim} wide"


class ImageDecoder(Record, frozen=True):
    """The VQ decoder. ``patch``: pixels along the side of a token."""

    config: dict[str, Any]
    patch: int
    codebook_size: int
    source: Source


class PolicySpec(Record, frozen=True):
    """A cache policy that the bundle holds.

    ``score_window``: decode's input of that name. ``usual``: settings of the cache in which its runs differ from the bundle's
    ``cache`` unless told otherwise, before they are cut to what a run's budget holds.
    """

    score_window: int
    usual: dict[str, bool | int | float | str]


class PrecisionSpec(Record, frozen=True):
    """What weights are stored in (``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``) and what is computed in.

    ``parts``: exceptions by part of the transformer (``embedding``, ``output``, a layer's number). ``block``: most inputs
    that share a scale in int4. ``method``: how integers were found (``none`` where there are none).
    """

    weights: str
    activations: str
    parts: dict[str, str]
    block: int
    method: str
    image_decoder: str

    @property
    def text(self) -> str:
        """For people: ``int4 (output int8), activations fp32``."""
        kept = ", ".join(f"{part} {name}" for part, name in self.parts.items())
        method = "" if self.method == "none" else f", {self.method}"
        return (
            f"{self.weights}{f' ({kept})' if kept else ''}, activations {self.activations}{method}; "
            f"image decoder {self.image_decoder}"
        )


class FileRecord(Record, frozen=True):
    sha256: str
    bytes: int


def decode_stage(window: int, *, filtered: bool) -> str:
    """Name of the stage that decodes a window of so many positions, with or without top-k and top-p."""
    name = "decode" if window == 1 else f"decode.w{window}"
    return name if filtered else f"{name}.unfiltered"


class Manifest(Record, frozen=True):
    """Everything that a runtime has to know about a bundle.

    ``sha256`` is the digest of the manifest with this field empty. As ``files`` holds the digest of every
    file, it names the bundle. ``condition``: what it is drawn of. ``schedule``: in which order its tokens are drawn. ``capacity_lines``:
    lines of each layer's buffer. ``cache``: what a run keeps of them unless it says otherwise.
    A model whose state is of one size has no cache: there are no capacities and no policies, and one ``line_end``, if there are lines.
    """

    schema: int
    producer: dict[str, str]
    precision: PrecisionSpec
    model: Model
    condition: ClassInput | PromptInput | CaptionInput
    image_decoder: ImageDecoder
    raster: Raster
    schedule: Schedule
    images: int
    guided: bool
    capacity_lines: tuple[int, ...]
    policies: dict[str, PolicySpec]
    cache: CacheSettings | None
    sampling: SamplingSettings
    state: tuple[StateSpec, ...]
    stages: dict[str, StageSpec]
    files: dict[str, FileRecord]
    sha256: str = ""

    @property
    def size(self) -> str:
        """Width and height of the images in pixels, as in ``512x768``."""
        return self.raster.size(self.image_decoder.patch)

    @property
    def state_bytes(self) -> int:
        """Exact size of everything that persists between decode steps."""
        return sum(spec.nbytes for spec in self.state)

    def state_bytes_at(self, lines: Sequence[int]) -> int:
        """Exact size of the same state in a bundle whose layers have buffers of so many ``lines``."""
        return sum(spec.nbytes for spec in self.state_at(lines))

    def state_at(self, lines: Sequence[int]) -> tuple[StateSpec, ...]:
        """The state of a bundle whose layers have buffers of so many ``lines``."""
        if self.cache is None:
            return self.state
        return tuple(
            spec if spec.layer is None else spec.with_slots(self.raster.slots(lines[spec.layer]))
            for spec in self.state
        )

    def states_of(self, kind: str) -> list[StateSpec]:
        """Every layer's state of a kind, in the order of the layers; none where the model has no such state."""
        return [spec for spec in self.state if spec.kind == kind]

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Of how many tokens of an image the noise is held at once, and how many numbers the draw of one takes."""
        decode = next(stage for name, stage in self.stages.items() if name.startswith("decode"))
        [table] = [tensor for tensor in decode.inputs if tensor.name == "noise"]
        _, held, size = table.shape
        return held, size

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that a decode step may take of a raster; 1 alone where images are drawn in groups."""
        return self.schedule.windows if isinstance(self.schedule, Lines) else (1,)

    @property
    def groups(self) -> Groups | None:
        """How images are drawn in groups; None where they are drawn line by line."""
        return self.schedule if isinstance(self.schedule, Groups) else None

    def parts(self, sampling: SamplingSettings) -> int:
        """In how many parts an image is drawn: its lines, or its groups."""
        return self.raster.lines if self.groups is None else len(self.groups.sizes_in(sampling.steps))

    def state_spec(self, name: str) -> StateSpec:
        """The state tensor of that name."""
        return next(spec for spec in self.state if spec.name == name)

    @property
    def branches(self) -> int:
        """Rows an image: 2 with an unconditional one."""
        return 2 if self.guided else 1

    def require_cache(self, what: str, policy: str | None = None) -> CacheSettings:
        """The default settings of the cache; with a ``policy`` what is usual under it, before a budget cuts it to what it holds.

        Raises:
            RequestError: there is none; the message says that ``what`` needs one.
        """
        if self.cache is None:
            if self.groups is None:
                raise RequestError(f"{what}: a {self.model.family} bundle has no KV cache; leave that out")
            raise RequestError(
                f"{what}: the bundle evicts nothing: its layers keep every token, each in a slot of its own; leave that out"
            )
        if policy not in self.policies:
            return self.cache
        return msgspec.convert(msgspec.to_builtins(self.cache) | self.policies[policy].usual, CacheSettings)

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """Raise :class:`RequestError` for settings that this bundle cannot draw with."""
        faults = sampling.faults(guided=self.guided)
        if self.groups is None:
            if sampling.steps:
                faults.append("steps: the bundle draws line by line, a token a step; leave that out")
            if sampling.guidance_schedule != GuidanceSchedule.CONSTANT:
                faults.append(
                    f"guidance_schedule {sampling.guidance_schedule}: the bundle draws line by line, by one scale"
                )
        if faults:
            raise RequestError("; ".join(faults))
        if self.groups is not None:
            self.groups.sizes_in(sampling.steps)

    def check_window(self, window: int) -> None:
        """Raise :class:`RequestError` for a window that this bundle has no stage for."""
        if window != 1 and self.groups is not None:
            raise RequestError(
                f"a window of {window} positions: the bundle draws in groups of its own; leave --window out"
            )
        if window not in self.windows:
            widths = ", ".join(map(str, self.windows))
            raise RequestError(
                f"the bundle has no window of {window} positions, only {widths}: export it with --window "
                f"{','.join(map(str, sorted({*self.windows, max(1, window)})))}"
            )

    def check_cache(self, cache: CacheSettings | None, *, replayed: bool = False) -> None:
        """Raise :class:`RequestError` or :class:`GeometryError` for settings that this bundle cannot run with.

        A ``replayed`` run asks no policy: the bundle need not hold it.
        """
        if cache is None:
            if self.cache is not None:
                raise RequestError("the bundle has a KV cache, for which there are no settings")
            return
        self.require_cache("cache settings")
        if cache.policy not in self.policies and not replayed:
            policies = ", ".join(self.policies)
            raise RequestError(
                f"the bundle holds no policy {cache.policy}, only {policies}: export it with --policy "
                f"{','.join([*self.policies, cache.policy])}"
            )
        if cache.share_guidance and not self.guided:
            raise RequestError(
                "share_guidance needs unconditional rows and the bundle was exported without: "
                "export it with --guidance above 1"
            )
        cache.check(self.raster, self.capacity_lines)
