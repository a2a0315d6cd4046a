"""Small models and steps that the tests of this folder share: ours and the original side by side.

Legend: P prompts, G completions per prompt, C completion tokens (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from jaxgrpo.config import GrpoSection
from jaxgrpo.grpo import group_advantages
from jaxgrpo.policy import Params, Policy, Vocabulary
from jaxgrpo.update import UpdateBatch
from models.attention_backend import XLA
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.processor import Prompt, collate
from models.qwen2_5_vl.sizes import Size
from models.qwen2_5_vl.weights import load, released_tensors
from tests.oracle import hf_model, torch_grpo
from tests.oracle.prompts import grids, random_prompt
from tests.oracle.torch_grpo import Group, Objective

VOCAB = 320
PAD, STOP = 0, 6
TEMPERATURE = 0.7
# Below 6 are vision and padding ids; the last twenty rows belong to no token.
USABLE = (np.arange(VOCAB) >= STOP) & (np.arange(VOCAB) < 300)
Layout = Sequence[int | Grid]

# Mixed sizes, ragged windows (8 x 8 patches are whole), two videos in one prompt.
LAYOUTS: list[Layout] = [
    [3, Grid(2, 6, 10), 4],
    [2, Grid(3, 10, 4), 3, Grid(2, 4, 4), 2],
    [4, Grid(2, 8, 8), 6],
    [2, Grid(2, 2, 18), 5],
]


class SmallModel(NamedTuple):
    """The original and ours, with the same random weights."""

    original: Qwen2_5_VLForConditionalGeneration
    policy: Policy
    params: Params


def small_model(
    directory: Path, *, tied: bool, temperature: float = TEMPERATURE, **config_json: Any
) -> SmallModel:
    """A model of 100k random float32 weights, ours loaded from a released-style directory."""
    raw = hf_model.released_config(tied=tied, vocab=VOCAB, **config_json)
    original = hf_model.random_model(raw, seed=3)
    hf_model.save_released(original, raw, directory)
    config = ModelConfig.load(directory)
    policy = Policy(
        config=config,
        graphdef=abstract_model(config)[0],
        vocabulary=Vocabulary(USABLE, (STOP,), PAD),
        temperature=temperature,
        compute_dtype=jnp.dtype("float32"),
        remat="none",
        logit_chunk=0,
        backend=XLA,
    )
    return SmallModel(original, policy, load(directory, config))


def bucket_of(prompts: Sequence[Prompt], slack: int = 4) -> Size:
    """A bucket that holds every prompt with room to spare, so that every prompt is padded."""
    size = Size(*(slack + np.max([prompt.size for prompt in prompts], axis=0)))
    return size._replace(patches=-(-size.patches // 4) * 4)


def random_groups(
    small: SmallModel,
    *,
    group: int,
    width: int,
    seed: int,
    layouts: Sequence[Layout] = LAYOUTS,
) -> list[Group]:
    """Prompts, completions of lengths 1 to `width` and rewards, with old and reference policies.

    Old and reference log-probabilities are the current ones plus noise, wide enough that both
    sides of the clip are at work.
    """
    rng, others = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    groups = []
    for layout in layouts:
        prompt = random_prompt(rng, layout, vocab=VOCAB, seconds_per_grid=1.3)
        lengths = [width, 1, *rng.integers(1, width + 1, group)][:group]
        lengths = lengths if group > 1 else [width]
        completions = [rng.choice(np.flatnonzero(USABLE), n).astype(np.int32) for n in lengths]
        rewards = rng.choice([0.0, 0.25, 0.5, 1.0], group).astype(np.float32)
        finished = others.random(group) < 0.7
        one = Group(prompt, *grids(layout), completions, rewards, [], [], [], finished)
        for completion in completions:
            with torch.no_grad():
                logp, _ = torch_grpo.log_probs_and_entropies(
                    small.original, one, completion, TEMPERATURE, USABLE
                )
            for past, spread in ((one.old_logp, 0.5), (one.ref_logp, 0.8)):
                noise = rng.normal(0, spread, len(completion))
                past.append((logp.numpy() + noise).astype(np.float32))
            noise = others.normal(0, 0.3, len(completion))
            one.sampler_logp.append((one.old_logp[-1] + noise).astype(np.float32))
        groups.append(one)
    return groups


def objective(config: GrpoSection, width: int) -> Objective:
    """The same loss for the PyTorch side."""
    return Objective(
        config.clip_low,
        config.clip_high,
        config.kl,
        config.entropy,
        config.aggregation,
        TEMPERATURE,
        USABLE,
        width,
        config.dual_clip,
        config.importance_cap,
        config.mask_truncated,
    )


def padded(rows: list[list[np.ndarray]], width: int, fill: float, dtype: Any) -> np.ndarray:
    """[P][G] of [c] -> [P, G, C], filled on the right."""
    out = np.full((len(rows), len(rows[0]), width), fill, dtype)
    for p, row in enumerate(rows):
        for g, values in enumerate(row):
            out[p, g, : len(values)] = values
    return out


def update_batch(groups: list[Group], width: int) -> UpdateBatch:
    """The step as our update takes it: padded, prompts once."""
    prompts = [group.prompt for group in groups]
    rewards = np.stack([group.rewards for group in groups])
    old_logp = padded([group.old_logp for group in groups], width, 0.0, np.float32)
    return UpdateBatch(
        prompt=collate(prompts, bucket_of(prompts), PAD),
        features=None,
        completions=padded([group.completions for group in groups], width, PAD, np.int32),
        lengths=np.array([[len(c) for c in group.completions] for group in groups], np.int32),
        finished=np.stack([group.finished for group in groups]),
        advantages=group_advantages(jnp.asarray(rewards)),
        sampler_logp=padded([group.sampler_logp for group in groups], width, 0.0, np.float32),
        old_logp=old_logp,
        ref_logp=padded([group.ref_logp for group in groups], width, 0.0, np.float32),
    )


def repeated(batch: UpdateBatch) -> UpdateBatch:
    """P prompts with G completions -> P * G prompts with one completion each."""
    group = batch.completions.shape[1]

    def per_completion(x: Any) -> Any:
        return jnp.reshape(x, (-1, 1, *x.shape[2:]))

    return UpdateBatch(
        jax.tree.map(lambda x: np.repeat(x, group, axis=0), batch.prompt),
        None,
        *(per_completion(x) for x in batch[2:]),
    )


def relative_differences(ours: Params, theirs: dict[str, np.ndarray], config: ModelConfig) -> Any:
    """Released name -> norm of the difference / norm of theirs, for every tensor of ours."""
    mine = dict(released_tensors(ours, config))
    assert mine.keys() == theirs.keys()
    return {
        name: float(np.linalg.norm(mine[name] - theirs[name]) / np.linalg.norm(theirs[name]))
        for name in mine
    }


def fast_jit(function: Callable[..., Any]) -> Any:
    """`jax.jit` that spends a third of the time compiling: the same program, less optimised."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def tree_differences(ours: Params, theirs: Params) -> dict[str, float]:
    """Path -> norm of the difference / norm of theirs."""
    flat = jax.tree_util.tree_leaves_with_path(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return {
        jax.tree_util.keystr(path): float(
            np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))
        )
        for (path, b), a in zip(flat, jax.tree.leaves(ours), strict=True)
    }
