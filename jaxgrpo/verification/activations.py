"""Our model on the clip: what every layer gives, and where it first leaves the original.

Legend: S tokens, N patches, U merged units, D width, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrpo.verification.checks import Check, Status, skipped
from jaxgrpo.verification.original import Dtype
from jaxgrpo.verification.prompts import Inputs
from models.attention import attend_causal
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import Qwen2_5_VL, abstract_model, prompt_valid
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.weights import load

LAYERS: Final = "layers"
LOGITS: Final = "logits"
PROSE: Final = "prose"

_GB: Final = 1e9


class TooLittleMemoryError(ValueError):
    """Not enough memory for the model."""


class Tolerance(NamedTuple):
    """How far apart correct results may be.

    Attributes:
      layer: norm of the difference of two token vectors, relative to theirs.
      logits: largest difference of two logits, in standard deviations of theirs.
    """

    layer: float
    logits: float


# Rounding alone: on a random model of 32 blocks and 36 layers, 256 wide, the layers of both sides
# are 6e-6 apart in float32 and 0.1 in bfloat16 (as far as each is from float32), the logits 2e-5
# and 0.3. A wrong constant, order or position is off by 1e-3 and more, which only float32 shows.
TOLERANCES: Final[Mapping[Dtype, Tolerance]] = {
    "float32": Tolerance(layer=1e-4, logits=5e-4),
    "bfloat16": Tolerance(layer=0.2, logits=1.0),
}

# Jane Austen, Pride and Prejudice (1813): prose that every general language model has read.
TEXT: Final = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of "
    "their daughters."
)
_GENERAL: Final = 32_000  # ids; smaller vocabularies are those of toys
_MOST_NATS: Final = 4.0  # a token of TEXT; chance is ln(V), about 12


# ---- memory ----


def bytes_needed(config: ModelConfig, dtype: Dtype) -> int:
    """Host memory for one model: its weights, and the largest once more while it is loaded."""
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(abstract_model(config)[1])]
    return (sum(sizes) + max(sizes)) * np.dtype(jnp.dtype(dtype)).itemsize


def check_memory(config: ModelConfig, dtype: Dtype) -> None:
    """Raises a `TooLittleMemoryError` where one model does not fit; there are never both."""
    need, free = bytes_needed(config, dtype), bytes_available()
    if free is None or need <= free:
        return
    remedies = "--no-logits checks everything that needs no such memory"
    if dtype == "float32" and bytes_needed(config, "bfloat16") <= free:
        remedies = f"--dtype bfloat16 needs half of it; {remedies}"
    raise TooLittleMemoryError(
        f"comparing the logits in {dtype} needs {need / _GB:.1f} GB of memory (one model at a "
        f"time), and {free / _GB:.1f} GB are available: {remedies}"
    )


def bytes_available() -> int | None:
    """Memory that this process may still take, on the host and on jax's device; None: unknown."""
    limits = [limit for limit in (_host(), _cgroup(), _device()) if limit is not None]
    return min(limits, default=None)


def _host() -> int | None:
    path = Path("/proc/meminfo")
    if path.is_file():
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    if os.name == "posix":  # macOS says how much there is, not how much is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; the file cache does not count, it gives way."""
    if not (folder / "memory.max").is_file():
        return None
    limit = (folder / "memory.max").read_text().strip()
    if limit == "max":
        return None
    rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(limit) - int(rows["anon"]) - int(rows["shmem"])


def _device() -> int | None:
    device = jax.local_devices()[0]
    statistics = None if device.platform == "cpu" else device.memory_stats()
    return None if statistics is None else statistics["bytes_limit"] - statistics["bytes_in_use"]


# ---- our side ----


class Run(NamedTuple):
    """What our model gives.

    Attributes:
      parts: by name, in order, f32[N | U | S, D] of one part of the model; "logits" is f32[S, V].
      prose: nats a token of TEXT, where the vocabulary is that of a general model.
    """

    parts: dict[str, np.ndarray]
    prose: float | None


def run(directory: Path, processor: Processor, given: Inputs, dtype: Dtype) -> Run:
    """Loads our model, runs the prompt and the prose, and puts the model away.

    Raises:
      FileNotFoundError, WeightError: see `models.qwen2_5_vl.weights.load`.
    """
    config = processor.config
    weights = load(directory, config, dtype=jnp.dtype(dtype))
    model = nnx.merge(abstract_model(config)[0], weights)
    del weights
    batch = jax.tree.map(lambda x: x[None], given.prompt)
    precision = "highest" if dtype == "float32" else "default"  # float32 means so on accelerators
    with jax.default_matmul_precision(precision):
        features, blocks = model.vision(
            batch.patches, batch.patch_hw, batch.window_index, batch.frame_index, keep=True
        )
        assert blocks is not None
        x = model.embed_prompt(batch, features)
        hidden, layers, logits = _decode(model, x, batch.positions, prompt_valid(batch))
        prose = None
        if config.text.vocab >= _GENERAL:
            prose = _loss(model, processor.encode(TEXT))
    parts = {f"vision block {i}": block[0] for i, block in enumerate(blocks)}
    parts["vision merger"] = features[0]
    parts |= {f"decoder layer {i}": layer[0] for i, layer in enumerate(layers)}
    parts |= {"final norm": hidden[0], "logits": logits[0]}
    kept = {name: np.asarray(part, np.float32) for name, part in parts.items()}
    del model, parts, blocks, layers, features, hidden, logits, x
    gc.collect()  # before the original is loaded
    return Run(kept, prose)


def _decode(model: Qwen2_5_VL, x: Any, positions: Any, valid: Any) -> tuple[Any, Any, Any]:
    """Hidden states [1, S, D], those of all layers [L, 1, S, D], and logits [1, S, V]."""

    def attention(q: Any, k: Any, v: Any, extra: Any, carry: Any) -> Any:
        return attend_causal(q, k, v, valid), carry, None

    hidden, _, layers = model.text(x, positions, attention, keep=True)
    return hidden, layers, model.logits(hidden)


def _loss(model: Qwen2_5_VL, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of the tokens but the first."""
    ids = tokens[None]
    positions = np.repeat(np.arange(len(tokens), dtype=np.int32)[None, :, None], 3, axis=2)
    valid = np.ones(ids.shape, bool)
    _, _, logits = _decode(model, model.text.embed_tokens(jnp.asarray(ids)), positions, valid)
    logp = jax.nn.log_softmax(logits[0, :-1])
    return -float(jnp.take_along_axis(logp, tokens[1:, None], axis=-1).mean())


# ---- comparison ----


def prose(loss: float | None, vocabulary: int) -> Check:
    """Whether the model has learnt to read: the one sign of exchanged tensors without a hash."""
    if loss is None:
        return skipped(PROSE, f"a vocabulary of {vocabulary} ids is no general language model's")
    chance = math.log(vocabulary)
    text = f"{loss:.2f} nats a token on a page of English prose; chance is {chance:.1f}"
    if loss <= _MOST_NATS:
        return Check(PROSE, Status.PASS, text)
    hint = (
        f"a trained language model has less than {_MOST_NATS:g}: are weights damaged or mixed up?"
    )
    return Check(PROSE, Status.WARN, text, (hint,))


def compare(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    dtype: Dtype,
    processor: Processor,
) -> list[Check]:
    """Every part of the model, the first that differs first, and the logits with greedy tokens."""
    tolerance = TOLERANCES[dtype]
    apart = {name: _relative(ours[name], theirs[name]) for name in theirs}
    bad = [name for name in apart if name != LOGITS and not apart[name].max() <= tolerance.layer]
    worst = max((name for name in apart if name != LOGITS), key=lambda name: apart[name].max())
    if bad:
        first = bad[0]
        layers = Check(
            LAYERS,
            Status.FAIL,
            f"{first} is the first of {len(bad)} parts that differ",
            (_worst(first, ours[first], theirs[first], apart[first], tolerance.layer),),
        )
    else:
        layers = Check(
            LAYERS,
            Status.PASS,
            f"{len(apart) - 1} parts in {dtype}, the worst is {worst}: relative difference "
            f"{apart[worst].max():.1e}, tolerance {tolerance.layer:g}",
        )
    return [layers, _logits(ours[LOGITS], theirs[LOGITS], tolerance.logits, processor)]


def _relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """f64[rows]: norms of the differences of rows, relative to theirs; infinite if not finite."""
    if ours.shape != theirs.shape:
        return np.array([np.inf])
    apart = np.linalg.norm(ours.astype(np.float64) - theirs, axis=-1)
    relative = apart / np.maximum(np.linalg.norm(theirs.astype(np.float64), axis=-1), 1e-30)
    return np.where(np.isfinite(relative), relative, np.inf)


def _worst(
    name: str, ours: np.ndarray, theirs: np.ndarray, apart: np.ndarray, tolerance: float
) -> str:
    if ours.shape != theirs.shape:
        return f"{name}: ours is {list(ours.shape)}, theirs {list(theirs.shape)}"
    row = int(apart.argmax())
    column = int(np.abs(ours[row] - theirs[row]).argmax())
    return (
        f"{name}[{row}, {column}]: ours {ours[row, column]:.6g}, theirs {theirs[row, column]:.6g}; "
        f"relative difference of row {row}: {apart[row]:.2e}, tolerance {tolerance:g}"
    )


def _logits(ours: np.ndarray, theirs: np.ndarray, tolerance: float, processor: Processor) -> Check:
    if ours.shape != theirs.shape:
        return Check(LOGITS, Status.FAIL, _worst(LOGITS, ours, theirs, np.zeros(1), tolerance))
    deviation = float(theirs.std())
    apart = np.abs(ours - theirs)
    row, column = (int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    error = float(apart[row, column]) / deviation if deviation else math.inf
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    ours_next, their_next = (
        repr(processor.tokenizer.decode([int(x[-1].argmax())])) for x in (ours, theirs)
    )
    text = (
        f"largest difference {error:.1e} standard deviations, tolerance {tolerance:g}; greedy "
        f"tokens agree at {same} of {len(ours)} positions; next token: ours {ours_next}, theirs "
        f"{their_next}"
    )
    if error <= tolerance:
        return Check(LOGITS, Status.PASS, text)
    place = (
        f"logits[{row}, {column}]: ours {ours[row, column]:.6g}, theirs {theirs[row, column]:.6g}"
    )
    return Check(LOGITS, Status.FAIL, text, (place,))
