"""Settings in the files beside a checkpoint, which may hold anything: what is read of them has a type and bounds."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_SIZE = 1 << 20
"""Largest width, head count or number of positions that a file may tell."""


@dataclass(frozen=True)
class Settings:
    """An object of a JSON file.

    ``values``: by key; null is the same as none. ``where``: the file and the keys down to the object, for messages.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = "config.json"

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, *keys: str) -> Settings:
        """The object under the first of ``keys`` that there is; an empty one if there is none.

        Raises:
            ValueError: it is no object.
        """
        for key in keys:
            if key in self:
                value = self.values[key]
                if not isinstance(value, Mapping):
                    raise ValueError(self.fault(key, "an object"))
                return Settings(value, f"{self.where}, {key}")
        return Settings({}, self.where)

    def integer(self, key: str, least: int = 1, most: int = MOST_SIZE) -> int | None:
        """A whole number; None if there is none.

        Raises:
            ValueError: it is something else, or out of bounds.
        """
        if key not in self:
            return None
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(self.fault(key, f"a whole number from {least} to {most}"))
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """A number; None if there is none.

        Raises:
            ValueError: it is something else, or out of bounds.
        """
        if key not in self:
            return None
        value = self.values[key]
        known = isinstance(value, int | float) and not isinstance(value, bool)
        # What is no number is not between two, and a whole number may be too long for a float.
        if not known or not least <= value <= most:
            raise ValueError(self.fault(key, f"a number from {least:g} to {most:g}"))
        return float(value)

    def flag(self, key: str) -> bool | None:
        """True or false; None if there is neither.

        Raises:
            ValueError: it is something else.
        """
        if key not in self:
            return None
        value = self.values[key]
        if not isinstance(value, bool):
            raise ValueError(self.fault(key, "true or false"))
        return value

    def text(self, key: str) -> str | None:
        """A text; None if there is none.

        Raises:
            ValueError: it is something else.
        """
        if key not in self:
            return None
        value = self.values[key]
        if not isinstance(value, str):
            raise ValueError(self.fault(key, "a text"))
        return value

    def numbered(self, key: str, most: int) -> dict[str, int]:
        """Numbers from 0 to below ``most`` by name; empty if there are none.

        Raises:
            ValueError: there is something else.
        """
        section = self.section(key)
        numbers = {name: section.integer(name, 0, most - 1) for name in section.values} if key in self else {}
        if nameless := [name for name, number in numbers.items() if number is None]:
            raise ValueError(section.fault(nameless[0], f"a whole number from 0 to {most - 1}"))
        return {name: number for name, number in numbers.items() if number is not None}

    def fault(self, key: str, wanted: str) -> str:
        """What is wrong with the value of ``key``."""
        return f"{self.where}: {key} is {reprlib.repr(self.values.get(key))}, must be {wanted}"
