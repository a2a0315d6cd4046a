"""PyTorch's side: transformers' model, sdpa attention, torch's AdamW.

usual  as TRL-style trainers do: `generate` with num_return_sequences = G, which encodes the video
       and prefills the prompt G times; forward and backward over G repeated prompts, in
       micro-batches where they would not fit, with logits of completion positions only.
best   what Hugging Face's model allows: the video is encoded once in each, the prompt is prefilled
       once and its cache repeated; the update still repeats the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from benchmarks.grpo.measure import Stopwatch, peak_rss_gib
from benchmarks.grpo.workload import PAD, SECONDS_PER_GRID, Workload
from models.qwen2_5_vl.processor import Prompt
from tests.oracle.hf_model import VIDEO, pixel_values
from tests.oracle.prompts import FIRST_TEXT_ID

Mode = Literal["usual", "best"]
LEARNING_RATE, CLIP_NORM = 1e-6, 1.0


class Side:
    """A model, its optimiser and the two halves of a step."""

    def __init__(self, workload: Workload, directory: Path, mode: Mode):
        self.workload, self.mode = workload, mode
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, workload.dtype)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).to(self.device)
        if workload.remat:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True
        )

    def inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """One row, as transformers' processor would make it, and the release's positions.

        Transformers 5 has others in `generate`, which does not take them.
        """
        tokens = torch.tensor(prompt.tokens[None], dtype=torch.long)
        media = {
            "pixel_values_videos": pixel_values(prompt).to(self.model.dtype),
            "video_grid_thw": torch.tensor([self.workload.video]),
            "second_per_grid_ts": torch.tensor([SECONDS_PER_GRID]),
            "mm_token_type_ids": (tokens == VIDEO).int() * 2,
            "position_ids": torch.tensor(prompt.positions.T[:, None], dtype=torch.long),
        }
        rows = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | media
        return {name: value.to(self.device) for name, value in rows.items()}

    # ---- rollout ----

    @torch.no_grad()
    def rollout(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[G, C] sampled ids."""
        self.model.eval()
        tokens = self._generate(inputs) if self.mode == "usual" else self._generate_shared(inputs)
        self.model.train()
        return tokens

    def _generate(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
        out = self.model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.workload.length,
            min_new_tokens=self.workload.length,
            num_return_sequences=self.workload.group,
            suppress_tokens=list(range(FIRST_TEXT_ID)),
            eos_token_id=None,
            pad_token_id=PAD,
        )
        return out[:, inputs["input_ids"].shape[1] :]

    def _generate_shared(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        group, length = self.workload.group, self.workload.length
        cache = DynamicCache(config=self.model.config.get_text_config())
        out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(group)
        next_position = inputs["position_ids"].max() + 1
        logits = out.logits[:, -1].expand(group, -1)
        drawn = []
        for step in range(length):
            probabilities = self.usable(logits).softmax(-1)
            drawn.append(torch.multinomial(probabilities, 1))
            if step == length - 1:
                break
            position = (next_position + step).expand(3, group, 1)
            out = self.model(
                input_ids=drawn[-1], position_ids=position, past_key_values=cache, use_cache=True
            )
            logits = out.logits[:, -1]
        return torch.cat(drawn, dim=1)

    @staticmethod
    def usable(logits: torch.Tensor) -> torch.Tensor:
        """float32 logits in which vision and padding ids are never drawn."""
        unusable = torch.arange(logits.shape[-1], device=logits.device) < FIRST_TEXT_ID
        return logits.float().masked_fill(unusable, float("-inf"))

    # ---- update ----

    def features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The video's, once."""
        found = self.model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
        return torch.cat(found.pooler_output)

    def log_probs(
        self, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, features: torch.Tensor | None
    ) -> torch.Tensor:
        """[G, C] of completions [G, C], their prompt repeated G times; None encodes the video."""
        group, length = tokens.shape
        ids = torch.cat([inputs["input_ids"].expand(group, -1), tokens], dim=1)
        prompt = inputs["position_ids"]
        after = prompt.max() + 1 + torch.arange(length, device=self.device)
        positions = torch.cat([prompt.expand(3, group, -1), after.expand(3, group, -1)], dim=-1)
        media = {
            "pixel_values_videos": inputs["pixel_values_videos"].repeat(group, 1),
            "video_grid_thw": inputs["video_grid_thw"].repeat(group, 1),
        }
        embeds = None
        if features is not None:
            embeds = self.model.get_input_embeddings()(ids)
            place = (ids == VIDEO)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(place, features.repeat(group, 1))
            ids, media = None, {}
        out = self.model(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=torch.ones(positions.shape[1:], dtype=torch.long, device=self.device),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=length + 1,
            **media,
        )
        logits = self.usable(out.logits[:, :-1])
        picked = logits.gather(2, tokens[..., None])[..., 0]
        return picked - logits.logsumexp(dim=-1)

    def update(
        self, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, advantages: torch.Tensor
    ) -> float:
        """One on-policy GRPO update; the norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        encoded = self.features(inputs) if self.mode == "best" else None
        features = None if encoded is None else encoded.detach().requires_grad_()
        size = self.workload.micro or len(tokens)
        for micro, advantage in zip(tokens.split(size), advantages.split(size), strict=True):
            logp = self.log_probs(inputs, micro, features)
            ratio = torch.exp(logp - logp.detach())
            loss = -(ratio * advantage[:, None]).sum() / tokens.numel()
            loss.backward()
        if encoded is not None and features is not None:
            encoded.backward(features.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        return norm.item()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """The most memory in use so far: on the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_rss_gib()


def run(workload: Workload, directory: Path, steps: int, mode: Mode) -> Iterator[dict[str, Any]]:
    """First the gradient's norm on given completions, then one dict per step."""
    side = Side(workload, directory, mode)
    prompts = [side.inputs(workload.prompt(seed)) for seed in range(steps + 1)]
    advantages = torch.tensor(workload.advantages(), device=side.device)
    given = torch.tensor(workload.completions(0), dtype=torch.long, device=side.device)
    side.rollout(prompts[0])  # a warm-up
    yield {"grad_norm": side.update(prompts[0], given, advantages)}

    for inputs in prompts[1:]:
        watch = Stopwatch()
        tokens = side.rollout(inputs)
        side.wait()
        watch.phase("rollout")
        side.update(inputs, tokens, advantages)
        side.wait()
        watch.phase("update")
        assert tokens.shape == (workload.group, workload.length)
        assert int(np.min(tokens.cpu().numpy())) >= FIRST_TEXT_ID
        yield watch.result() | {"gib": side.peak_gib()}
