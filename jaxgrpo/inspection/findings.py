"""What is wrong with a dataset, in sentences: what was found, where, and which key mends it."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

from jaxgrpo.config import Config
from jaxgrpo.inspection.survey import Survey

_NAMED = 5  # items that a sentence names
_WASTE = 1.5  # tokens computed for each real one, above which a bucket is worth a warning


def problem(key: str, part: Survey, largest: int, mend: str) -> str:
    """Prompts that fit no bucket, which training refuses; `mend` says which key would help."""
    named = [f"{x.id} by {x.over} tokens ({x.tokens})" for x in part.overflows]
    return (
        f"{key}: the largest bucket, of {largest} tokens, is too small for "
        f"{counted(len(named), 'prompt')}: {_first(named)}; {mend}"
    )


def warnings(key: str, part: Survey, config: Config) -> Iterator[str]:
    """What training goes on with, a line for each kind, the first items by name."""
    answers = part.answers
    if part.bad:
        told = ", ".join(f"{count} {kind}" for kind, count in kinds(part).items())
        named = [f"{bad.id} ({bad.kind})" for bad in part.bad]
        yield (
            f"{key}: {len(part.bad)} of {part.questions} items left out, their videos cannot be "
            f"used ({told}): {_first(named)}"
        )
    if answers.short:
        named = [
            f"{x.id} ({x.reward:.3g} of {x.most:.3g}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in x.components.items())
            + ")"
            for x in answers.short
        ]
        yield (
            f"{key}: the right answers of {counted(len(named), 'item')} do not earn the most that "
            f"the reward gives: {_first(named)}"
        )
    if answers.too_long:
        named = [f"{name} ({count})" for name, count in answers.too_long.items()]
        limit = "rollout.max_new_tokens" if key == "data.train" else "eval.max_new_tokens"
        yield (
            f"{key}: the right answers of {counted(len(named), 'item')} have more than "
            f"{answers.limit} tokens, so that no completion can be right: {_first(named)}; raise "
            f"{limit}"
        )
    if answers.unwritten:
        named = list(answers.unwritten.values())
        yield (
            f"{key}: {counted(len(named), 'item')} without a right completion, which `jaxgrpo "
            f"sft` would refuse: {_first(named)}"
        )
    if part.outside:
        named = [
            f"{x.id} ({x.span[0]:g}-{x.span[1]:g} s of {x.seconds:.2f} s)" for x in part.outside
        ]
        yield (
            f"{key}: {counted(len(named), 'true span')} beyond the end of the video: "
            f"{_first(named)}; mend the rows' spans"
        )
    yield from _bucket_warnings(key, part, config.rollout.prompts)
    if part.steps and part.steps.never:
        steps = part.steps
        yield (
            f"{key}: {len(steps.never)} of {part.items} items are never drawn in train.steps="
            f"{steps.run} of {steps.prompts} prompts (an epoch has {steps.epoch}): "
            f"{_first(steps.never)}"
        )


def _bucket_warnings(key: str, part: Survey, prompts: int) -> Iterator[str]:
    for bucket in part.buckets:
        if bucket.token_ratio is not None and bucket.token_ratio > _WASTE:
            assert bucket.median is not None
            near = -(-int(bucket.median) // 64) * 64
            mend = f"; add one of about {near} to data.buckets" if near < bucket.tokens else ""
            yield (
                f"{key}: the bucket of {bucket.tokens} tokens computes {bucket.token_ratio:.2f} "
                f"tokens for each real one, its prompts have {bucket.median:g} (median){mend}"
            )
        if part.steps and 0 < bucket.items < prompts:
            yield (
                f"{key}: the bucket of {bucket.tokens} tokens holds {bucket.items} items, fewer "
                f"than rollout.prompts={prompts}: its steps repeat items; merge it with the next "
                "in data.buckets"
            )


def _first(named: Sequence[str]) -> str:
    more = len(named) - _NAMED
    return ", ".join(named[:_NAMED]) + (f", and {more} more" if more > 0 else "")


def kinds(part: Survey) -> dict[str, int]:
    """How many videos are bad in which way, the most frequent first."""
    return dict(collections.Counter(bad.kind for bad in part.bad).most_common())


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
