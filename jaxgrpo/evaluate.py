"""Greedy evaluation: `jaxgrpo eval CONFIG`, and before, during and after training.

Legend: P prompts in a batch, I items scored.

Every score stands beside what it costs to reach it without understanding the video: the best
constant span, the most frequent letter, and the same questions about other items' videos.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Mesh

from data.records import CHOICE_TASKS, SPAN_TASKS, TASKS, Record, merge_spans, row_of
from data.sampling import OnePass
from jaxgrpo import preemption
from jaxgrpo.config import Config
from jaxgrpo.dataset import Dataset
from jaxgrpo.feed import Feed
from jaxgrpo.inputs import Inputs, PromptCollator, describe, prepare, prompt_loader
from jaxgrpo.load import open_params, open_policy, open_processor
from jaxgrpo.policy import Params, Policy
from jaxgrpo.processes import start_processes
from jaxgrpo.programs import (
    answer_shapes,
    cache_compilations,
    lower_publish,
    prompt_shapes,
    rollout_program,
    scalar_shape,
    score_program,
    truth_shapes,
)
from jaxgrpo.rollout import Rollout, Sampling
from jaxgrpo.run_dir import RunDir
from jaxgrpo.scoring import agreed, open_reward
from jaxgrpo.sharding import (
    check_divides,
    gather_objects,
    make_mesh,
    put_prompts,
    put_scalar,
    say,
)
from rewards.reward import Reward

THRESHOLDS = (0.3, 0.5, 0.7)  # of R1@IoU, as in temporal grounding


def main(config: Config) -> None:
    """`jaxgrpo eval CONFIG`: scores `model.path`, a model directory or a run; prints a table."""
    start_processes(config)
    cache_compilations(config)
    mesh = make_mesh(config.mesh)
    processor = open_processor(config)
    sizes = {"eval.batch": config.eval.batch}
    check_divides(mesh, processor.config, sizes, replicate_kv=config.mesh.replicate_kv)
    inputs = prepare(config, processor, train=False, evaluation=True)
    say(describe(inputs))
    policy = open_policy(config.model, processor, mesh, temperature=0.0)
    params = open_params(config.model, processor.config, mesh, config.seed)
    sampler = lower_publish(mesh, policy, params, {}).compile()(params, {})
    del params
    programs = compile_eval(config, mesh, policy, inputs, sampler)
    metrics, predictions = evaluate(config, mesh, programs, sampler, inputs)
    if jax.process_index() == 0:
        print(table({config.model.path: metrics}))
        out = epath.Path(config.run_dir)
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n")
        lines = [json.dumps(sample(p), ensure_ascii=False) for p in predictions]
        (out / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        print(f"wrote {out / 'eval.json'} and {out / 'predictions.jsonl'}")


class EvalPrograms(NamedTuple):
    """The executables of evaluation."""

    rollout: dict[int, Callable[..., tuple[Rollout, Array | None]]]  # greedy, by bucket
    reward: Reward  # of the host's half
    score: Callable[..., Any]  # the device's


class Prediction(NamedTuple):
    """What the model said about one item, and what that earned."""

    record: Record
    text: str
    total: float
    components: dict[str, float]  # by name; NaN where the task has no such component
    tokens: int


def compile_eval(
    config: Config, mesh: Mesh, policy: Policy, inputs: Inputs, sampler: Params
) -> EvalPrograms:
    """Compiles greedy decoding for every bucket that items are in, swapped ones too, and scoring.

    Args:
      sampler: the sampler's weights, or their shapes with shardings.
    """
    assert inputs.evaluation is not None, "prepare(evaluation=True) makes it"
    prompts = config.eval.batch
    sampling = Sampling(
        group=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=0.0,
    )
    greedy = policy._replace(temperature=0.0)
    scalar = scalar_shape(mesh)
    program = rollout_program(mesh, greedy, sampling, keep_features=False)
    reward = open_reward(config, config.eval.max_new_tokens)
    reward.truth(inputs.evaluation.records, inputs.evaluation.max_spans)  # named now, not later
    score = score_program(mesh, reward, divide_by_std=False)
    datasets = [x for x in (inputs.evaluation, inputs.swapped) if x is not None]
    max_spans = inputs.evaluation.max_spans
    return EvalPrograms(
        {
            number: program.lower(
                sampler, prompt_shapes(mesh, policy.config.vision, bucket, prompts), scalar, scalar
            ).compile()
            for number, bucket in enumerate(inputs.evaluation.offers)
            if any(dataset.buckets[number] for dataset in datasets)
        },
        reward,
        score.lower(
            answer_shapes(mesh, prompts, 1), truth_shapes(mesh, prompts, max_spans)
        ).compile(),
    )


def evaluate(
    config: Config, mesh: Mesh, programs: EvalPrograms, sampler: Params, inputs: Inputs
) -> tuple[dict[str, float], list[Prediction]]:
    """Scores the evaluation items.

    Returns:
      the metrics, and the predictions of the evaluation set (not of the swapped videos).
    """
    assert inputs.evaluation is not None, "prepare(evaluation=True) makes it"
    predictions, failures = predict(config, mesh, programs, sampler, inputs, inputs.evaluation)
    if jax.process_index() == 0:
        for name, reason in failures.items():
            print(f"not scored {name}: {reason}", file=sys.stderr)
    metrics = summarise(predictions)
    metrics["items"] = len(predictions)
    metrics["items_failed"] = len(inputs.evaluation.records) - len(predictions)
    if inputs.swapped is not None:
        swapped, _ = predict(config, mesh, programs, sampler, inputs, inputs.swapped)
        metrics["items_swapped"] = len(swapped)
        metrics["tvg/mIoU_swapped_videos"] = _mean(p.components["iou"] for p in swapped)
    return metrics, predictions


def run_evaluation(
    step: int,
    config: Config,
    mesh: Mesh,
    programs: EvalPrograms,
    sampler: Params,
    inputs: Inputs,
    run: RunDir,
) -> dict[str, float] | None:
    """Evaluates during a run and writes the scores and a few predictions down.

    Returns:
      The scores; None if SIGTERM came in between: nothing is written and `run.stopping` is set.
    """
    started = time.perf_counter()
    try:
        scores, predictions = evaluate(config, mesh, programs, sampler, inputs)
    except preemption.Preempted:
        run.stopping = True
        return None
    run.write(step, "eval", scores | {"time/eval": time.perf_counter() - started})
    shown = first_of_each_task(predictions, config.log.samples)
    run.write_completions(step, "eval", [sample(p) for p in shown])
    return scores


def predict(
    config: Config,
    mesh: Mesh,
    programs: EvalPrograms,
    sampler: Params,
    inputs: Inputs,
    dataset: Dataset,
) -> tuple[list[Prediction], dict[str, str]]:
    """Greedy completions of all items, in the dataset's order.

    Returns:
      the predictions, and id -> reason of the items whose video failed, which have none.

    Raises:
      Preempted: a process was told to end; all processes raise it after the same batch.
    """
    plan = OnePass(dataset.buckets, config.eval.batch, dataset.spares)
    loader = Feed(
        mesh,
        plan,
        prompt_loader(inputs, dataset, config.data),
        PromptCollator(dataset.offers, inputs.processor.pad_id),
        dataset.records,
        config.data,
        start_step=0,
        num_steps=plan.steps,
    )
    found: dict[int, Prediction] = {}
    failures: dict[str, str] = {}
    replaced: set[int] = set()  # items whose slot holds another's video: they are not scored
    with loader:
        for batch in loader:
            if any(gather_objects(preemption.told())):
                raise preemption.Preempted("SIGTERM during an evaluation")
            zero = put_scalar(mesh, 0)
            rollout, _ = programs.rollout[batch.bucket](
                sampler, put_prompts(mesh, batch.prompts), zero, zero
            )
            tokens, lengths = jax.device_get((rollout.tokens, rollout.lengths))
            for item, kind, message in batch.failures:
                failures[dataset.records[item].id] = f"{kind}: {message}"
            planned = plan.step(batch.step).items
            records = [dataset.records[item] for item in planned]
            texts = [[inputs.processor.decode(row[0])] for row in tokens]
            mine = [records[row] for row in loader.rows]
            reward, said = programs.reward, [texts[row] for row in loader.rows]
            answers = reward.read(said, mine, lengths[loader.rows])
            answers = agreed(reward, mesh, loader.rows, answers)
            truth = reward.truth(mine, dataset.max_spans)
            scores = jax.device_get(programs.score(*put_prompts(mesh, (answers, truth))))
            reward.check(scores.components)
            slots = [planned[row] for row in loader.rows]
            replaced |= {a for a, b in zip(slots, batch.items, strict=True) if a != b}
            for row, item in enumerate(planned):
                found[item] = Prediction(
                    records[row],
                    texts[row][0],
                    float(scores.total[row, 0]),
                    {name: float(x[row, 0]) for name, x in scores.components.items()},
                    int(lengths[row, 0]),
                )
    everywhere: dict[str, str] = {}
    for others_failures, others_replaced in gather_objects([failures, sorted(replaced)]):
        everywhere |= others_failures
        replaced |= set(others_replaced)
    return [found[item] for item in sorted(found.keys() - replaced)], everywhere


def summarise(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The scores and their baselines, by task; a task without items has none.

    number/accuracy is the share equal to two decimals, regression/score 1 - the relative error,
    ocr/score 1 - the word error rate, text/rouge the mean of ROUGE-1, -2 and -L.
    acc_at_iou0.5 is NExT-GQA's Acc@GQA at IoU: the right letter and an IoU of at least 0.5.
    """
    by_task = {task: [p for p in predictions if p.record.task == task] for task in TASKS}
    metrics: dict[str, float] = {
        "format": _mean(p.components["format"] for p in predictions),
        "reward/total": _mean(p.total for p in predictions),
        "completion/length": _mean(p.tokens for p in predictions),
    }
    for task in CHOICE_TASKS:
        if chosen := by_task[task]:
            letters = [p.record.answer for p in chosen]
            most = max(letters.count(letter) for letter in letters)
            metrics[f"{task}/accuracy"] = _mean(p.components["choice"] for p in chosen)
            metrics[f"{task}/accuracy_constant_letter"] = most / len(letters)
    for task in SPAN_TASKS:
        if chosen := by_task[task]:
            metrics[f"{task}/mIoU"] = _mean(p.components["iou"] for p in chosen)
            metrics[f"{task}/mIoU_constant_span"] = best_constant_span(
                [p.record.spans for p in chosen]
            )[2]
    for threshold in THRESHOLDS if by_task["tvg"] else ():
        metrics[f"tvg/R1@{threshold}"] = _mean(
            p.components["iou"] >= threshold for p in by_task["tvg"]
        )
    if by_task["gqa"]:
        metrics["gqa/acc_at_iou0.5"] = _mean(
            p.components["choice"] == 1 and p.components["iou"] >= 0.5 for p in by_task["gqa"]
        )
    for task, name in _ANSWER_SCORES.items():
        if chosen := by_task[task]:
            metrics[name] = _mean(p.components[task] for p in chosen)
    return metrics


_ANSWER_SCORES = {
    "number": "number/accuracy",
    "regression": "regression/score",
    "ocr": "ocr/score",
    "text": "text/rouge",
}


def best_constant_span(
    spans: Sequence[Sequence[tuple[float, float]]], step: float = 0.5
) -> tuple[float, float, float]:
    """The one answer that scores best if given to every question, and its mean IoU.

    Searched on a grid of `step` seconds, or coarser where that would need over 200 points.

    Args:
      spans: the true spans of each item, in seconds.

    Returns:
      start, end, mean IoU. Example: spans [(0, 2)] and [(1, 3)] -> (0, 2, 2/3) or an equal one.
    """
    last = max(end for item in spans for _, end in item)
    points = np.linspace(0.0, last, min(int(np.ceil(last / step)) + 1, 201))
    start, end = (x.ravel() for x in np.meshgrid(points, points, indexing="ij"))
    keep = end > start
    start, end = start[keep], end[keep]
    total = np.zeros(len(start))
    for item in spans:
        inside, length = np.zeros(len(start)), 0.0
        for a, b in merge_spans(item):
            inside += np.clip(np.minimum(end, b) - np.maximum(start, a), 0.0, None)
            length += b - a
        total += inside / (end - start + length - inside)
    best = int(np.argmax(total))
    return float(start[best]), float(end[best]), float(total[best] / len(spans))


def _mean(values: Iterable[Any]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def first_of_each_task(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """`count` predictions or fewer, shared out over the tasks; all where it is -1."""
    if count < 0:
        return list(predictions)
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.record.task, []).append(prediction)
    share = -(-count // max(len(by_task), 1))
    return [p for group in by_task.values() for p in group[:share]][:count]


def sample(prediction: Prediction) -> dict[str, Any]:
    """A prediction as a line to read, and to score again: see `rescore`.

    Question, right answer, completion, rewards (None where the task has no such component), and
    the rest of the record.
    """
    record = prediction.record
    rest = {k: v for k, v in row_of(record).items() if k not in ("id", "question")}
    line: dict[str, Any] = {
        "id": record.id,
        "question": record.question,
        "truth": truth_text(record),
        "completion": prediction.text,
        "reward/total": prediction.total,
    }
    for name, value in prediction.components.items():
        line[f"reward/{name}"] = None if np.isnan(value) else value
    return line | {"tokens": prediction.tokens, "record": rest}


def truth_text(record: Record) -> str:
    """The right answer for a reader: "B (red)", "3.5-7.0 s", both, or the number or text."""
    if record.task not in CHOICE_TASKS + SPAN_TASKS:
        return record.answer or ""
    parts = []
    if record.task in CHOICE_TASKS and record.answer is not None:
        parts.append(f"{record.answer} ({record.options[ord(record.answer) - ord('A')]})")
    if record.task in SPAN_TASKS:
        parts.append(", ".join(f"{start:g}-{end:g} s" for start, end in record.spans))
    return ", ".join(parts)


def table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics side by side, for example {"before": ..., "after": ...}, each with its baselines."""
    names = [name for name in _TABLE if any(name in metrics for metrics in columns.values())]
    first = max(map(len, names), default=0)
    widths = {title: max(12, len(title) + 2) for title in columns}
    lines = [" " * first + "".join(f"{title:>{width}}" for title, width in widths.items())]
    for name in names:
        cells = ((metrics.get(name), widths[title]) for title, metrics in columns.items())
        shown = (f"{'-' if x is None else format(x, '.3f'):>{width}}" for x, width in cells)
        lines.append(f"{name:<{first}}{''.join(shown)}")
    return "\n".join(lines)


_TABLE = (
    "tvg/mIoU",
    "tvg/mIoU_constant_span",
    "tvg/mIoU_swapped_videos",
    *(f"tvg/R1@{threshold}" for threshold in THRESHOLDS),
    "mcqa/accuracy",
    "mcqa/accuracy_constant_letter",
    "gqa/accuracy",
    "gqa/accuracy_constant_letter",
    "gqa/mIoU",
    "gqa/mIoU_constant_span",
    "gqa/acc_at_iou0.5",
    *_ANSWER_SCORES.values(),
    "format",
    "reward/total",
)
