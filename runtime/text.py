"""Numbers and messages as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def size_text(count: int) -> str:
    """Bytes with a binary unit: ``size_text(1536)`` is ``"1.5 KiB"``."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def brief(text: str, letters: int = 300) -> str:
    """A text without its middle where it is longer than so many ``letters``: others' messages repeat what they were given."""
    side = letters // 2
    return text if len(text) <= letters else f"{text[:side]} … {text[-side:]}"


def lines_text(counts: Sequence[int]) -> str:
    """One number a layer: ``4``, or ``2 to 6 (mean 4)`` when layers differ."""
    least, most = min(counts), max(counts)
    return f"{most}" if least == most else f"{least} to {most} (mean {sum(counts) / len(counts):.3g})"
