"""GRPO in PyTorch, as plainly as it can be written: one full forward per completion, loops.

Nothing is shared, padded or chunked here, and nothing of ours is called: a completion's
log-probabilities come from transformers' Qwen2.5-VL on [prompt, completion], gradients from torch
autograd.

Legend: G completions of a prompt, C tokens of the longest completion (padded width), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from models.qwen2_5_vl.processor import Prompt
from tests.oracle import hf_model


class Group(NamedTuple):
    """One prompt, unpadded, and its completions, each of its own length."""

    prompt: Prompt
    image_grids: np.ndarray  # int64[_, 3]
    video_grids: np.ndarray  # int64[_, 3]
    completions: list[np.ndarray]  # G of int32[c]
    rewards: np.ndarray  # float32[G]
    old_logp: list[np.ndarray]  # G of float32[c]
    ref_logp: list[np.ndarray]  # G of float32[c]
    sampler_logp: list[np.ndarray]  # G of float32[c]
    finished: np.ndarray  # bool[G]: not truncated


class Objective(NamedTuple):
    """What is minimised, and the distribution that completions are drawn from."""

    clip_low: float
    clip_high: float
    kl: float
    entropy: float
    aggregation: str
    temperature: float
    usable: np.ndarray  # bool[V]
    width: int  # C
    dual_clip: float  # 0: off
    importance_cap: float  # 0: off
    mask_truncated: bool


def distribution(
    model: Qwen2_5_VLForConditionalGeneration,
    group: Group,
    completion: np.ndarray,
    temperature: float,
    usable: np.ndarray,
) -> torch.Tensor:
    """float32[c, V]: log-probabilities that a completion's tokens are drawn from."""
    logits = hf_model.logits(model, group.prompt, group.image_grids, group.video_grids, completion)
    first = len(group.prompt.tokens) - 1
    logits = logits[first : first + len(completion)] / temperature
    logits = logits.masked_fill(~torch.tensor(usable), float("-inf"))
    return torch.log_softmax(logits, dim=-1)


def log_probs_and_entropies(
    model: Qwen2_5_VLForConditionalGeneration,
    group: Group,
    completion: np.ndarray,
    temperature: float,
    usable: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32[c], float32[c]) of one completion's tokens."""
    log_p = distribution(model, group, completion, temperature, usable)
    index = torch.tensor(completion, dtype=torch.long)[:, None]
    log_p_usable = log_p[:, torch.tensor(usable)]
    return log_p.gather(1, index)[:, 0], -(log_p_usable.exp() * log_p_usable).sum(-1)


def advantages(rewards: np.ndarray, divide_by_std: bool = True) -> torch.Tensor:
    """float32[G] from float32[G]."""
    r = torch.tensor(rewards)
    return (r - r.mean()) / (r.std() + 1e-6) if divide_by_std else r - r.mean()


class Loss(NamedTuple):
    """The loss, with its graph, and how often its parts were at work."""

    value: torch.Tensor
    kl: float  # mean k3 over tokens
    entropy: float  # mean over tokens
    clipped_low: float  # share of the tokens whose gradient the lower clip stops
    clipped_high: float
    clipped_twice: float  # share of the tokens whose gradient the dual clip stops
    capped: float  # share of the tokens whose importance is cut


def grpo_loss(
    model: Qwen2_5_VLForConditionalGeneration, groups: Sequence[Group], objective: Objective
) -> Loss:
    """The loss of a step, token by token as in the papers."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    per_completion: list[torch.Tensor] = []  # the token losses of each completion
    kls: list[float] = []
    entropies: list[float] = []
    clipped_low = clipped_high = clipped_twice = capped = 0
    completions = 0
    for group in groups:
        for g, advantage in enumerate(advantages(group.rewards)):
            completions += 1
            if objective.mask_truncated and not group.finished[g]:
                continue
            logp, entropy = log_probs_and_entropies(
                model, group, group.completions[g], objective.temperature, objective.usable
            )
            losses = []
            for t in range(len(logp)):
                ratio = torch.exp(logp[t] - float(group.old_logp[g][t]))
                surrogate = torch.minimum(
                    ratio * advantage, torch.clamp(ratio, low, high) * advantage
                )
                if objective.dual_clip and advantage < 0:
                    surrogate = torch.maximum(surrogate, objective.dual_clip * advantage)
                    clipped_twice += int(ratio > objective.dual_clip)
                if objective.importance_cap:
                    gap = float(group.old_logp[g][t]) - float(group.sampler_logp[g][t])
                    surrogate = surrogate * min(np.exp(gap), objective.importance_cap)
                    capped += int(np.exp(gap) > objective.importance_cap)
                difference = float(group.ref_logp[g][t]) - logp[t]
                kl = torch.exp(difference) - difference - 1
                losses.append(-surrogate + objective.kl * kl - objective.entropy * entropy[t])
                kls.append(kl.item())
                entropies.append(entropy[t].item())
                clipped_low += int(ratio < low and advantage < 0)
                clipped_high += int(ratio > high and advantage > 0)
            per_completion.append(torch.stack(losses))
    tokens = sum(len(x) for x in per_completion)
    value = {
        "sequence": lambda: torch.stack([x.mean() for x in per_completion]).mean(),
        "token": lambda: torch.cat(per_completion).mean(),
        "constant": lambda: torch.cat(per_completion).sum() / (completions * objective.width),
    }[objective.aggregation]()
    return Loss(
        value,
        float(np.mean(kls)),
        float(np.mean(entropies)),
        clipped_low / tokens,
        clipped_high / tokens,
        clipped_twice / tokens,
        capped / tokens,
    )


def cross_entropy(
    model: Qwen2_5_VLForConditionalGeneration,
    groups: Sequence[Group],
    temperature: float,
    usable: np.ndarray,
) -> torch.Tensor:
    """The mean negative log-probability over all completion tokens, with its graph."""
    logps = [
        log_probs_and_entropies(model, group, completion, temperature, usable)[0]
        for group in groups
        for completion in group.completions
    ]
    return -torch.cat(logps).mean()


def gradients(
    model: Qwen2_5_VLForConditionalGeneration, loss: torch.Tensor
) -> dict[str, np.ndarray]:
    """Gradients by released name; a tied head's is part of the embedding's."""
    model.zero_grad()
    loss.backward()
    return {
        hf_model.released(name): weight.grad.numpy().copy()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
