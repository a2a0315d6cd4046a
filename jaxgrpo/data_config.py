"""The keys of `data`: which questions about which videos, and what of a video the model sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from jaxgrpo.checks import RESUMABLE as _RESUMABLE
from jaxgrpo.checks import above_zero as _above_zero
from jaxgrpo.checks import accepted_by as _accepted_by
from jaxgrpo.checks import at_least as _at_least
from jaxgrpo.checks import check as _check
from jaxgrpo.mixture_config import (
    ManifestSection,
    MixtureSection,
    OnlineSection,
    TaskWeightsSection,
)
from jaxgrpo.strict_yaml import ConfigError


@dataclass(frozen=True)
class SyntheticSection:
    """Clips and questions made by `data/synthetic.py` instead of read from manifests."""

    train_clips: int = 512
    eval_clips: int = 128
    seed: int = 0  # of the clips; the run's own seed is `seed`
    seconds: tuple[float, ...] = (8.0, 16.0)  # shortest and longest clip
    events: tuple[int, ...] = (2, 3)  # fewest and most objects shown in a clip
    late: float = 0.0  # seconds by which the training split's labels may lag behind, drawn

    def __post_init__(self) -> None:
        for name, pair in (("seconds", self.seconds), ("events", self.events)):
            _check(f"data.synthetic.{name}", list(pair), len(pair) == 2, "[least, most]")
        from data.synthetic import SyntheticSpec  # not above: see `cli`

        _accepted_by(SyntheticSpec, "data.synthetic", self)


@dataclass(frozen=True)
class DataSection:
    """Which questions about which videos, and what of a video the model sees."""

    # A JSONL manifest, or a folder of what `jaxgrpo pack` wrote; both may be in a bucket.
    train: str = ""  # `eval` needs none
    eval: str = ""  # all of `train`, `sft` and `eval` evaluate
    mixture: tuple[MixtureSection, ...] = ()  # several manifests with weights, in train's place
    eval_mixture: tuple[ManifestSection, ...] = ()  # several manifests, in eval's place
    task_weights: TaskWeightsSection = field(default_factory=TaskWeightsSection)
    # A file that `jaxgrpo select` wrote: of the training data only its items; "": all.
    keep: str = ""
    online: OnlineSection | None = None  # `train` draws more of what it sees to teach; null: alike
    root: str = field(
        default=".", metadata=_RESUMABLE
    )  # folder or bucket path that a JSONL manifest's video paths start from
    stage: str = field(
        default="", metadata=_RESUMABLE
    )  # local folder for what buckets give; "": none
    stage_gib: float = field(default=100.0, metadata=_RESUMABLE)  # that the stage may hold
    shard_mib: int = field(default=512, metadata=_RESUMABLE)  # of a shard that `pack` writes
    synthetic: SyntheticSection | None = None  # instead of manifests
    fps: float = 2.0  # frames sampled per second of video
    min_frames: int = 4
    max_frames: int = 768
    frames: int | None = None  # so many of every video instead; an even number
    min_pixels: int = 4 * 28 * 28  # of one frame
    max_pixels: int = 768 * 28 * 28  # of one frame
    total_pixels: int = 2048 * 28 * 28  # of one video: 2,048 video tokens
    resize: Literal["exact", "pillow"] = "exact"  # exact: as the released model was trained;
    # pillow: rounded between the axes, as transformers does
    frame_store: str = field(
        default="", metadata=_RESUMABLE
    )  # local folder for decoded frames, so that an epoch decodes once; "": none
    frame_store_gib: float = field(default=100.0, metadata=_RESUMABLE)  # that it may hold
    timeout: float = field(
        default=120.0, metadata=_RESUMABLE
    )  # seconds in which a decoder may make no progress
    thinking: bool = True  # ask for <think>...</think> before the answer
    buckets: tuple[int, ...] = (1024, 2048, 4096)  # prompt tokens that prompts are padded to
    threads: int = field(
        default=4, metadata=_RESUMABLE
    )  # that decode, in each worker process or in the main one
    workers: int = field(
        default=0, metadata=_RESUMABLE
    )  # processes that decode; 0: threads of the main process
    prefetch: int = field(default=2, metadata=_RESUMABLE)  # batches made ahead

    def __post_init__(self) -> None:
        names = ("synthetic", "train", "mixture", "eval", "eval_mixture")
        given = [name for name in names if self.__dict__[name]]
        for pair in (*(("synthetic", name) for name in names[1:]), names[1:3], names[3:]):
            if set(pair) <= set(given):
                both = " and ".join(f"data.{name}" for name in pair)
                raise ConfigError(f"{both} are both set: remove one of them")
        from data.storage import is_url  # not above: see `cli`

        for key, folder in (("stage", self.stage), ("frame_store", self.frame_store)):
            _check(f"data.{key}", folder, not is_url(folder), "a local folder")
        if self.synthetic is not None:
            _check("data.root", self.root, not is_url(self.root), "a local folder: clips are made")
        _above_zero("data", self, "fps", "stage_gib", "shard_mib", "frame_store_gib", "timeout")
        even = self.frames is None or (self.frames > 0 and self.frames % 2 == 0)
        _check("data.frames", self.frames, even, "an even number above 0: pairs enter the model")
        _at_least("data", self, min_frames=2, min_pixels=1, threads=1, workers=0, prefetch=1)
        _at_least("data", self, max_frames=self.min_frames)
        _at_least("data", self, max_pixels=self.min_pixels, total_pixels=self.min_pixels)
        rising = all(a < b for a, b in pairwise((0, *self.buckets)))
        _check(
            "data.buckets",
            list(self.buckets),
            len(self.buckets) > 0 and rising,
            "numbers of prompt tokens in rising order, for example [1024, 2048]",
        )
