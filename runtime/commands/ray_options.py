"""The options by which commands work on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from linert.runtime.commands.option_group import Decorator, option_group
from linert.runtime.errors import RequestError


@dataclass(frozen=True)
class RayRequest:
    """A cluster as asked for. ``address``: of one that runs already, None for the one of ``RAY_ADDRESS`` or one of this machine."""

    wanted: bool = False
    address: str | None = None

    def refuse_alone(self, options: Sequence[tuple[str, object]]) -> None:
        """Raise :class:`RequestError` for options with a value that mean nothing without ``--ray``."""
        if self.wanted:
            return
        listed = [("--ray-address", self.address), *options]
        if given := [option for option, value in listed if value is not None]:
            raise RequestError(f"{', '.join(given)}: only with --ray")


def ray_flags(what: str) -> list[Decorator]:
    """``--ray`` and ``--ray-address``. ``what``: is done on a cluster, for people."""
    return [
        click.option(
            "--ray",
            "wanted",
            is_flag=True,
            help=f"{what} (extra ray): the one of --ray-address or RAY_ADDRESS, or one of this machine, started for that.",
        ),
        click.option(
            "--ray-address",
            "address",
            metavar="ADDRESS",
            help="A Ray cluster that runs already, as 10.0.0.1:6379; auto is the one of this machine.",
        ),
    ]


@dataclass(frozen=True)
class WorkersRequest(RayRequest):
    """Workers of a run as asked for; None is one a machine, or one a GPU."""

    workers: int | None = None

    def check(self) -> None:
        """Raise :class:`RequestError` for options that need ``--ray``."""
        self.refuse_alone([("--workers", self.workers)])


def workers_options() -> Decorator:
    """Give a command the options of a run on a cluster; it gets them as one ``ray``, a :class:`WorkersRequest`."""
    listed: list[Decorator] = [
        *ray_flags("Draw on a Ray cluster"),
        click.option(
            "--workers",
            type=click.IntRange(1),
            help="With --ray: how many draw at a time, each with --threads of its own. Default: one a machine, or one a GPU.",
        ),
    ]
    return option_group("ray", listed, ("wanted", "address", "workers"), WorkersRequest)


@dataclass(frozen=True)
class ReplicasRequest(RayRequest):
    """Replicas of a server as asked for; None was not given."""

    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None

    def check(self) -> None:
        """Raise :class:`RequestError` for options that need ``--ray``, or that contradict each other."""
        bounds = [("--min-replicas", self.min_replicas), ("--max-replicas", self.max_replicas)]
        self.refuse_alone([("--replicas", self.replicas), *bounds])
        if given := [option for option, value in bounds if value is not None]:
            if self.replicas is not None:
                raise RequestError(f"--replicas is a fixed number: leave {' and '.join(given)} out")
            if self.max_replicas is None:
                raise RequestError("--min-replicas: say with --max-replicas how many there may be")


def replicas_options() -> Decorator:
    """Give a command the options of a server on a cluster; it gets them as one ``ray``, a :class:`ReplicasRequest`."""
    listed: list[Decorator] = [
        *ray_flags("Serve from a Ray cluster"),
        click.option(
            "--replicas",
            type=click.IntRange(1),
            help="With --ray: servers that share the requests, each with --threads of its own. Default: one a machine, or one a GPU.",
        ),
        click.option(
            "--min-replicas",
            type=click.IntRange(1),
            help="With --ray and --max-replicas: as few while there is little to do. Default: 1.",
        ),
        click.option(
            "--max-replicas", type=click.IntRange(1), help="With --ray: as many while there is much to do."
        ),
    ]
    names = ("wanted", "address", "replicas", "min_replicas", "max_replicas")
    return option_group("ray", listed, names, ReplicasRequest)
