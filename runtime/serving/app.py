"""The server's app: OpenAI's image generation, health, metrics, and a page, over the engines of some bundles."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import msgspec
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from linert.runtime.bundles.manifest import ClassInput
from linert.runtime.drawing.conditions import PromptConditioner
from linert.runtime.drawing.eviction_map import MapKind, draw_map
from linert.runtime.drawing.generator import drawn_pixels
from linert.runtime.drawing.samples import Prompt
from linert.runtime.errors import LinertError, RequestError
from linert.runtime.serving.api import ApiError, ImagesRequest, bad, parse, usage
from linert.runtime.serving.engine import Engine, EngineClosedError, QueueFullError
from linert.runtime.serving.handle import Cancelled, Done, Event, Failed, Handle, PartDrawn
from linert.runtime.serving.metrics import Metrics, rendered
from linert.runtime.serving.models import Model, Models

LOG = logging.getLogger("linert.serve")
LOG_FORMAT = "%(asctime)s %(name)s %(message)s"

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """``images``: of a request. ``body``: bytes. ``seconds``: that a request may take. ``prompts``: whether they are logged."""

    images: int = 10
    body: int = 1 << 16
    seconds: float = 300.0
    prompts: bool = False


@dataclass
class Server:
    """The endpoints, over ``models``.

    ``keys``: :func:`key_digest` of those that clients may have; without any, nobody needs one. ``beside``: adds the metrics of other
    servers to this one's.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
    keys: Sequence[bytes] = ()
    draining: bool = False
    beside: Callable[[list[Metric]], Awaitable[list[Metric]]] | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models)

    def app(self) -> Starlette:
        """The app; when it starts a warm-up image is drawn by every engine that has drawn none, beside whatever is asked for."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            warming = asyncio.create_task(self._warm_up())
            yield
            warming.cancel()

        routes = [
            Route("/v1/images/generations", self._guarded(self.generations), methods=["POST"]),
            Route("/v1/models", self._guarded(self.list_models)),
            Route("/v1/models/{model}", self._guarded(self.one_model)),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/metrics", self.measured),
            Route("/", self.page),
        ]
        return Starlette(
            routes=routes, lifespan=lifespan, exception_handlers={404: not_found, 405: not_found}
        )

    async def _warm_up(self) -> None:
        try:
            if not self.models.ready:
                await run_in_threadpool(self.models.warm_up)
        except LinertError:
            # What failed is told by /health/ready.
            LOG.exception("no warm-up image")
        else:
            LOG.info("ready")

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """``endpoint`` for those who have a key; what goes wrong is told as OpenAI does."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except ApiError as error:
                return failure(error)
            except ClientDisconnect:
                # Nobody reads it.
                return Response(status_code=499)
            except Exception:
                LOG.exception("unexpected error")
                return failure(
                    ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "unexpected error: see the server's log")
                )

        return guarded

    def _check_key(self, request: Request) -> None:
        if not self.keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = key_digest(key.strip())
        # All are compared, and digests are equally long: how long it takes tells nothing.
        known = [hmac.compare_digest(digest, other) for other in self.keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "no valid API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    async def live(self, request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def ready(self, request: Request) -> Response:
        if self.models.ready and not self.draining:
            return PlainTextResponse("ready\n")
        errors = [
            f"{model.name}: {engine.error}" for model, _, engine in self.models.engines() if engine.error
        ]
        return PlainTextResponse("\n".join(errors or ["not ready"]) + "\n", HTTPStatus.SERVICE_UNAVAILABLE)

    async def measured(self, request: Request) -> Response:
        families = await run_in_threadpool(self.metrics.families)
        if self.beside is not None:
            families = await self.beside(families)
        content, kind = await run_in_threadpool(rendered, families)
        return Response(content, media_type=kind)

    async def page(self, request: Request) -> Response:
        text = files("linert.runtime.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def list_models(self, request: Request) -> Response:
        listed = [described(model) for model in self.models.by_name.values()]
        return answer({"object": "list", "data": listed})

    async def one_model(self, request: Request) -> Response:
        return answer(described(self.models.named(request.path_params["model"])))

    async def generations(self, request: Request) -> Response:
        if self.draining:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping", retry_after=1)
        asked = parse(await self._body(request))
        asked.check(self.limits.images)
        model = self.models.named(asked.model)
        size, engine = model.engine(asked.size)
        if self.limits.prompts:
            LOG.info("%s draws %r", model.name, asked.prompt if asked.class_id is None else asked.class_id)
        handles = await run_in_threadpool(self._submitted, asked, model, engine)
        for handle in handles:
            self.metrics.watch(model, size, handle)
        told = {"created": int(time.time()), "size": size, "output_format": asked.format}
        told |= {"background": "opaque", "quality": "auto"}
        # Not before the handles are: the prompt was checked with them.
        told["usage"] = usage(engine.manifest, prompt_tokens(engine, handles), len(handles))
        if asked.stream:
            events = self._streamed(asked, engine, handles[0], told)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        images = await self._images(request, handles)
        data = [await run_in_threadpool(finished, asked, engine, done) for done in images]
        return answer({**told, "data": data})

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self.limits.body:
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {self.limits.body} bytes"
                )
        return body

    def _submitted(self, asked: ImagesRequest, model: Model, engine: Engine) -> list[Handle]:
        """All images of a request are asked for, or none."""
        sampling = asked.sampling(engine.manifest.sampling)
        handles: list[Handle] = []
        try:
            for sample in asked.samples(engine.manifest):
                handles.append(engine.submit(sample, sampling, parts=True, kept=bool(asked.eviction_map)))
        except LinertError as error:
            for handle in handles:
                handle.cancel()
            raise refusal(error, engine) from error
        return handles

    async def _images(self, request: Request, handles: Sequence[Handle]) -> list[Done]:
        """Wait for all images. Where the client goes away, one fails or the time is over, the others are cancelled."""
        gone = asyncio.ensure_future(disconnected(request))
        waits = [asyncio.ensure_future(last_event(handle)) for handle in handles]
        try:
            end = asyncio.get_running_loop().time() + self.limits.seconds
            pending: set[asyncio.Future[Any]] = {*waits, gone}
            while pending - {gone}:
                left = end - asyncio.get_running_loop().time()
                done, pending = await asyncio.wait(
                    pending, timeout=max(0, left), return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    raise ClientDisconnect
                if not done:
                    raise ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"not drawn within {self.limits.seconds:g} s")
                for wait in done:
                    require_done(wait.result())
            return [require_done(wait.result()) for wait in waits]
        finally:
            for handle in handles:
                handle.cancel()
            for task in (gone, *waits):
                task.cancel()

    async def _streamed(
        self, asked: ImagesRequest, engine: Engine, handle: Handle, told: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """Server-sent events: partial images, each of so many parts more, then the image. One that nobody reads any more is cancelled."""
        parts, wanted = engine.manifest.parts(handle.sampling), asked.partial_images or 0
        told = {**told, "created_at": told["created"]}
        counts = told.pop("usage")
        due = [-(-parts * (number + 1) // (wanted + 1)) for number in range(wanted)]
        index = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for event in handle:
                    # Of partial images that are late, the last is as good.
                    if isinstance(event, PartDrawn) and index < len(due) and event.parts >= due[index]:
                        while index < len(due) and event.parts >= due[index]:
                            index += 1
                        pixels = await run_in_threadpool(engine.pixels, event.tokens)
                        pixels *= drawn_pixels(engine.manifest, event.drawn)
                        image = await run_in_threadpool(asked.encoded, pixels)
                        yield server_sent(
                            "image_generation.partial_image",
                            {
                                **told,
                                "b64_json": image,
                                "partial_image_index": index - 1,
                                "parts": event.parts,
                            },
                        )
                    elif isinstance(event, (Failed, Cancelled)):
                        require_done(event)
                    elif isinstance(event, Done):
                        whole = await run_in_threadpool(finished, asked, engine, event)
                        yield server_sent("image_generation.completed", {**told, **whole, "usage": counts})
        except TimeoutError:
            error = ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"not drawn within {self.limits.seconds:g} s")
            yield server_sent("error", error.body)
        except ApiError as error:
            yield server_sent("error", error.body)
        finally:
            handle.cancel()


def key_digest(key: str) -> bytes:
    """What a server keeps of a key."""
    return hashlib.sha256(key.encode()).digest()


def finished(asked: ImagesRequest, engine: Engine, done: Done) -> dict[str, Any]:
    """What is told of an image: its file, its seed, and where that was asked for its eviction map."""
    image = done.image
    told: dict[str, Any] = {"b64_json": asked.encoded(image.pixels), "seed": image.sample.seed}
    if done.kept is not None:
        drawn = draw_map(image.picture(), done.kept, engine.manifest, MapKind.AVERAGED)
        told["eviction_map_b64_json"] = asked.file(drawn)
    return told


async def last_event(handle: Handle) -> Event:
    """The event behind which there are none."""
    return [event async for event in handle][-1]


def require_done(event: Event) -> Done:
    """The event, if an image was drawn.

    Raises:
        ApiError: none was.
    """
    if isinstance(event, Done):
        return event
    if isinstance(event, Failed):
        raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(event.error))
    raise ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, "the image was cancelled: the server is stopping", retry_after=1
    )


def refusal(error: LinertError, engine: Engine) -> LinertError:
    """What a client is told where an engine does not take an image."""
    if isinstance(error, QueueFullError):
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{error}: try again later",
            code="rate_limit_exceeded",
            retry_after=engine.seconds_until_free,
        )
    if isinstance(error, EngineClosedError):
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), retry_after=1)
    if isinstance(error, RequestError):
        text = str(error)
        fields = ("guidance", "temperature", "top_k", "top_p", "steps", "class", "negative", "prompt")
        named = next((name for name in fields if name in text), None)
        return bad(text, {"class": "class_id", "negative": "negative_prompt"}.get(named or "", named))
    return error


def prompt_tokens(engine: Engine, handles: Sequence[Handle]) -> int:
    """Tokens of the prompts of all images."""
    conditioner = engine.conditioner
    conditions = [handle.sample.condition for handle in handles]
    if not isinstance(conditioner, PromptConditioner):
        return 0
    return sum(len(conditioner.tokens(c.text)) for c in conditions if isinstance(c, Prompt))


def described(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists them; ``sizes``, ``classes`` and how tokens are drawn by default beyond it."""
    first = next(iter(model.engines.values()))
    manifest = first.manifest
    condition = manifest.condition
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": manifest.model.family,
        "sizes": list(model.engines),
        "classes": condition.num_classes if isinstance(condition, ClassInput) else None,
        "parts": manifest.parts(manifest.sampling),
        "cache": None if first.cache is None else first.cache.text,
        "sampling": msgspec.to_builtins(manifest.sampling),
    }


async def disconnected(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def not_found(request: Request, error: Exception) -> Response:
    status = HTTPStatus(getattr(error, "status_code", 404))
    return failure(ApiError(status, f"{request.method} {request.url.path}: {status.phrase.lower()}"))


def failure(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return Response(msgspec.json.encode(error.body), error.status, headers, "application/json")


def answer(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def server_sent(name: str, content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    data = msgspec.json.encode({"type": name, **content})
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
