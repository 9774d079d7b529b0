"""What the command line, comparisons and stages have to know of a setting, said where the setting is declared.

A settings record is a ``msgspec.Struct`` whose fields are annotated with a :class:`Setting`. Options, requests, labels and the
stages' inputs are made from these declarations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from linert.runtime.bundles.raster import Raster


@dataclass(frozen=True, kw_only=True)
class StageInput:
    """The number that a setting is to the stages: their input of this ``name``, of numpy's ``dtype`` and shape ``[]``.

    ``value``: makes the number from the setting and the image; None takes the setting as it is.
    """

    name: str
    dtype: str
    value: Callable[[Any, Raster], float] | None = None

    def array(self, setting: Any, raster: Raster) -> NDArray[np.generic]:
        """The input that ``setting`` is."""
        return np.asarray(setting if self.value is None else self.value(setting, raster), self.dtype)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of a setting.

    ``help``: of its option, a whole sentence. ``default``: of bundles whose export does not say. ``least``: a number below it
    is refused. ``label``: tells its value to people, as in ``16 anchor tokens``. ``stage_input``: None where the stages
    get it by another way. ``exported``: False where an export has another option for it.
    """

    help: str
    default: Any = None
    least: float | None = None
    label: Callable[[Any], str] = str
    stage_input: StageInput | None = None
    exported: bool = True


@dataclass(frozen=True)
class NamedSetting:
    """A declared setting with the name and the type of its field."""

    name: str
    type: type
    declared: Setting

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have, where they are words."""
        return tuple(str(value) for value in self.type) if issubclass(self.type, StrEnum) else ()

    def label(self, record: msgspec.Struct) -> str:
        """What ``record`` has for it, for people."""
        return self.declared.label(getattr(record, self.name))


@cache
def settings_of(record: type[msgspec.Struct]) -> tuple[NamedSetting, ...]:
    """The declared settings of a record, in the order of its fields."""
    declared = []
    for name, annotated in get_type_hints(record, include_extras=True).items():
        if get_origin(annotated) is Annotated:
            kind, *extras = get_args(annotated)
            declared += [NamedSetting(name, kind, extra) for extra in extras if isinstance(extra, Setting)]
    return tuple(declared)


def stage_inputs(record: msgspec.Struct, raster: Raster) -> dict[str, NDArray[np.generic]]:
    """The stages' inputs that the settings of ``record`` decide by themselves."""
    return {
        spec.name: spec.array(getattr(record, setting.name), raster)
        for setting in settings_of(type(record))
        if (spec := setting.declared.stage_input) is not None
    }
