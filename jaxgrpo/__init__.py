"""GRPO post-training of video LLMs in JAX.

Importing this package is free: jax and the model are imported by the commands that need them.
"""

__version__ = "0.1.0"
