"""Phase driver: the CUDA driver does what runtime/backends/cuda.py asks of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu_phases.outcome import Check, Outcome
from gpu_phases.place import Place
from linert.runtime.backends.cuda import Device

SIZES = (1, 3, 4096, (1 << 20) + 1, 64 << 20)


def checks(place: Place) -> Iterator[tuple[str, Check]]:
    """From the least that anything needs to what decode steps need."""
    yield "what the device is", lambda: describe(place.device)
    sizes = SIZES[:-1] if place.rehearsal else SIZES
    yield "what is uploaded comes back", lambda: round_trip(place.device, sizes)
    yield (
        "memory is zeroed, and given back",
        lambda: memory(place.device, 1 << (20 if place.rehearsal else 30)),
    )
    yield "a captured graph does its work at every launch", lambda: capture(place.device)
    yield "what was captured cannot be captured while memory is taken", lambda: refused(place.device)
    yield "copy bandwidth", lambda: bandwidth(place.device, 1 << (20 if place.rehearsal else 28))


def describe(device: Device) -> Outcome:
    free, total = device._call("cuMemGetInfo")
    text = f"{device.name}, SM{device.capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Outcome("", "measured", text, {"name": device.name, "capability": device.capability})


def round_trip(device: Device, sizes: tuple[int, ...]) -> Outcome:
    generator = np.random.default_rng(0)
    for size in sizes:
        sent = generator.integers(0, 256, size, np.uint8)
        address = device.allocate(size)
        # The second upload reuses page-locked memory that the first may still be copied from.
        for values in (255 - sent, sent):
            device.upload(address, values)
        came = np.zeros_like(sent)
        device.download(address, came)
        device.free(address)
        if not np.array_equal(came, sent):
            raise AssertionError(f"{(came != sent).sum()} of {size} bytes differ")
    return Outcome("", "passed", f"{len(sizes)} sizes up to {max(sizes)} bytes")


def memory(device: Device, size: int) -> Outcome:
    before, _ = device._call("cuMemGetInfo")
    address = device.allocate(size)
    contents = np.full(1 << 16, 7, np.uint8)
    device.download(address + size - len(contents), contents)
    device.free(address)
    after, _ = device._call("cuMemGetInfo")
    if contents.any() or before - after > size // 2:
        raise AssertionError(f"{before - after} bytes were not given back; memory holds {contents[:4]}")
    return Outcome("", "passed", f"{size} bytes")


def capture(device: Device) -> Outcome:
    """A copy on the device and an upload in one graph, launched twice over inputs that change between launches."""
    one, two, host = (device.allocate(16) for _ in range(3))
    device.upload(one, np.arange(4, dtype=np.int32))
    device.synchronize()
    numbers = np.zeros(4, np.int32)
    with device.capturing() as captured:
        device.copy(two, one, 16)
        device.copy(host, two, 16)
    [graph] = captured
    device.download(two, numbers)
    if numbers.any():
        raise AssertionError(f"what was only captured has run: {numbers}")
    for launch in range(2):
        sent = np.arange(4, dtype=np.int32) + 10 * launch
        device.upload(one, sent)
        graph.launch(device.stream)
        device.download(host, numbers)
        if not np.array_equal(numbers, sent):
            raise AssertionError(f"launch {launch}: {numbers} instead of {sent}")
    nodes, copies = dict(graph.nodes), list(graph.copies)
    graph.close()
    if [copy[:2] for copy in copies] != [(two, one), (host, two)]:
        raise AssertionError(f"the graph's copies are {copies}")
    return Outcome("", "passed", f"nodes: {nodes}", {"nodes": nodes})


def refused(device: Device) -> Outcome:
    """The stream leaves capture after a failure, and goes on to work."""
    address = device.allocate(4)
    try:
        with device.capturing():
            raise KeyError("a failure in the middle")
    except KeyError:
        pass
    device.upload(address, np.array([5], np.int32))
    number = np.zeros(1, np.int32)
    device.download(address, number)
    if number[0] != 5:
        raise AssertionError(f"{number} instead of 5")
    return Outcome("", "passed", "the stream goes on after a capture that failed")


def bandwidth(device: Device, size: int) -> Outcome:
    rate = device.copy_bandwidth(size)
    return Outcome("", "measured", f"{rate / 1e9:.0f} GB/s read and written", {"bytes_per_second": rate})
