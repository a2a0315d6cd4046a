"""Accelerators by name, to plan for without having them: which there are, and their memory.

A TPU slice is named `GENERATION:SHAPE` by its chips, such as v5p:4x4x4 or v6e:8x8; GPUs of one node
are `KIND:COUNT`, such as h100:8. libtpu describes any shape that it is asked for, real or not, so
the shapes that Cloud TPU sells are listed here.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxgrpo.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One generation of TPUs."""

    usable_gib: float  # HBM of a device that a program may use, as libtpu enforces it
    devices_per_chip: int
    shapes: tuple[str, ...]  # in chips
    options: tuple[tuple[str, Any], ...] = ()  # for libtpu


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
)
TPUS = {
    "v4": Generation(30.75, 1, _CUBE, (("chip_config_name", "megacore"),)),
    "v5e": Generation(15.75, 1, _PLANE),
    "v5p": Generation(95.74, 1, (*_CUBE, "16x16x24")),
    "v6e": Generation(31.25, 1, _PLANE),
    "tpu7x": Generation(94.75, 2, _CUBE),
}
# Memory in GiB that XLA may allocate with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
GPUS = {"a100-80gb": 75.2, "h100": 75.2, "h200": 133.0}


@dataclass(frozen=True)
class Topology:
    """The devices of one job.

    Attributes:
      name: as the user spells it.
      slices: TPU slices of that shape; 1 for GPUs.
      devices: how many, over all slices.
      usable_gib: memory of each.
      is_tpu: whether programs can be compiled for it here.
    """

    name: str
    slices: int
    devices: int
    usable_gib: float
    is_tpu: bool

    def describe(self) -> Sequence[Any]:
        """Devices to compile for: libtpu's description of the slices, or simulated ones for GPUs.

        Raises:
          ConfigError: libtpu is not installed, or jax already runs with fewer simulated devices.
        """
        if not self.is_tpu:
            if len(jax.devices()) < self.devices:
                raise ConfigError(
                    f"{self.name} needs {self.devices} simulated devices, but jax has already "
                    f"started with {len(jax.devices())}: plan in a process of its own"
                )
            return jax.devices()[: self.devices]
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"planning for {self.name} needs the TPU compiler (no TPU): pip install -e '.[tpu]'"
            )
        generation, shape = self.name.split(":")
        options = dict(TPUS[generation].options)
        if shape == "1x1":
            options["chips_per_host_bounds"] = [1, 1, 1]
        if self.slices > 1:
            options["num_slices"] = self.slices
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}", **options
        ).devices


def find(name: str, slices: int = 1) -> Topology:
    """The topology of a name.

    Raises:
      ConfigError: there is no such hardware; the nearest names are given.
    """
    kind, _, size = name.partition(":")
    if slices < 1 or (slices > 1 and kind not in TPUS):
        raise ConfigError(f"--slices {slices}: TPU slices are 1 or more, and GPUs have none")
    if kind in TPUS and size in TPUS[kind].shapes:
        chips = 1
        for side in size.split("x"):
            chips *= int(side)
        devices = chips * TPUS[kind].devices_per_chip * slices
        return Topology(name, slices, devices, TPUS[kind].usable_gib, is_tpu=True)
    if kind in GPUS and size in {"1", "2", "4", "8"}:
        return Topology(name, 1, int(size), GPUS[kind], is_tpu=False)
    known = [f"{k}:{shape}" for k, generation in TPUS.items() for shape in generation.shapes]
    known += [f"{k}:{count}" for k in GPUS for count in (1, 2, 4, 8)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"--topology {name}: no such slice or node; {'nearest: ' + ', '.join(near) if near else ''}"
        f"{'; ' if near else ''}TPU slices are GENERATION:CHIPS ({', '.join(TPUS)}; for example "
        f"v5e:8x8, v5p:4x4x4), GPUs of one node are {', '.join(f'{k}:1..8' for k in GPUS)}"
    )


def before_jax_starts(topology: Topology) -> None:
    """Sets the process up for planning: on the CPU, and libtpu without a TPU.

    Call it before anything touches a device.
    """
    jax.config.update("jax_platforms", "cpu")
    if not topology.is_tpu:
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # unread, but missed
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    }.items():
        os.environ.setdefault(variable, value)
