"""Model families, one file each. A new one is registered here."""

from __future__ import annotations

from graphs.families import janus, llamagen, lumina
from graphs.families.base import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llamagen.FAMILY, janus.FAMILY, lumina.FAMILY)
}
