"""GRPO training: `jaxgrpo train CONFIG`. `main` reads like the algorithm, from top to bottom.

Legend: P prompts in a step, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data.pipeline import batches
from data.records import Record
from data.sampling import StepPlan
from jaxgrpo import evaluate
from jaxgrpo.config import Config
from jaxgrpo.inputs import Inputs, PromptCollator, PromptLoader, describe, prepare
from jaxgrpo.load import open_policy, open_processor
from jaxgrpo.metrics import CompileCounter, Progress
from jaxgrpo.programs import (
    Scores,
    answer_shapes,
    compile_train,
    init_program,
    publish_program,
    score_program,
    truth_shapes,
)
from jaxgrpo.run_dir import RunDir
from jaxgrpo.sharding import (
    SAMPLER_RULES,
    check_divides,
    gather_to_host,
    make_mesh,
    param_shardings,
    process_rows,
    put_prompts,
    put_scalar,
    start_processes,
)
from jaxgrpo.update import UpdateBatch, make_optimizer, split_frozen
from rewards.dual import truth_arrays
from rewards.parse import parse_batch


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def main(config: Config) -> None:
    """Evaluates, trains and evaluates again; leaves a run directory to resume, read and export."""
    # ---- machine: processes, mesh ----
    start_processes()
    mesh = make_mesh(config.mesh)
    prompts = config.rollout.prompts

    with CompileCounter() as compilations, RunDir(config, "train") as run:
        # ---- data: manifests, probes, buckets ----
        processor = open_processor(config)
        check_divides(
            mesh,
            processor.config,
            {
                "rollout.prompts / optim.accumulate": prompts // config.optim.accumulate,
                "eval.batch": config.eval.batch,
            },
        )
        rows = process_rows(mesh, prompts)  # of each batch, those that this process feeds
        inputs = prepare(config, processor, train=True, evaluation=True, excluded=run.excluded)
        run.excluded = inputs.excluded
        assert inputs.train is not None
        say(describe(inputs))

        # ---- weights: policy, reference, optimiser ----
        policy, params = open_policy(
            config.model,
            processor,
            mesh,
            temperature=config.rollout.temperature,
            seed=config.seed,
        )
        optimizer = make_optimizer(config.optim, config.train.steps)
        trained, frozen = split_frozen(params, config.model.freeze_vision)
        reference = params if config.grpo.kl else None
        state = run.restore(init_program(mesh, optimizer, trained)(trained))
        del params, trained

        # ---- programs: everything is compiled before the first step ----
        started = time.perf_counter()
        say(f"compiling for prompts of at most {list(config.data.buckets)} tokens ...")
        layout = param_shardings(policy.config, mesh, SAMPLER_RULES)
        publish = publish_program(policy, layout).lower(state.params, frozen).compile()
        sampler = publish(state.params, frozen)
        programs = [
            compile_train(config, mesh, policy, bucket, optimizer, state, frozen, sampler)
            for bucket in inputs.buckets
        ]
        score_shapes = (
            answer_shapes(mesh, prompts, config.rollout.group),
            truth_shapes(mesh, prompts, inputs.max_spans),
        )
        score = (
            score_program(mesh, config.reward, config.grpo.divide_by_std)
            .lower(*score_shapes)
            .compile()
        )
        eval_programs = evaluate.compile_eval(config, mesh, policy, inputs, sampler)
        say(f"compiled in {time.perf_counter() - started:.0f} s")

        # ---- evaluation before the first step ----
        if run.first_step == 0:
            scores_before = run_evaluation(0, config, mesh, eval_programs, sampler, inputs, run)
        else:
            scores_before = run.scores(step=0)

        # ---- data: the step plan, loaded ahead ----
        loader = batches(
            StepPlan(inputs.train.buckets, prompts, config.seed),
            PromptLoader(processor, inputs.train.records, config.data),
            PromptCollator(inputs.buckets, processor.pad_id),
            start_step=run.first_step,
            num_steps=config.train.steps - run.first_step,
            rows=rows,
            threads=config.data.threads,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            ids=[record.id for record in inputs.train.records],
        )
        progress = Progress("GRPO", config.train.steps, run.first_step)
        seed = put_scalar(mesh, config.seed)
        with loader:
            batch = next(loader, None)
            on_device: Any = put_prompts(mesh, batch.prompts) if batch else None
            while batch is not None:
                step, records = batch.step, [inputs.train.records[item] for item in batch.items]
                program = programs[batch.bucket]
                begun = time.perf_counter()

                # ---- rollout: the video once, the prompt once, G completions ----
                rollout, features = program.rollout(
                    sampler, on_device, seed, put_scalar(mesh, step)
                )
                ref_logp = None
                if program.reference is not None:
                    ref_logp = program.reference(reference, on_device, features, rollout.tokens)
                tokens, lengths, finished = gather_to_host(
                    (rollout.tokens, rollout.lengths, rollout.finished)
                )
                sampled_at = time.perf_counter()

                # ---- rewards: text -> answers on the host -> scores and advantages ----
                texts = [[processor.decode(ids) for ids in row] for row in tokens[rows]]
                tasks = [record.task for record in records]
                answers = parse_batch(texts, tasks, thinking=config.data.thinking)
                truth = truth_arrays(records, inputs.max_spans)
                scores = score(*put_prompts(mesh, (answers, truth)))
                scored_at = time.perf_counter()

                # ---- update: the prompt once and its G completions ----
                update_batch = UpdateBatch(
                    prompt=on_device,
                    features=features,
                    completions=rollout.tokens,
                    lengths=rollout.lengths,
                    advantages=scores.advantages,
                    sampler_logp=rollout.sampler_logp,
                    old_logp=None,
                    ref_logp=ref_logp,
                )
                state, updated = program.update(state, frozen, update_batch)
                sampler = publish(state.params, frozen)

                # ---- while the device works: the next batch ----
                waited = time.perf_counter()
                following = next(loader, None)
                waited = time.perf_counter() - waited
                on_device = put_prompts(mesh, following.prompts) if following else None

                # ---- metrics ----
                updated, earned = jax.device_get(updated), gather_to_host(scores)
                ended = time.perf_counter()
                for line in run.note_failures(batch.failures, inputs.train.records):
                    progress.print(line)
                metrics = {
                    **step_metrics(earned, lengths, finished, updated),
                    "data/failed_videos": len(run.failures),
                    "compilations": compilations.total,
                    "time/rollout": sampled_at - begun,
                    "time/reward": scored_at - sampled_at,
                    "time/update": ended - scored_at,
                    "time/data_wait": waited,
                    "time/step": ended - begun,
                    "throughput/tokens_per_second": int(lengths.sum()) / (ended - begun),
                }
                if (step + 1) % config.log.every == 0 or following is None:
                    run.write(step + 1, "train", metrics)
                    mine = jax.tree.map(lambda x: x[rows], earned)
                    kept = samples(records, texts, lengths[rows], mine, config.log.samples)
                    run.write_completions(step + 1, "train", kept)
                progress.update(metrics)
                stop_if_not_finite(int(updated["skipped_in_a_row"]), step, records, config)

                # ---- evaluation, checkpoint ----
                done = step + 1
                if following is None or (config.eval.every and done % config.eval.every == 0):
                    scores_after = run_evaluation(
                        done, config, mesh, eval_programs, sampler, inputs, run
                    )
                    if following is None:
                        progress.close()
                        say(evaluate.table({"before": scores_before, "after": scores_after}))
                if following is None or done % config.checkpoint.every == 0:
                    run.save(done, state)
                batch = following
        run.finish()
    say(closing_words(config))


def say(text: str) -> None:
    """Prints on one process of the job."""
    if jax.process_index() == 0:
        print(text, flush=True)


def run_evaluation(
    step: int,
    config: Config,
    mesh: Any,
    programs: evaluate.EvalPrograms,
    sampler: Any,
    inputs: Inputs,
    run: RunDir,
) -> dict[str, float]:
    """Evaluates and writes the scores and a few predictions down."""
    started = time.perf_counter()
    scores, predictions = evaluate.evaluate(config, mesh, programs, sampler, inputs)
    run.write(step, "eval", scores | {"time/eval": time.perf_counter() - started})
    shown = evaluate.first_of_each_task(predictions, config.log.samples)
    run.write_completions(step, "eval", [evaluate.sample(p) for p in shown])
    return scores


def step_metrics(
    scores: Scores, lengths: np.ndarray, finished: np.ndarray, updated: dict[str, Any]
) -> dict[str, float]:
    """The numbers of one training step, by the names of metrics.jsonl."""
    metrics = {
        "reward/total": float(scores.total.mean()),
        "reward/total_std": float(scores.total.std(axis=-1).mean()),
        "groups/zero_variance": float(scores.zero_variance.mean()),
        "completion/length": float(lengths.mean()),
        "completion/truncated": 1.0 - float(finished.mean()),
    }
    for name, values in scores.components.items():
        defined = values[~np.isnan(values[:, 0])]  # the prompts whose task has this component
        if len(defined):
            equal = defined.max(axis=-1) == defined.min(axis=-1)
            metrics[f"reward/{name}"] = float(defined.mean())
            metrics[f"reward/{name}_std"] = float(defined.std(axis=-1).mean())
            metrics[f"groups/zero_variance_{name}"] = float(equal.mean())
    return metrics | {name: float(value) for name, value in updated.items()}


def samples(
    records: Sequence[Record],
    texts: Sequence[Sequence[str]],
    lengths: np.ndarray,
    scores: Scores,
    count: int,
) -> list[dict[str, Any]]:
    """The first completion of `count` prompts as lines for people to read."""
    return [
        evaluate.sample(
            evaluate.Prediction(
                record,
                texts[p][0],
                float(scores.total[p, 0]),
                {name: float(values[p, 0]) for name, values in scores.components.items()},
                int(lengths[p, 0]),
            )
        )
        for p, record in enumerate(records[:count])
    ]


def stop_if_not_finite(in_a_row: int, step: int, records: Sequence[Record], config: Config) -> None:
    """Ends the run when too many steps in a row were skipped.

    Raises:
      NonFiniteError: names the step and its items.
    """
    if in_a_row >= config.train.max_nonfinite_steps:
        names = ", ".join(record.id for record in records)
        raise NonFiniteError(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite; the last was "
            f"step {step} with {names}. The weights are those before the first of them. Start "
            "another run (a new run_dir, and model.path may be this one) with a lower "
            "optim.learning_rate or with model.compute_dtype=float32"
        )


def closing_words(config: Config) -> str:
    """What was written and what to do next."""
    run = config.run_dir
    return (
        f"wrote {run}: metrics.jsonl, completions.jsonl, curves.png, checkpoints/\n"
        f"next: jaxgrpo export {run} {run}-hf   (a directory for transformers and vLLM)"
    )
