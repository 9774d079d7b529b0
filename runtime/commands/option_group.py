"""Hand several click options to a command as one argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option_group(
    argument: str, options: Sequence[Decorator], names: Sequence[str], make: Callable[..., Any]
) -> Decorator:
    """Give a command ``options``, whose values, of these ``names``, it gets as one ``argument`` made of them."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(**arguments: Any) -> Any:
            values = {name: arguments.pop(name) for name in names}
            return function(**{argument: make(**values)}, **arguments)

        command: Callable[..., Any] = wrapped
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
