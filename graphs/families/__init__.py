"""Model families, one file each. A new one is registered here."""

from __future__ import annotations

from linert.graphs.families import janus, lasadgen, llamagen, lpd, lumina
from linert.graphs.families.base import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (llamagen.FAMILY, lasadgen.FAMILY, janus.FAMILY, lumina.FAMILY, lpd.FAMILY)
}
