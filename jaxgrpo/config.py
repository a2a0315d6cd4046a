"""The configuration: one tree of frozen dataclasses, read from YAML and `key=value` overrides.

The defaults are those of a Qwen2.5-VL-3B run as the paper's released script sets them, where it
says; a config file holds only what differs. Reading is strict: an unknown key, a wrong type and a
value out of range are `ConfigError`s that name the key, what was expected and what was found.

A run may be resumed with another value of a key marked `resumable` (how long, how often, on what
machine), never of one that decides what is learnt: see `check_resume`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from jaxgrpo import strict_yaml
from jaxgrpo.checks import RESUMABLE as _RESUMABLE
from jaxgrpo.checks import above_zero as _above_zero
from jaxgrpo.checks import at_least as _at_least
from jaxgrpo.checks import check as _check
from jaxgrpo.data_config import DataSection
from jaxgrpo.lora_config import LoraSection
from jaxgrpo.reward_config import RewardSection
from jaxgrpo.select_config import SelectSection
from jaxgrpo.strict_yaml import ConfigError


@dataclass(frozen=True)
class ModelSection:
    """Which model, and how it is computed."""

    path: str  # a Hugging Face directory, here or in a bucket (gs://...), or a hub id
    init: Literal["checkpoint", "random"] = "checkpoint"  # random: only the sizes are read
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # master weights are float32
    # What of a layer is kept for the backward pass: all; what products give; its input alone.
    remat: Literal["none", "products", "layer"] = "layer"
    freeze_vision: bool = False
    logit_chunk: int = 64  # completion positions whose logits exist at once in the update; 0: all
    attention_chunk: int = 256  # xla: queries of a prompt whose scores exist at once; 0: all
    attention: Literal["auto", "xla", "splash", "cudnn"] = field(
        default="auto", metadata=_RESUMABLE
    )  # what computes attention over whole sequences; auto: splash on TPUs, cudnn on GPUs, else xla

    def __post_init__(self) -> None:
        _check("model.path", self.path, bool(self.path), "a model directory or a hub id")
        _at_least("model", self, logit_chunk=0, attention_chunk=0)


@dataclass(frozen=True)
class RolloutSection:
    """How completions are sampled."""

    prompts: int = 16  # P, prompts in a step
    group: int = 8  # G, completions per prompt
    max_new_tokens: int = 512  # C; the paper allows 2,048
    temperature: float = 1.0
    top_p: float = 1.0  # 1: the whole distribution
    top_k: int = 0  # 0: the whole distribution
    # Lengths, besides C, that the update is compiled for: a step learns from as many tokens as its
    # longest completion needs.
    length_buckets: tuple[int, ...] = ()
    # Further rollouts in a step, at most, for prompts in the place of those whose rewards are all
    # equal (DAPO's dynamic sampling, arXiv 2503.14476).
    refills: int = 0

    def __post_init__(self) -> None:
        _at_least("rollout", self, prompts=1, max_new_tokens=1, top_k=0, refills=0)
        _check(
            "rollout.group",
            self.group,
            self.group >= 2,
            "2 or more: a group of one has no advantage, it is compared with itself",
        )
        _check(
            "rollout.temperature",
            self.temperature,
            self.temperature > 0,
            "more than 0: equal completions teach nothing (evaluation is greedy by itself)",
        )
        rising = all(a < b for a, b in pairwise((0, *self.length_buckets, self.max_new_tokens)))
        _check(
            "rollout.length_buckets",
            list(self.length_buckets),
            rising,
            "numbers of tokens in rising order, below rollout.max_new_tokens "
            f"({self.max_new_tokens}), for example [128, 256]",
        )
        _check("rollout.top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")


@dataclass(frozen=True)
class GrpoSection:
    """The loss (arXiv 2402.03300; clip-higher: DAPO, arXiv 2503.14476; Dr.GRPO: 2503.20783).

    See docs/method.md. With one update per rollout the ratio is exactly 1 and nothing is clipped.
    """

    updates: int = 1  # per rollout, each from all of it; GRPO's mu
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float = 0.0  # the most, above 1, that the ratio counts against a completion; 0: off
    # The most that a token counts for being likelier to the trainer than to the sampler; 0: off.
    importance_cap: float = 0.0
    mask_truncated: bool = False  # learn nothing from completions cut at rollout.max_new_tokens
    kl: float = 0.01  # weight of the k3 estimate of the KL to the reference; 0: no reference
    entropy: float = 0.001  # weight of the entropy bonus
    aggregation: Literal["sequence", "token", "constant"] = "sequence"  # GRPO, DAPO, Dr.GRPO
    divide_by_std: bool = True  # divide advantages by the group's deviation; Dr.GRPO does not

    def __post_init__(self) -> None:
        _check("grpo.clip_low", self.clip_low, 0 < self.clip_low <= 1, "more than 0 and at most 1")
        _above_zero("grpo", self, "clip_high")
        _at_least("grpo", self, kl=0, entropy=0, updates=1, importance_cap=0)
        clips = self.dual_clip == 0 or self.dual_clip > 1
        _check("grpo.dual_clip", self.dual_clip, clips, "more than 1, for example 3, or 0 for none")


@dataclass(frozen=True)
class OptimSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-6  # the peak
    warmup_steps: int = 0  # linear, from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, to 0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # of the gradient over all weights
    # Of AdamW's first moment. The second stays float32: near its mean it moves by a thousandth a
    # step, which bfloat16 would round away.
    first_moment: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1  # micro-batches per update

    def __post_init__(self) -> None:
        _above_zero("optim", self, "learning_rate", "eps", "clip_norm")
        _at_least("optim", self, warmup_steps=0, weight_decay=0, accumulate=1)
        _check("optim.b1", self.b1, 0 <= self.b1 < 1, "at least 0 and below 1")
        _check("optim.b2", self.b2, 0 <= self.b2 < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class TrainSection:
    """`jaxgrpo train`."""

    steps: int = field(
        default=500, metadata=_RESUMABLE
    )  # a decaying learning rate follows the new end
    max_nonfinite_steps: int = field(
        default=3, metadata=_RESUMABLE
    )  # skipped in a row before the run stops

    def __post_init__(self) -> None:
        _at_least("train", self, steps=1, max_nonfinite_steps=1)


@dataclass(frozen=True)
class SftSection:
    """`jaxgrpo sft`."""

    steps: int = field(
        default=500, metadata=_RESUMABLE
    )  # a decaying learning rate follows the new end
    batch: int = 16  # examples in a step

    def __post_init__(self) -> None:
        _at_least("sft", self, steps=1, batch=1)


@dataclass(frozen=True)
class EvalSection:
    """Greedy evaluation, during training and as a command."""

    every: int = 50  # steps; 0: only before the first step and after the last
    batch: int = 16  # prompts in a batch
    max_new_tokens: int | None = None  # null: as rollout.max_new_tokens
    limit: int = 0  # items evaluated; 0: all

    def __post_init__(self) -> None:
        _at_least("eval", self, every=0, batch=1, limit=0)
        if self.max_new_tokens is not None:
            _at_least("eval", self, max_new_tokens=1)


Score = Literal[
    "tvg/mIoU",
    "tvg/R1@0.3",
    "tvg/R1@0.5",
    "tvg/R1@0.7",
    "mcqa/accuracy",
    "gqa/accuracy",
    "gqa/mIoU",
    "gqa/acc_at_iou0.5",
    "number/accuracy",
    "regression/score",
    "ocr/score",
    "text/rouge",
    "format",
    "reward/total",
]  # of `evaluate.summarise`, those that are better the higher they are


@dataclass(frozen=True)
class CheckpointSection:
    """When the run can be resumed from."""

    every: int = 50  # steps; the last step is always saved, and the one that SIGTERM interrupts
    keep: int = 3  # newest checkpoints kept; with 1 there is none to go back to after damage
    best: Score | None = None  # an evaluation's score: the checkpoint with the highest is kept too
    hash_gib: float = 64.0  # SHA-256 of checkpoints up to this size, in GiB; of others only file
    # sizes are noted and checked; 0: of all

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, every=1, keep=1, hash_gib=0)


@dataclass(frozen=True)
class MeshSection:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int = -1  # -1: the devices that the other axes leave
    fsdp: int = 1
    tensor: int = 1
    replicate_kv: bool = False  # let tensor exceed the key/value heads: every device holds all

    def __post_init__(self) -> None:
        _at_least("mesh", self, fsdp=1, tensor=1)
        _check("mesh.data", self.data, self.data == -1 or self.data >= 1, "-1 (the rest), or 1 up")


@dataclass(frozen=True)
class LogSection:
    """What the run writes down."""

    every: int = 1  # steps between lines of metrics.jsonl
    samples: int = 4  # prompts per logged step whose first completion is kept; -1: all completions
    tensorboard: bool = True
    wandb: str = ""  # project at Weights & Biases to log to as well; empty: none

    def __post_init__(self) -> None:
        _at_least("log", self, every=1, samples=-1)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    run_dir: str = field(metadata=_RESUMABLE)  # a folder, or gs://...: checkpoints, metrics, curves
    model: ModelSection
    data: DataSection
    seed: int = 0
    rollout: RolloutSection = field(default_factory=RolloutSection)
    reward: RewardSection = field(default_factory=RewardSection)
    grpo: GrpoSection = field(default_factory=GrpoSection)
    lora: LoraSection = field(default_factory=LoraSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    sft: SftSection = field(default_factory=SftSection)
    select: SelectSection = field(default_factory=SelectSection)
    eval: EvalSection = field(default_factory=EvalSection, metadata=_RESUMABLE)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection, metadata=_RESUMABLE)
    mesh: MeshSection = field(default_factory=MeshSection, metadata=_RESUMABLE)
    log: LogSection = field(default_factory=LogSection, metadata=_RESUMABLE)
    compilation_cache: str = field(
        default="", metadata=_RESUMABLE
    )  # folder or bucket path that keeps compiled programs for the next start ("{run_dir}" in it is
    # that key's value, and all hosts of a job should see it); empty: none
    profile: str = field(
        default="", metadata=_RESUMABLE
    )  # steps:10-12: `train` writes a jax.profiler trace of those to run_dir/profile; empty: none

    def __post_init__(self) -> None:
        _check("run_dir", self.run_dir, bool(self.run_dir), "the folder of the run")
        _check("seed", self.seed, 0 <= self.seed < 2**31, "a number from 0 to 2147483647")
        _check(
            "compilation_cache",
            self.compilation_cache,
            not set("{}") & set(self.compilation_cache.replace("{run_dir}", "")),
            "a folder or bucket path, with no other braces than {run_dir}",
        )
        profiled_steps(self.profile)
        manifests = (self.data.train, self.data.mixture, self.data.eval, self.data.eval_mixture)
        if self.data.synthetic is None and not any(manifests):
            raise ConfigError(
                "no data: set data.train and data.eval to JSONL manifests (`eval` needs only the "
                "second), data.mixture and data.eval_mixture to several, or set data.synthetic"
            )
        _check(
            "lora.targets",
            list(self.lora.targets),
            not (self.lora.vision and self.model.freeze_vision),
            "no target of the vision tower with model.freeze_vision=true",
        )
        _check(
            "lora.rank",
            self.lora.rank,
            self.lora.rank == 0 or self.model.init == "checkpoint",
            "0 with model.init=random: random weights that are frozen are kept nowhere",
        )
        evaluated = self.eval.every and self.eval.every % self.checkpoint.every == 0
        _check(
            "eval.every",
            self.eval.every,
            self.checkpoint.best is None or bool(evaluated),
            f"a multiple of checkpoint.every ({self.checkpoint.every}), so that every evaluation "
            "that checkpoint.best compares has a checkpoint",
        )
        _check(
            "optim.accumulate",
            self.optim.accumulate,
            self.rollout.prompts % self.optim.accumulate == 0,
            f"a divisor of rollout.prompts ({self.rollout.prompts})",
        )

    @property
    def vision_frozen(self) -> bool:
        """Whether nothing of the vision tower is trained, so that its features can be kept."""
        return self.model.freeze_vision or (bool(self.lora.rank) and not self.lora.vision)

    @property
    def base_needed(self) -> bool:
        """Whether weights of model.path are needed besides the trained ones, on resuming too."""
        return self.vision_frozen or bool(self.lora.rank)


def profiled_steps(profile: str) -> range:
    """The steps that `profile` names, numbered from 1; none of "".

    Raises:
      ConfigError: it names none.
    """
    if not profile:
        return range(0)
    found = re.fullmatch(r"steps:(\d+)-(\d+)", profile)
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    _check("profile", profile, bool(steps) and steps[0] > 0, "steps:FIRST-LAST, as in steps:10-12")
    return steps


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `a.b=value` overrides, whose values are YAML too.

    Raises:
      ConfigError: there is no such file, or it or an override is not a valid configuration; every
        unknown key and wrong type is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: the first argument is a YAML config file")
    raw = strict_yaml.parse(path.read_bytes(), str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {raw!r}")
    for assignment in overrides:
        strict_yaml.override(raw, assignment)
    return from_dict(raw, source=str(path))


def from_dict(raw: Mapping[str, Any], source: str = "config") -> Config:
    """Builds the config from nested plain values (as `to_dict` gives); `source` names it in errors.

    Raises:
      ConfigError: see `load`.
    """
    return strict_yaml.build(Config, raw, source)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, ready for JSON or YAML."""
    return strict_yaml.plain(config)


def to_yaml(config: Config) -> str:
    """The whole tree, defaults included; `load` reads it back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


class Difference(NamedTuple):
    """One key that two configs disagree on."""

    key: str  # dotted
    before: Any
    after: Any
    resumable: bool


def diff(before: Config, after: Config) -> list[Difference]:
    """The keys whose values differ, in the tree's order."""
    return list(_differences(before, after, "", False))


def check_resume(saved: Config, now: Config) -> None:
    """Refuses to continue a run under a config that would have learnt something else.

    Args:
      saved: the config stored with the checkpoint.
      now: the config of this start.

    Raises:
      ConfigError: keys that are not resumable differ; all are listed with both values.
    """
    clashes = [difference for difference in diff(saved, now) if not difference.resumable]
    if clashes:
        lines = [f"  {key}: saved {old!r}, now {new!r}" for key, old, new, _ in clashes]
        raise ConfigError(
            f"{now.run_dir} holds a run of another config:\n" + "\n".join(lines) + "\nTo go on "
            "with that run put these keys back; to start another choose a new run_dir."
        )


def _differences(before: Any, after: Any, prefix: str, resumable: bool) -> Iterator[Difference]:
    for item in dataclasses.fields(before):
        old, new = before.__dict__[item.name], after.__dict__[item.name]
        key = prefix + item.name
        free = resumable or "resumable" in item.metadata
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            yield from _differences(old, new, f"{key}.", free)
        elif _sections(old) and _sections(new) and len(old) == len(new):
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                yield from _differences(one, other, f"{key}[{number}].", free)
        elif old != new:  # an optional section that only one of them has is one difference
            yield Difference(key, strict_yaml.plain(old), strict_yaml.plain(new), free)


def _sections(value: Any) -> bool:
    """Whether it is a list of sections."""
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
