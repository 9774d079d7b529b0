"""Kernels that plans carry are loaded once a context, and unloaded with the last layer that uses them."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("cuda.bindings")

import cuda.bindings

from linert.runtime.backends.cuda import Device
from linert.runtime.plugins.kernels import CompiledKernel, KernelSet
from linert.runtime.plugins.trt import Contexts
from tests.emulated_gpu import EmulatedDriver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    emulated = EmulatedDriver({"one": lambda grid, parameters: lambda: None})
    monkeypatch.setattr(cuda.bindings, "driver", emulated)
    return emulated


def kernel_set(ptx: bytes = b"") -> KernelSet:
    return KernelSet({"one": CompiledKernel("one", 4, 0, 0, {}, ptx)})


def test_layers_share_the_kernels_of_a_context(driver: EmulatedDriver) -> None:
    contexts = Contexts()
    with Device(driver):
        layers = [contexts.load(kernel_set()) for _ in range(3)]
        assert driver.live["module"] == 1
        layers.append(contexts.load(kernel_set(b"other")))
        assert driver.live["module"] == 2
        del layers
        gc.collect()
        assert not driver.live["module"]


def test_a_new_context_loads_its_own(driver: EmulatedDriver) -> None:
    contexts = Contexts()
    with Device(driver):
        first = contexts.load(kernel_set())
    with Device(driver):
        second = contexts.load(kernel_set())
        assert first["one"] is not second["one"]


def test_tables_are_freed_with_the_layer(driver: EmulatedDriver) -> None:
    with Device(driver) as device:
        target = device.allocate(16)
        layer = Contexts().load(kernel_set())
        layer.table([1, 2], target, device.stream)
        device.synchronize()
        assert driver.live["memory"] == 2
        del layer
        gc.collect()
        assert driver.live["memory"] == 1
    assert not +driver.live
