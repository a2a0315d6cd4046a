"""Devices of TPU slices that programs are compiled for, on a machine without one."""

from __future__ import annotations

import os

import numpy as np
import pytest
from jax.experimental import topologies

_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several test processes at once
}


def tpu_devices(topology: str) -> np.ndarray:
    """The devices of `topology`, e.g. v5e:2x4; the test is skipped where libtpu is missing."""
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        for key in _NO_TPU_HERE.keys() - os.environ.keys():
            patch.setenv(key, _NO_TPU_HERE[key])
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(described.devices)
