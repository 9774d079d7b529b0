"""Which window a run takes: measured while it draws, since the images are the same whatever it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

TRIALS = 3
"""Stretches that every width takes before the quickest is kept; the first of them warms up and does not count."""


@dataclass
class WindowChoice:
    """Takes every width in turn, and then the one that was quickest a token.

    ``widths``: those that the bundle has. What is learned lasts as long as the object: a run of many batches shares one.
    """

    widths: Sequence[int]
    _taken: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _tokens: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _seconds: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def next(self) -> int:
        """The width to take now."""
        tried = min(self.widths, key=lambda width: self._taken[width])
        return self.best if self._taken[tried] >= TRIALS else tried

    def note(self, width: int, tokens: int, seconds: float) -> None:
        """Learn that so many tokens of all images took ``seconds`` with windows of ``width``."""
        self._taken[width] += 1
        if self._taken[width] > 1:
            self._tokens[width] += tokens
            self._seconds[width] += seconds

    @property
    def best(self) -> int:
        """The quickest width so far; 1 before anything was measured."""
        measured = [width for width in self.widths if self._tokens[width]]
        return min(measured, key=self.milliseconds, default=1)

    def milliseconds(self, width: int) -> float:
        """Of a token, of windows that were measured."""
        return 1e3 * self._seconds[width] / self._tokens[width]

    @property
    def text(self) -> str:
        """For people: ``4 (milliseconds a token: 1: 0.61, 4: 0.42)``."""
        measured = [width for width in self.widths if self._tokens[width]]
        times = ", ".join(f"{width}: {self.milliseconds(width):.2f}" for width in measured)
        return f"{self.best} (milliseconds a token: {times})" if measured else str(self.best)
