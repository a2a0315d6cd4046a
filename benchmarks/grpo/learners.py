"""Other trainers on text alone: TRL's GRPOTrainer and Tunix's GRPOLearner, as they come.

Each runs its own loop, with models of the workload's sizes and random weights of its own. A step is
what lies between two calls of the reward function: an update, the weights' way to the sampler, and
the next rollout. Completions are never ended: all have full length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from benchmarks.grpo.measure import Stopwatch, peak_rss_gib
from benchmarks.grpo.workload import Workload, raw_config

WARM_UP: Final = 2  # steps that are not measured: they compile
PAD, EOS = "<pad>", "<eos>"
LEARNING_RATE = 1e-6


class Steps:
    """A reward function that takes the time: half of each group is right."""

    __name__ = "steps"

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []
        self._watch: Stopwatch | None = None

    def __call__(self, prompts: Any, completions: list[str], **_: Any) -> list[float]:
        if self._watch is not None:
            self._watch.phase("step")
            self.measured.append(self._watch.result() | {"gib": peak_rss_gib()})
        self._watch = Stopwatch()
        return [float(row % 2) for row in range(len(completions))]


def words(vocab: int) -> Any:
    """A tokenizer of the words w2, w3, ...: a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {PAD: 0, EOS: 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def texts(workload: Workload, count: int) -> list[str]:
    """So many prompts of random words."""
    rng = np.random.default_rng(0)
    rows = rng.integers(2, workload.vocab, (count, workload.text))
    return [" ".join(f"w{token}" for token in row) for row in rows]


def run_trl(workload: Workload, steps: int) -> Iterator[dict[str, Any]]:
    """Steps of TRL's trainer, without vLLM; what it is goes first."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    raw = raw_config(workload.model)
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{name: raw[name] for name in names})
    )
    count = WARM_UP + steps
    timer = Steps()
    with tempfile.TemporaryDirectory() as folder:
        section = trl.GRPOConfig(
            output_dir=folder,
            max_steps=count + 1,
            per_device_train_batch_size=workload.group,
            gradient_accumulation_steps=1,
            num_generations=workload.group,
            max_completion_length=workload.length,
            generation_kwargs={"min_new_tokens": workload.length},
            beta=0.0,
            learning_rate=LEARNING_RATE,
            bf16=False,
            gradient_checkpointing=workload.remat,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=timer,
            args=section,
            train_dataset=Dataset.from_dict({"prompt": texts(workload, count + 1)}),
            processing_class=words(workload.vocab),
        )
        trainer.train()
    yield {"versions": {"trl": trl.__version__}}
    yield from timer.measured[WARM_UP:]


def run_tunix(workload: Workload, steps: int) -> Iterator[dict[str, Any]]:
    """Steps of Tunix's learner with its own sampler; what it is goes first."""
    from importlib.metadata import version

    import jax
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    raw = raw_config(workload.model)
    heads = raw["num_attention_heads"]
    model = qwen2.Qwen2(
        qwen2.ModelConfig(
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
        ),
        rngs=nnx.Rngs(0),
    )
    count = WARM_UP + steps + 1
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=words(workload.vocab),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(LEARNING_RATE),
                eval_every_n_steps=count + 1,
                max_steps=count,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=workload.length,
                max_prompt_length=workload.text,
                kv_cache_size=workload.text + workload.length,
                temperature=1.0,
                eos_tokens=[workload.vocab],  # no such token
            ),
        ),
    )
    timer = Steps()
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=timer,
        algo_config=grpo_learner.GRPOConfig(num_generations=workload.group, beta=0.0),
    )
    learner.train([{"prompts": np.array([text])} for text in texts(workload, count)])
    yield {"versions": {"google-tunix": version("google-tunix")}}
    yield from timer.measured[WARM_UP:]
