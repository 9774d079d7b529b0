"""The options by which commands choose a cache policy and its settings."""

from __future__ import annotations

import re
from dataclasses import fields

import click

from linert.runtime.bundles.geometry import Aggregation, HeadScores, Mode
from linert.runtime.bundles.manifest import MOST_COUNT
from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.drawing.cache_request import CacheRequest


def cache_options(policy: bool = True) -> Decorator:
    """Give a command the cache options; it gets them as one ``cache`` argument, a :class:`CacheRequest`.

    ``policy=False`` leaves ``--policy`` out, for a command that takes several.
    """
    options = [
        click.option("--policy", help="Cache policy, of those that the bundle holds."),
        click.option(
            "--budget-lines",
            callback=lambda c, p, text: int(text) if re.fullmatch("-?[0-9]{1,9}", text or "") else text,
            help="Lines in the cache, the one in progress included; or a share of the image's, like 1/6.",
        ),
        click.option(
            "--layer-budgets",
            help="How layers share the budget: uniform, pyramid (much to the first, little to the last), or a "
            "list of lines like 6,5,4,3.",
        ),
        click.option(
            "--mode",
            type=click.Choice([str(m) for m in Mode]),
            help="Whether an evicted slot empties at once or stays visible until it is overwritten.",
        ),
        click.option("--recent-lines", type=float, help="Newest lines that stay; 0.5 is half a line."),
        click.option(
            "--anchor-tokens", type=click.IntRange(max=MOST_COUNT), help="First image tokens that stay."
        ),
        click.option(
            "--aggregation",
            type=click.Choice([str(a) for a in Aggregation]),
            help="How the attention of many queries becomes one score.",
        ),
        click.option(
            "--head-scores",
            type=click.Choice([str(h) for h in HeadScores]),
            help="Every head evicts by its own scores, or all by the averaged ones.",
        ),
        click.option(
            "--share-guidance/--no-share-guidance",
            default=None,
            help="Conditional and unconditional rows evict alike, or each for itself.",
        ),
    ]
    names = [field.name for field in fields(CacheRequest)]
    if not policy:
        del options[0]
        names.remove("policy")
    return option_group("cache", options, names, CacheRequest)
