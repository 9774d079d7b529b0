"""The models of a server: bundles by name, and an engine for each of their sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from linert.runtime.backends.options import BackendOptions
from linert.runtime.bundles.bundle import Bundle, open_bundle
from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.drawing.cache_request import CacheRequest
from linert.runtime.drawing.samples import Sample
from linert.runtime.errors import RequestError
from linert.runtime.serving.api import ApiError
from linert.runtime.serving.engine import Engine


@dataclass(frozen=True)
class EngineSettings:
    """How engines are opened: where stages run, what all images keep, positions a step, and how many images may wait."""

    options: BackendOptions
    cache: CacheRequest
    window: int
    waiting: int

    def open(self, path: Path) -> Iterator[tuple[Bundle, CacheSettings | None]]:
        """The variants of the bundle at ``path`` that engines draw from, one a size, and what their images keep.

        Raises:
            LinertError: the bundle cannot be opened, or does not fit.
        """
        for size in open_bundle(path).sizes:
            opened, cache = self.cache.settle_for(open_bundle(path, size))
            opened.manifest.check_cache(cache or opened.manifest.cache)
            opened.manifest.check_window(self.window)
            yield opened, cache


def model_name(path: Path) -> str:
    """What the bundle at ``path`` is called: its folder's name, or that of the link by which it is named."""
    return os.path.basename(os.path.abspath(path))


def check_names(paths: Sequence[Path]) -> None:
    """Raise :class:`RequestError` where two bundles would be models of one name."""
    names = [model_name(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"two bundles are called {', '.join(twice)}: rename a folder")


@dataclass(frozen=True)
class Model:
    """A bundle that is served. ``engines``: by image size, as ``512x768``, the first that was exported first."""

    name: str
    engines: Mapping[str, Engine]
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def open(path: Path, settings: EngineSettings) -> Model:
        """Open the engines of the bundle at ``path``.

        Raises:
            LinertError: the bundle cannot be opened, or does not fit the settings.
        """
        engines: dict[str, Engine] = {}
        try:
            for opened, cache in settings.open(path):
                engines[opened.manifest.size] = Engine(
                    opened, settings.options, cache, window=settings.window, waiting=settings.waiting
                )
        except BaseException:
            for engine in engines.values():
                engine.close()
            raise
        return Model(model_name(path), engines)

    def engine(self, size: str | None) -> tuple[str, Engine]:
        """The engine of a size, and the size.

        Raises:
            ApiError: the bundle has no such size.
        """
        if size in (None, "auto"):
            return next(iter(self.engines.items()))
        if size not in self.engines:
            listed = ", ".join(self.engines)
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{self.name} draws {listed}, not {size}", param="size")
        return size, self.engines[size]


class Models:
    """All models of a server.

    Raises:
        RequestError: two have one name.
        LinertError: one cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], settings: EngineSettings) -> None:
        check_names(paths)
        self.by_name: dict[str, Model] = {}
        try:
            for path in paths:
                model = Model.open(path, settings)
                self.by_name[model.name] = model
        except BaseException:
            self.close()
            raise
        self._warm: set[int] = set()

    def engines(self) -> Iterator[tuple[Model, str, Engine]]:
        """Every engine, with its model and size."""
        for model in self.by_name.values():
            for size, engine in model.engines.items():
                yield model, size, engine

    def named(self, name: str | None) -> Model:
        """The model of a name; the first without one.

        Raises:
            ApiError: there is none.
        """
        if name is None:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            listed = ", ".join(self.by_name)
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"there is no model {name!r}; there are {listed}",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]

    def warm_up(self) -> None:
        """Draw an image with every engine.

        Raises:
            LinertError: one fails.
        """
        for _, _, engine in self.engines():
            engine.submit(Sample(engine.conditioner.usual()[0], 0)).result()
            self._warm.add(id(engine))

    @property
    def ready(self) -> bool:
        """Whether every engine has drawn an image and goes on drawing."""
        return all(engine.ready and id(engine) in self._warm for _, _, engine in self.engines())

    def drain(self, seconds: float) -> bool:
        """Take no more images and finish those that there are; whether that took no more than so many seconds."""
        end = time.monotonic() + seconds
        # All of them, whether or not the first ones are.
        drained = [engine.drain(max(0.0, end - time.monotonic())) for _, _, engine in self.engines()]
        return all(drained)

    def close(self) -> None:
        for _, _, engine in self.engines():
            engine.close()
