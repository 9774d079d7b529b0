"""The options by which commands choose how much to measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

MOST_ROUNDS = 100_000
"""Largest number of rounds that an option takes: days, of the smallest model."""


def rounds_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command ``--rounds`` and ``--images``; it gets them as ``rounds`` and ``image_rounds``."""
    rounds = click.option(
        "--rounds",
        type=click.IntRange(1, MOST_ROUNDS),
        default=8,
        show_default=True,
        help="Lines of decode steps to time.",
    )
    images = click.option(
        "--images",
        "image_rounds",
        type=click.IntRange(0, MOST_ROUNDS),
        default=1,
        show_default=True,
        help="Whole batches to draw and time.",
    )
    return lambda function: rounds(images(function))
