"""Every test sees 8 simulated CPU devices. Set here, before anything imports jax."""

import os

from hypothesis import settings

DEVICES = "--xla_force_host_platform_device_count=8"
QUICK_COMPILES = "--xla_backend_optimization_level=0"  # tests compile much and run it once

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {QUICK_COMPILES}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# pytest-xdist runs a process per core: one thread each for torch and BLAS is enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A busy machine is slow; the wall time of an example says nothing about it.
settings.register_profile("jaxgrpo", deadline=None)
settings.load_profile("jaxgrpo")
