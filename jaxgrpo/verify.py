"""`jaxgrpo verify MODEL [VIDEO]`: whether jaxgrpo computes with a model what transformers does.

The one check that must run where the weights are: our reading of the files, our tokenizer and
processor, and every layer's output on a clip, against `transformers` and torch, and the weights
against hashes. What needs torch is skipped, and named, where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxgrpo.load import model_directory
from jaxgrpo.run_dir import is_run
from jaxgrpo.verification import activations, original, prompts, settings, tensors
from jaxgrpo.verification.checks import Check, OtherSideError, Status, skipped
from jaxgrpo.verification.original import Dtype
from jaxgrpo.verification.prompts import Inputs
from models.qwen2_5_vl.config import ModelConfig, ModelConfigError
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.sizes import ProcessorError

_NUMBERS = (activations.PROSE, activations.LAYERS, activations.LOGITS)


class VerifyError(ValueError):
    """Something that is not a model directory."""


def main(
    model: str,
    video: str | None = None,
    *,
    dtype: Dtype = "float32",
    logits: bool = True,
    as_json: bool = False,
) -> int:
    """Prints a line for each check and a verdict.

    Args:
      model: a Hugging Face directory, here or in a bucket, or a hub id.
      video: a file; None: a synthetic clip.
      dtype: in which both sides compute.
      logits: whether to load the weights and compute with them.
      as_json: print one JSON object instead.

    Returns:
      0 where nothing failed, 1 where something did.

    Raises:
      VerifyError: `model` is a run.
      TooLittleMemoryError: one of the two models does not fit.
      FileNotFoundError, StorageError: there is no such model.
      VideoError: the video cannot be used.
    """
    if is_run(model):
        raise VerifyError(
            f"{model} is a run: `jaxgrpo export {model} OUT`, then `jaxgrpo verify OUT`"
        )
    directory = model_directory(model)
    done: list[Check] = []
    for check in checks(directory, video, dtype, logits):
        done.append(check)
        if not as_json:
            print(f"{check.status:<8} {check.name}: {check.summary}", flush=True)
            for detail in check.details:
                print(f"           {detail}", flush=True)
    text = verdict(model, done)
    failed = any(check.status is Status.FAIL for check in done)
    if as_json:
        print(
            json.dumps(
                {
                    "model": model,
                    "directory": str(directory),
                    "dtype": dtype,
                    "passed": not failed,
                    "verdict": text,
                    "checks": [check._asdict() for check in done],
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        print(f"\n{text}")
    return int(failed)


def verdict(model: str, done: list[Check]) -> str:
    """One sentence about all checks."""

    def names(status: Status) -> list[str]:
        return [check.name for check in done if check.status is status]

    warned, left_out = names(Status.WARN), names(Status.SKIPPED)
    rest = f"; with warnings: {', '.join(warned)}" if warned else ""
    rest += f"; not checked: {', '.join(left_out)}" if left_out else ""
    if failed := names(Status.FAIL):
        return f"FAIL: {', '.join(failed)}: do not train {model} before this is explained{rest}."
    if activations.LOGITS in left_out:
        return f"PASS, but what {model} computes was not compared with transformers{rest}."
    return f"PASS: jaxgrpo computes with {model} what transformers computes{rest}."


def checks(directory: Path, video: str | None, dtype: Dtype, logits: bool) -> Iterator[Check]:
    """All checks, cheap ones first; each is made when it is asked for.

    Raises: as `main`.
    """
    try:
        config = ModelConfig.load(directory)
    except ModelConfigError as error:
        yield Check(settings.CONFIG, Status.FAIL, str(error))
        return
    if logits:
        activations.check_memory(config, dtype)
    clip = prompts.open_clip(video)
    yield _answered(settings.CONFIG, lambda: settings.config_json(directory, config))
    yield _answered(settings.PROCESSOR, lambda: settings.processor_files(directory, config))
    try:
        processor = Processor.load(directory, prompts.LIMITS)
    except ProcessorError as error:
        yield Check(prompts.TOKENIZER, Status.FAIL, str(error))
        yield from _left_out(f"see {prompts.TOKENIZER}", prompts.PROCESSOR, original.POSITIONS)
        yield from tensors.check(directory, config)
        yield from _left_out(f"see {prompts.TOKENIZER}", *_NUMBERS)
        return
    given = prompts.inputs(processor, clip)
    yield _answered(prompts.TOKENIZER, lambda: prompts.tokenizer(directory, processor))
    yield _answered(prompts.PROCESSOR, lambda: prompts.processor(directory, processor, clip, given))
    no_torch = original.missing()
    if no_torch:
        yield from _left_out(no_torch, original.POSITIONS)
    else:
        yield _answered(original.POSITIONS, lambda: original.positions(directory, given))
    readable = True
    for check in tensors.check(directory, config):
        readable &= (check.name, check.status) != (tensors.WEIGHTS, Status.FAIL)
        yield check
    if logits and readable:
        yield from _numbers(directory, processor, given, dtype)
    else:
        yield from _left_out("--no-logits" if readable else f"see {tensors.WEIGHTS}", *_NUMBERS)


def _numbers(directory: Path, ours: Processor, given: Inputs, dtype: Dtype) -> Iterator[Check]:
    """What needs the weights in memory: our model, and when that has gone the original."""
    found = activations.run(directory, ours, given, dtype)
    yield activations.prose(found.prose, ours.config.text.vocab)
    no_torch = original.missing()
    if no_torch:
        yield from _left_out(no_torch, activations.LAYERS, activations.LOGITS)
        return
    try:
        theirs = original.run(directory, given, dtype)
    except OtherSideError as error:
        yield Check(activations.LAYERS, Status.FAIL, str(error))
        yield from _left_out(f"see {activations.LAYERS}", activations.LOGITS)
        return
    yield from activations.compare(found.parts, theirs, dtype, ours)


def _left_out(reason: str, *names: str) -> Iterator[Check]:
    for name in names:
        yield skipped(name, reason)


def _answered(name: str, question: Callable[[], Check]) -> Check:
    """The check, which fails where transformers or torch cannot do its part."""
    try:
        return question()
    except OtherSideError as error:
        return Check(name, Status.FAIL, str(error))
