"""Ways to damage what people bring: bytes, JSON, arrays, archives. Every one says in a few words what it did."""

from __future__ import annotations

import functools
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 255, 2**31, -(2**31), 2**63, -(2**63), 2**64, 10**30),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "0",
        "-1",
        "nan",
        "a" * 5000,
        "../../../etc/passwd",
        "/dev/zero",
        "\x00",
        "\ufeff",
        "\u2028",
        "é" * 40,
    ),
    *([], {}, [[]], [0] * 500, {"a": {}}, [None], ["a"], [-1], [2**40, 2**40]),
)
"""Values that some code somewhere does not expect."""

Mutated = tuple[bytes, str]


def mutate_bytes(data: bytes, rng: random.Random) -> Mutated:
    """Damage bytes as disks, transfers and editors do."""
    values = bytearray(data)
    size = len(values)
    if not size:
        return b"\x00", "a byte where there was none"
    at = rng.randrange(size)
    length = min(size - at, 1 << rng.randrange(12))
    kind = rng.choice(
        ("flip", "truncate", "zeros", "insert", "delete", "repeat", "ones", "extend", "empty", "byte", "swap")
    )
    if kind == "flip":
        values[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        values[at] = rng.randrange(256)
    elif kind == "truncate":
        del values[at:]
    elif kind == "zeros":
        values[at : at + length] = bytes(length)
    elif kind == "ones":
        values[at : at + length] = b"\xff" * length
    elif kind == "insert":
        values[at:at] = rng.randbytes(length)
    elif kind == "delete":
        del values[at : at + length]
    elif kind == "repeat":
        values[at:at] = values[at : at + length]
    elif kind == "extend":
        values += rng.randbytes(length)
    elif kind == "swap":
        other = rng.randrange(size)
        values[at], values[other] = values[other], values[at]
    else:
        values.clear()
    return bytes(values), f"{kind} at byte {at} of {size}"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    paths = [path]
    if isinstance(value, dict):
        for key in value:
            paths += places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            paths += places(value[number], (*path, number))
    return paths


def mutate_json(value: Any, rng: random.Random) -> tuple[Any, tuple[Any, ...], str]:
    """Change one thing in a copy of a JSON value; the copy, where, and what."""
    copy = json.loads(json.dumps(value))
    path = rng.choice(places(copy)[1:] or [()])
    if not path:
        return rng.choice(NASTY), (), "the whole value"
    parent = copy
    for part in path[:-1]:
        parent = parent[part]
    last, old = path[-1], parent[path[-1]]
    kind = rng.choice(("nasty", "nasty", "nasty", "delete", "nudge", "swap", "rename", "copy", "type"))
    if kind == "delete":
        del parent[last]
    elif kind == "nudge" and isinstance(old, int | float):
        parent[last] = old + rng.choice((1, -1, 2, -2, 16, 1000, 10**6))
    elif kind == "nudge" and isinstance(old, str) and old:
        parent[last] = old[:-1] + chr((ord(old[-1]) + 1) % 127)
    elif kind == "swap":
        other = rng.choice(places(copy)[1:])
        source = copy
        for part in other:
            source = source[part]
        parent[last] = json.loads(json.dumps(source))
        kind = f"replaced by what is at {'/'.join(map(str, other))}"
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
    elif kind == "copy" and isinstance(parent, list):
        parent.append(json.loads(json.dumps(old)))
    elif kind == "type":
        parent[last] = rng.choice((str(old), [old], {"value": old}, None))
    else:
        parent[last] = rng.choice(NASTY)
        kind = f"{str(parent[last])[:30]!r}"
    return copy, path, f"{'/'.join(map(str, path))}: {kind}"


def json_bytes(value: Any) -> bytes:
    """JSON as Python writes it, NaN included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def nested(depth: int, rng: random.Random) -> bytes:
    """JSON nested deeper than any parser's stack."""
    return rng.choice((b"[", b'{"a":')) * depth


def mutate_array(array: np.ndarray, rng: random.Random) -> tuple[np.ndarray, str]:
    """Another shape, dtype or content."""
    kinds: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("one dimension more", lambda: array[None]),
        ("no dimension", lambda: np.array(7)),
        ("flat", lambda: array.reshape(-1)),
        ("half", lambda: array[: len(array) // 2] if array.ndim else array),
        ("empty", lambda: array[:0] if array.ndim else array.reshape(0)),
        ("float64", lambda: array.astype(np.float64) if array.dtype.kind in "iuf" else np.zeros(3)),
        ("text", lambda: np.array(["a", "b"])),
        ("complex", lambda: np.zeros(array.shape, np.complex64)),
        ("bool", lambda: np.zeros(array.shape, bool)),
        ("negative", lambda: np.full(array.shape, -1, np.int64)),
        ("huge", lambda: np.full(array.shape, 2**62, np.int64)),
        ("uint64", lambda: np.full(array.shape, 2**64 - 1, np.uint64)),
        ("not a number", lambda: np.full(array.shape, np.nan)),
        ("objects", lambda: np.array([{}, None], dtype=object)),
        ("Fortran order", lambda: np.asfortranarray(array)),
        ("dates", lambda: np.zeros(array.shape, "datetime64[s]")),
    ]
    name, make = rng.choice(kinds)
    return make(), name


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def mutate_npz(arrays: dict[str, np.ndarray], rng: random.Random) -> Mutated:
    """One array of an archive changed, gone or renamed; or its bytes damaged."""
    copy = dict(arrays)
    name = rng.choice(sorted(copy))
    kind = rng.choice(("array", "array", "array", "delete", "rename", "more", "bytes", "plain", "swollen"))
    if kind == "swollen":
        name = "header" if "header" in copy else "tokens"
        return swollen(f"{name}.npy"), f"{name} of {SWOLLEN_BYTES >> 20} MiB"
    if kind == "delete":
        del copy[name]
        return npz(copy), f"without {name}"
    if kind == "rename":
        copy[f"{name}_"] = copy.pop(name)
        return npz(copy), f"{name} renamed"
    if kind == "more":
        copy["more"] = np.zeros(3)
        return npz(copy), "one more array"
    if kind == "bytes":
        data, said = mutate_bytes(npz(copy), rng)
        return data, said
    if kind == "plain":
        buffer = io.BytesIO()
        np.save(buffer, copy[name], allow_pickle=True)
        return buffer.getvalue(), f"{name} alone, as .npy"
    copy[name], said = mutate_array(copy[name], rng)
    return npz(copy), f"{name}: {said}"


SWOLLEN_BYTES = 3 << 29


@functools.cache
def swollen(name: str) -> bytes:
    """An archive of one large array of zeros, a thousand times smaller."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w") as member,
    ):
        shape = (SWOLLEN_BYTES >> 3, 1)
        np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for _ in range(SWOLLEN_BYTES >> 20):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


def mutate_zip(data: bytes, rng: random.Random) -> Mutated:
    """An archive whose entries are shortened, gone, renamed, compressed or doubled, with valid checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = rng.randrange(len(entries))
    name, content = entries[number]
    kind = rng.choice(
        (
            "shorten",
            "lengthen",
            "delete",
            "rename",
            "compress",
            "double",
            "content",
            "swap",
            "outside",
            "swollen",
        )
    )
    if kind == "swollen":
        name = entries[0][0]
        return swollen(name), f"{name} of {SWOLLEN_BYTES >> 20} MiB"
    compression = zipfile.ZIP_STORED
    if kind == "shorten":
        entries[number] = name, content[: rng.randrange(len(content) + 1)]
    elif kind == "lengthen":
        entries[number] = name, content + rng.randbytes(rng.randrange(1, 100))
    elif kind == "delete":
        del entries[number]
    elif kind == "rename":
        entries[number] = f"{name}_", content
    elif kind == "compress":
        compression = zipfile.ZIP_DEFLATED
    elif kind == "double":
        entries.append((name, rng.randbytes(len(content))))
    elif kind == "content":
        entries[number] = name, mutate_bytes(content, rng)[0]
    elif kind == "swap":
        other = rng.randrange(len(entries))
        entries[number], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    else:
        entries[number] = f"../{name}", content
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.filterwarnings("ignore", message="Duplicate name")
        for entry, entry_data in entries:
            archive.writestr(entry, entry_data)
    return buffer.getvalue(), f"{kind} {name}"
