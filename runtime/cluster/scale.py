"""How large a server on a cluster is, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass

from linert.runtime.errors import RequestError

SPARE_REQUESTS = 8
"""Of a replica, beyond its images: for health, metrics, and what is refused."""


@dataclass(frozen=True)
class Scale:
    """``least`` to ``most`` replicas, as many as there are requests for."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise RequestError(f"--min-replicas {self.least} is more than --max-replicas {self.most}")


@dataclass(frozen=True)
class Room:
    """What a replica has room for. ``rows``: images that are drawn at a time. ``waiting``: images that may wait, of all its engines."""

    rows: int
    waiting: int

    @property
    def requests(self) -> int:
        """Requests that a replica may be at: its engines refuse images before Ray sends it no more."""
        return self.rows + self.waiting + SPARE_REQUESTS


@dataclass(frozen=True)
class Listening:
    """Where the proxies of all machines that have replicas listen."""

    host: str
    port: int
