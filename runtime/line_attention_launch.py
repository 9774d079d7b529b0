"""How the LineAttention kernels are launched: blocks, parts and scratch memory of a shape.

The exporter compiles kernels for it and the plugin launches them by it, so that both see the same numbers. Axes: R =
sequences x KV heads, G = query heads of a KV head, C = slots, D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SLOTS = 8192
MAX_GROUP = 16
MAX_HEAD = 256
DTYPES = ("float32", "float16", "bfloat16")

TILE = 4096
"""Numbers of K that a program works on at a time."""

PROGRAMS = 264
"""Programs that fill a large GPU: two a multiprocessor. Fewer rows are split."""

LEAST_PART = 64
"""Slots below which a part is not worth a program."""

WARPS = 4


@dataclass(frozen=True)
class LineAttentionLaunch:
    """Launch parameters of one shape.

    Raises:
        ValueError: the kernels cannot do the shape; the message says which side of it, and what they can.
    """

    rows: int
    group: int
    slots: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        faults = []
        if self.dtype not in DTYPES:
            faults.append(f"caches of {self.dtype}; can be {', '.join(DTYPES)}")
        if not 1 <= self.slots <= MAX_SLOTS:
            faults.append(f"{self.slots} slots; can be 1 to {MAX_SLOTS}")
        if not 1 <= self.group <= MAX_GROUP:
            faults.append(f"{self.group} query heads a KV head; can be 1 to {MAX_GROUP}")
        if not 4 <= self.head_dim <= MAX_HEAD or self.head_dim % 4:
            faults.append(f"heads of {self.head_dim}; can be a multiple of 4 up to {MAX_HEAD}")
        if self.rows < 1:
            faults.append(f"{self.rows} rows; must be at least 1")
        if faults:
            raise ValueError(f"LineAttention: {'; '.join(faults)}")

    @property
    def group_pad(self) -> int:
        return power_of_two(self.group)

    @property
    def head_pad(self) -> int:
        return power_of_two(self.head_dim)

    @property
    def block(self) -> int:
        """Slots that a program works on at a time."""
        return max(16, min(128, TILE // (self.group_pad * self.head_pad)))

    @property
    def part_slots(self) -> int:
        """Slots of a part; a multiple of the block where there are several parts."""
        wanted = min(-(-PROGRAMS // self.rows), -(-self.slots // LEAST_PART))
        if wanted <= 1:
            return self.slots
        return min(self.slots, -(-self.slots // (wanted * self.block)) * self.block)

    @property
    def parts(self) -> int:
        """1 where there are rows enough to fill a GPU, or slots too few to share."""
        return -(-self.slots // self.part_slots)

    @property
    def split(self) -> bool:
        return self.parts > 1

    @property
    def logits_floats(self) -> int:
        """Float32 scratch of the logits."""
        return self.rows * self.group * self.slots

    @property
    def partial_floats(self) -> int:
        """Float32 scratch of the parts' results."""
        return self.rows * self.parts * self.group_pad * (self.head_pad + 2) if self.split else 0

    @property
    def scratch_bytes(self) -> int:
        return 4 * (self.logits_floats + self.partial_floats)

    @property
    def attend_grid(self) -> tuple[int, int, int]:
        return self.rows, self.parts, 1

    @property
    def combine_grid(self) -> tuple[int, int, int]:
        return self.rows, -(-self.slots // self.block), 1

    def constants(self, kernel: str) -> dict[str, int]:
        """Compile-time parameters of ``kernel`` (``attend`` or ``combine``)."""
        found = {
            "G": self.group,
            "G_PAD": self.group_pad,
            "D": self.head_dim,
            "D_PAD": self.head_pad,
            "BLOCK": self.block,
        }
        return found | {"SPLIT": int(self.split)} if kernel == "attend" else found


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
