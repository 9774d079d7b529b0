"""Options made from the declarations of settings, and the groups of them that commands take."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import click
import msgspec

from linert.runtime.bundles.cache_settings import CacheSettings
from linert.runtime.bundles.sampling_settings import MOST_COUNT, SamplingSettings
from linert.runtime.bundles.setting import NamedSetting, settings_of
from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.drawing.cache_request import CacheRequest


@dataclass(frozen=True)
class SamplingRequest:
    """Sampling settings as asked for; None was not given."""

    values: tuple[tuple[str, Any], ...] = ()

    @property
    def empty(self) -> bool:
        return all(value is None for _, value in self.values)

    def settle(self, defaults: SamplingSettings) -> SamplingSettings:
        """Fill in what was not given."""
        return msgspec.structs.replace(
            defaults, **{name: value for name, value in self.values if value is not None}
        )


def setting_option(setting: NamedSetting, default: str = "") -> Decorator:
    """The option of a setting, None where it is not given. ``default``: what it then is, for people."""
    text = f"{setting.declared.help} {default}".rstrip()
    if setting.type is bool:
        return click.option(f"{setting.flag}/--no-{setting.flag[2:]}", default=None, help=text)
    kind: Any = setting.type
    if setting.choices:
        kind = click.Choice(setting.choices)
    elif setting.type is int:
        kind = click.IntRange(max=MOST_COUNT)
    return click.option(setting.flag, type=kind, help=text)


def sampling_options(default: str, *, exporting: bool = False) -> Decorator:
    """Give a command the sampling options; it gets them as one ``sampling``, a :class:`SamplingRequest`.

    ``default``: what settings are that are not given, for people. ``exporting``: leaves out what an export has other options for.
    """
    settings = [
        setting for setting in settings_of(SamplingSettings) if setting.declared.exported or not exporting
    ]
    return option_group(
        "sampling",
        [setting_option(setting, default) for setting in settings],
        [setting.name for setting in settings],
        lambda **values: SamplingRequest(tuple(values.items())),
    )


def budget_options() -> list[Decorator]:
    """The options that say how many lines the cache keeps."""
    return [
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
    ]


def cache_options(*, policy: bool = True) -> Decorator:
    """Give a command the cache options; it gets them as one ``cache``, a :class:`CacheRequest`.

    ``policy=False`` leaves ``--policy`` out, for a command that takes several.
    """
    named: list[Decorator] = [click.option("--policy", help="Cache policy, of those that the bundle holds.")]
    options = [
        *named * policy,
        *budget_options(),
        *(setting_option(setting) for setting in settings_of(CacheSettings)),
    ]
    names = [field.name for field in fields(CacheRequest) if policy or field.name != "policy"]
    return option_group("cache", options, names, CacheRequest)
