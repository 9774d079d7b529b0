"""What clients of images send and get: OpenAI's image generation, and a few fields beyond it."""

from __future__ import annotations

import base64
import io
import re
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

import msgspec
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from linert.runtime.bundles.manifest import ClassInput, Manifest
from linert.runtime.bundles.sampling_settings import SamplingSettings
from linert.runtime.drawing.generator import picture
from linert.runtime.drawing.samples import ClassLabel, Condition, Prompt, Sample
from linert.runtime.errors import LinertError

MOST_SEED = 2**63 - 1
MOST_PARTIAL_IMAGES = 64

Format = Literal["png", "jpeg", "webp"]


class ApiError(LinertError):
    """What a client is told: a status, a message, and which field is at fault."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param)


class ImagesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/images/generations``.

    OpenAI's: ``prompt``, ``model``, ``n``, ``size``, ``response_format``, ``output_format``, ``output_compression``, ``stream``,
    ``partial_images`` and ``user``, which is not used. Beyond it: ``seed`` of the first image, the next has one more; ``class_id`` of a
    model of classes; ``negative_prompt`` and how tokens are drawn; ``eviction_map`` to be shown what the cache kept.
    """

    prompt: str | None = None
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Format | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    seed: int | None = None
    class_id: int | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    steps: int | None = None
    eviction_map: bool | None = None

    def check(self, most_images: int) -> None:
        """Raise :class:`ApiError` for numbers out of range, by the field's name."""
        bounds = {
            "n": (1, most_images),
            "output_compression": (0, 100),
            "partial_images": (0, MOST_PARTIAL_IMAGES),
            "seed": (0, MOST_SEED),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise bad(f"{name} is {value}: give {least} to {most}", name)
        if self.stream and (self.n or 1) > 1:
            raise bad("stream draws one image: leave n out, or ask for each by itself", "n")
        if self.partial_images and not self.stream:
            raise bad("partial_images are for stream: true", "partial_images")

    def condition(self, manifest: Manifest) -> Condition:
        """What is to be drawn by a bundle of ``manifest``."""
        if isinstance(manifest.condition, ClassInput):
            if self.negative_prompt is not None:
                raise bad("the model has classes and reads no prompts", "negative_prompt")
            if self.class_id is not None:
                return ClassLabel(self.class_id)
            if self.prompt is None or not re.fullmatch(r"\s*\d{1,9}\s*", self.prompt):
                raise bad("the model has classes: give class_id, or its number as the prompt", "class_id")
            return ClassLabel(int(self.prompt))
        if self.class_id is not None:
            raise bad("the model reads prompts and has no classes", "class_id")
        if not self.prompt or not self.prompt.strip():
            raise bad("say what to draw", "prompt")
        return Prompt(self.prompt, self.negative_prompt)

    def samples(self, manifest: Manifest) -> list[Sample]:
        """The images that are asked for."""
        condition = self.condition(manifest)
        # JavaScript's numbers are exact up to here.
        first = secrets.randbelow(2**53) if self.seed is None else self.seed
        return [Sample(condition, (first + number) % (MOST_SEED + 1)) for number in range(self.n or 1)]

    def sampling(self, usual: SamplingSettings) -> SamplingSettings:
        """How tokens are drawn: what is asked for, else as ``usual``."""
        names = ("guidance", "temperature", "top_k", "top_p", "steps")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(usual, **given)

    @property
    def format(self) -> Format:
        return self.output_format or "png"

    def encoded(self, pixels: NDArray[np.float32]) -> str:
        """``pixels [3, H, W]`` as base64 of a file of the format that is asked for."""
        return self.file(picture(pixels))

    def file(self, image: PIL.Image.Image) -> str:
        """``image`` as base64 of a file of that format."""
        buffer = io.BytesIO()
        quality = 100 if self.output_compression is None else self.output_compression
        options: Mapping[str, Any] = {} if self.format == "png" else {"quality": quality}
        image.save(buffer, self.format, **options)
        return base64.b64encode(buffer.getvalue()).decode()


def parse(body: bytes) -> ImagesRequest:
    """The request in ``body``.

    Raises:
        ApiError: it is no JSON object, or has a field that is not known, or of another type; the message names it.
    """
    try:
        return msgspec.json.decode(body, type=ImagesRequest)
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
        raise bad(str(error), next(filter(None, found.groups()), None) if found else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"the body is no JSON: {error}") from error


def usage(manifest: Manifest, prompt_tokens: int, images: int) -> dict[str, Any]:
    """OpenAI's account of tokens."""
    drawn = images * manifest.raster.image_tokens
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
        "output_tokens": drawn,
        "total_tokens": prompt_tokens + drawn,
    }
