"""Which hardware can be planned for, and what is known of it."""

from __future__ import annotations

import importlib.util

import pytest

from jaxgrpo.config import ConfigError
from jaxgrpo.topology import GPUS, TPUS, before_jax_starts, find

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux and Python 3.11"
)


@pytest.mark.parametrize(
    ("name", "slices", "devices", "gib"),
    [
        ("v5e:8x8", 1, 64, 15.75),
        ("v5p:4x4x4", 1, 64, 95.74),
        ("v6e:8x8", 2, 128, 31.25),
        ("tpu7x:2x2x1", 1, 8, 94.75),  # two devices a chip
        ("h100:8", 1, 8, 75.2),
    ],
)
def test_a_topology_has_devices_and_memory(
    name: str, slices: int, devices: int, gib: float
) -> None:
    topology = find(name, slices)
    assert (topology.devices, topology.usable_gib) == (devices, gib)
    assert topology.is_tpu == (name != "h100:8")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:8x9", r"v5e:8x9: no such .* nearest: .*v5e:8x8"),
        ("v6e:32x32", r"no such"),  # libtpu would describe it; nobody sells it
        ("v5litepod:8x8", r"GENERATION:CHIPS \(v4, v5e, v5p"),
        ("v5p-128", r"for example v5e:8x8, v5p:4x4x4"),
        ("h100", r"nearest: h100:"),
        ("h100:3", r"h100:1..8"),
        ("", r"no such"),
    ],
)
def test_unknown_hardware_is_an_error_with_the_nearest_names(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find(name)


@pytest.mark.parametrize(("name", "slices"), [("v6e:8x8", 0), ("h100:8", 2)])
def test_slices_are_of_tpus_and_one_or_more(name: str, slices: int) -> None:
    with pytest.raises(ConfigError, match=rf"--slices {slices}"):
        find(name, slices)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices"), [("v4:2x2x1", 1), ("v5e:2x2", 2), ("v5p:2x2x1", 1), ("tpu7x:2x2x1", 1)]
)
def test_libtpu_describes_as_many_devices(name: str, slices: int) -> None:
    topology = find(name, slices)
    before_jax_starts(topology)
    devices = topology.describe()
    assert len(devices) == topology.devices
    assert {device.platform for device in devices} == {"tpu"}


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        find("v5e:2x2").describe()


def test_gpus_are_simulated_by_as_many_devices() -> None:
    assert len(find("h100:8").describe()) == 8
    assert len(find("h100:2").describe()) == 2


def test_every_generation_offers_shapes_of_its_dimension() -> None:
    for name, generation in TPUS.items():
        sides = 2 if name in ("v5e", "v6e") else 3
        assert all(len(shape.split("x")) == sides for shape in generation.shapes)
        assert len(set(generation.shapes)) == len(generation.shapes)
    assert all(gib > 0 for gib in GPUS.values())
