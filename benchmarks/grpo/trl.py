"""TRL's side: its GRPOTrainer as it is, on the text part, with transformers' `generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo.measure import Stopwatch, peak_rss_gib
from benchmarks.grpo.text import half_right, prompts, tokenizer
from benchmarks.grpo.workload import Workload

LEARNING_RATE, CLIP_NORM = 1e-6, 1.0


class Clock(TrainerCallback):
    """Times the trainer's steps: what is in front of the reward is the rollout."""

    def __init__(self, length: int) -> None:
        self.steps: list[dict[str, Any]] = []
        self._length = length
        self._watch = Stopwatch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._watch = Stopwatch()

    def reward(self, completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        self._watch.phase("rollout")
        assert all(len(ids) == self._length for ids in completion_ids)
        rewards = half_right(completions)
        self._watch.phase("rewards")
        return rewards

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._watch.phase("update")
        self.steps.append(self._watch.result() | {"gib": peak_rss_gib()})


def make_trainer(workload: Workload, model: Path, steps: int, clock: Clock) -> GRPOTrainer:
    """One prompt and its group a step, as the other sides; no reference, no vLLM."""
    settings = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        per_device_train_batch_size=workload.group,
        gradient_accumulation_steps=1,
        num_generations=workload.group,
        max_completion_length=workload.length,
        gradient_checkpointing=workload.remat,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        max_grad_norm=CLIP_NORM,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dtype = getattr(torch, workload.dtype)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa"),
        reward_funcs=clock.reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts(workload, steps)}),
        processing_class=tokenizer(workload.vocab),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for figures
    return trainer


def gradient_norm(trainer: GRPOTrainer, workload: Workload) -> float:
    """Of the trainer's own loss, on given completions."""
    prompt = torch.tensor(workload.prompt(0).tokens, dtype=torch.long)
    tokens = torch.tensor(workload.completions(0), dtype=torch.long)
    ids = prompt.expand(workload.group, -1)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": tokens,
        "completion_mask": torch.ones_like(tokens),
        "advantages": torch.tensor(workload.advantages()),
        "num_items_in_batch": torch.tensor(tokens.numel()),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in trainer.model.parameters() if p.grad is not None]
    )
    trainer.model.zero_grad(set_to_none=True)
    return norm.item()


def run(workload: Workload, model: Path, steps: int) -> Iterator[dict[str, Any]]:
    """First the gradient's norm on given completions, then one dict per step after a warm-up."""
    clock = Clock(workload.length)
    trainer = make_trainer(workload, model, steps + 1, clock)
    norm = gradient_norm(trainer, workload)
    yield {"grad_norm": norm, "versions": {"trl": version("trl")}}
    trainer.train()
    yield from clock.steps[1:]
