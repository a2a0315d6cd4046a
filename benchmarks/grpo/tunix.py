"""Tunix's side: its GRPOLearner as it is, on the text part, with its own sampler."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import optax
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.grpo.measure import Stopwatch, peak_rss_gib
from benchmarks.grpo.text import half_right, prompts, tokenizer
from benchmarks.grpo.workload import Workload, raw_config

LEARNING_RATE, CLIP_NORM = 1e-6, 1.0
WARM_UP: Final = 2  # steps that compile


class Clock:
    """A reward function: what lies between two calls is an update and the next rollout."""

    __name__ = "clock"

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._watch: Stopwatch | None = None

    def __call__(self, prompts: Any, completions: list[str], **_: Any) -> list[float]:
        if self._watch is not None:
            self._watch.phase("step")
            self.steps.append(self._watch.result() | {"gib": peak_rss_gib()})
        self._watch = Stopwatch()
        return half_right(completions)


def run(workload: Workload, model: Path, steps: int) -> Iterator[dict[str, Any]]:
    """First the version, then one dict per step after the warm-up; no gradient to compare."""
    raw = raw_config(workload.model)
    heads = raw["num_attention_heads"]
    sizes = qwen2.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=heads,
        head_dim=raw["hidden_size"] // heads,
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    count = WARM_UP + steps + 1  # the last one's update is not seen
    cluster = rl_cluster.RLCluster(
        actor=create_model_from_safe_tensors(str(model), sizes, mesh, dtype=workload.dtype),
        tokenizer=tokenizer(workload.vocab),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(CLIP_NORM),
                    optax.adamw(LEARNING_RATE, weight_decay=0.01),
                ),
                eval_every_n_steps=count + 1,
                max_steps=count,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=workload.length,
                max_prompt_length=workload.text,
                kv_cache_size=workload.text + workload.length,
                temperature=1.0,
            ),
        ),
    )
    clock = Clock()
    learner = GRPOLearner(
        rl_cluster=cluster,
        reward_fns=clock,
        algo_config=GRPOConfig(num_generations=workload.group, beta=0.0),
    )
    yield {"versions": {"google-tunix": version("google-tunix")}}
    learner.train([{"prompts": np.array([text])} for text in prompts(workload, count)])
    yield from clock.steps[WARM_UP:]
