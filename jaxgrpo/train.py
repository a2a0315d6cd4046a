"""GRPO training: `jaxgrpo train CONFIG`. `main` reads like the algorithm, from top to bottom.

Legend: P prompts in a step, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.records import Record
from jaxgrpo import evaluate, preemption
from jaxgrpo.config import Config, RolloutSection
from jaxgrpo.dataset import step_plan
from jaxgrpo.feed import Feed
from jaxgrpo.inputs import PromptCollator, describe, prepare, prompt_loader
from jaxgrpo.load import open_params, open_policy, open_processor, weight_steps
from jaxgrpo.metrics import CompileCounter, Progress
from jaxgrpo.policy import Params
from jaxgrpo.processes import start_processes
from jaxgrpo.profile import Profiler
from jaxgrpo.programs import (
    Scores,
    answer_shapes,
    cache_compilations,
    lower_train,
    lower_weights,
    score_program,
    truth_shapes,
)
from jaxgrpo.run_dir import RunDir
from jaxgrpo.scoring import ConstantWatch, agreed, items_of_all, open_reward
from jaxgrpo.sharding import (
    check_divides,
    make_mesh,
    put_prompts,
    put_scalar,
    say,
)
from jaxgrpo.update import UpdateBatch, split_frozen, stop_if_not_finite


def main(config: Config) -> None:
    """Evaluates, trains and evaluates again; leaves a run directory to resume, read and export."""
    # ---- machine: processes, mesh ----
    start_processes(config)
    cache_compilations(config)
    mesh = make_mesh(config.mesh)
    prompts = config.rollout.prompts
    reward = open_reward(config)
    if note := off_policy_note(config.rollout):
        say(note)

    with CompileCounter() as compilations, RunDir(config, "train") as run:
        if run.first_step == config.train.steps and not run.owes_evaluation:
            say(f"{config.run_dir} is finished: it has done its {config.train.steps} steps")
            say(scores_table(run, config.train.steps))
            run.finish()
            say(closing_words(config))
            return

        # ---- data: manifests, probes, buckets ----
        processor = open_processor(config)
        check_divides(
            mesh,
            processor.config,
            {
                "rollout.prompts / optim.accumulate": prompts // config.optim.accumulate,
                "eval.batch": config.eval.batch,
            },
            replicate_kv=config.mesh.replicate_kv,
        )
        inputs = prepare(config, processor, train=True, evaluation=True, excluded=run.excluded)
        assert inputs.train is not None and inputs.evaluation is not None
        say(describe(inputs))
        reward.truth(inputs.train.records, inputs.train.max_spans)  # what is missing is named now
        run.check_best({record.task for record in inputs.evaluation.records})
        needs_base = bool(config.grpo.kl) or config.model.freeze_vision  # when it is resumed too
        run.keep_to(
            inputs.train.plan,
            weight_steps(config.model.path) if needs_base else [],
            inputs.excluded,
        )

        # ---- weights: policy, reference, optimiser ----
        policy = open_policy(config.model, processor, mesh, temperature=config.rollout.temperature)
        weights = lower_weights(
            config, mesh, policy, config.train.steps, reference=bool(config.grpo.kl)
        )
        reference = None
        frozen: Params = {}
        if run.first_step == 0 or needs_base:
            params = open_params(config.model, policy.config, mesh, config.seed)
            trained, frozen = split_frozen(params, config.model.freeze_vision)
            if weights.to_reference:
                reference = weights.to_reference.compile()(trained, {})
            if run.first_step == 0:
                state = weights.init.compile()(trained)
            del params, trained
        if run.first_step:
            state = run.restore(weights.init.out_info)

        # ---- programs: everything is compiled before the first step ----
        started = time.perf_counter()
        say(f"compiling for prompts of at most {list(config.data.buckets)} tokens ...")
        to_sampler = weights.to_sampler.compile()
        programs = {
            number: lower_train(config, mesh, policy, bucket, weights).compile()
            for number, bucket in enumerate(inputs.train.offers)
            if inputs.train.buckets[number]
        }
        score_shapes = (
            answer_shapes(mesh, prompts, config.rollout.group),
            truth_shapes(mesh, prompts, inputs.train.max_spans),
        )
        score = (
            score_program(mesh, reward, config.grpo.divide_by_std).lower(*score_shapes).compile()
        )
        eval_programs = evaluate.compile_eval(
            config, mesh, policy, inputs, weights.to_sampler.out_info
        )
        say(f"compiled in {time.perf_counter() - started:.0f} s")

        # ---- evaluation before the first step ----
        sampler = to_sampler(state.params, frozen)
        if run.owes_evaluation:
            evaluate.run_evaluation(
                run.first_step, config, mesh, eval_programs, sampler, inputs, run
            )

        # ---- data: the step plan, loaded ahead ----
        loader = Feed(
            mesh,
            step_plan(inputs.train, prompts, config.seed),
            prompt_loader(inputs, inputs.train, config.data),
            PromptCollator(inputs.train.offers, processor.pad_id),
            inputs.train.records,
            config.data,
            start_step=run.first_step,
            num_steps=config.train.steps - run.first_step,
            given_up=run.given_up(inputs.train.records),
        )
        rows = loader.rows  # of each batch, those of this process
        progress = Progress("GRPO", config.train.steps, run.first_step)
        watch = ConstantWatch(config.reward.constant_steps)
        profiler = Profiler(config.profile, run.path)
        seed = put_scalar(mesh, config.seed)
        preemption.defer()
        with loader:
            batch = next(loader, None)
            on_device: Any = put_prompts(mesh, batch.prompts) if batch else None
            while batch is not None:
                step, records = batch.step, [inputs.train.records[item] for item in batch.items]
                program = programs[batch.bucket]
                profiler.begin(step + 1)
                begun = time.perf_counter()

                # ---- rollout: the video once, the prompt once, G completions ----
                rollout, features = program.rollout(
                    sampler, on_device, seed, put_scalar(mesh, step)
                )
                tokens, lengths, finished = jax.device_get(
                    (rollout.tokens, rollout.lengths, rollout.finished)
                )
                sampled_at = time.perf_counter()

                # ---- reference: while the host reads; the longest completion says how far ----
                length = program.learn_from(lengths)
                learn = program.learn[length]
                ref_logp = None
                if learn.reference is not None:
                    ref_logp = learn.reference(
                        reference, frozen, on_device, features, rollout.tokens
                    )

                # ---- rewards: text -> answers on the host -> scores and advantages ----
                texts = [[processor.decode(ids) for ids in row] for row in tokens[rows]]
                answers = agreed(reward, mesh, rows, reward.read(texts, records, lengths[rows]))
                truth = reward.truth(records, inputs.train.max_spans)
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
                del sampler  # the update needs its memory
                state, updated = learn.update(state, frozen, update_batch)
                sampler = to_sampler(state.params, frozen)

                # ---- while the device works: the next batch ----
                waited = time.perf_counter()
                following = next(loader, None)
                waited = time.perf_counter() - waited
                on_device = put_prompts(mesh, following.prompts) if following else None

                # ---- metrics ----
                updated, earned = jax.device_get((updated, scores))
                reward.check(earned.components)
                ended = time.perf_counter()
                if profiler.end(step + 1, last=following is None):
                    progress.print(f"wrote a trace to {profiler.folder}")
                for line in run.note_failures(batch.failures, inputs.train.records):
                    progress.print(line)
                metrics = {
                    **step_metrics(earned, lengths, finished, updated),
                    "completion/bucket": length,
                    "data/failed_videos": len(run.failures),
                    **inputs.served(),
                    "compilations": compilations.total,
                    "time/rollout": sampled_at - begun,
                    "time/reward": scored_at - sampled_at,
                    "time/update": ended - scored_at - waited,
                    "time/data_wait": waited,
                    "time/step": ended - begun,
                    "throughput/tokens_per_second": int(lengths.sum()) / (ended - begun),
                }
                if (step + 1) % config.log.every == 0 or following is None:
                    run.write(step + 1, "train", metrics)
                    shown = [inputs.train.records[i] for i in items_of_all(rows, batch.items)]
                    count = config.log.samples
                    kept = samples(shown, tokens, lengths, earned, processor.decode, count)
                    run.write_completions(step + 1, "train", kept)
                for line in watch.update(earned.components):
                    progress.print(line)
                progress.update(metrics)
                stop_if_not_finite(int(updated["skipped_in_a_row"]), step, records, config)

                # ---- evaluation, checkpoint; the end if SIGTERM came ----
                done, last = step + 1, following is None
                due = last or bool(config.eval.every and done % config.eval.every == 0)
                if due and not run.stopping:
                    evaluated = evaluate.run_evaluation(
                        done, config, mesh, eval_programs, sampler, inputs, run
                    )
                    due = evaluated is None
                if last or run.stopping or done % config.checkpoint.every == 0:
                    run.save(done, state, owes_evaluation=due)
                if run.stopping:
                    run.stop(done)
                batch = following
        progress.close()
        say(scores_table(run, config.train.steps))
        if bad := run.bad_videos():
            say(bad)
        run.finish()
    say(closing_words(config))


def off_policy_note(section: RolloutSection) -> str | None:
    """What to tell the user about sampling from a part of the distribution; None if it is whole."""
    if section.top_p == 1 and section.top_k == 0:
        return None
    return (
        f"warning: with rollout.top_p={section.top_p} and rollout.top_k={section.top_k} "
        "completions are drawn from a part of the policy's distribution, while the update takes "
        "them as draws from all of it; 1 and 0 are on-policy"
    )


def scores_table(run: RunDir, last: int) -> str:
    """The recorded scores before the first and after the last step."""
    return evaluate.table({"before": run.scores(step=0), "after": run.scores(step=last)})


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
    tokens: np.ndarray,
    lengths: np.ndarray,
    scores: Scores,
    decode: Callable[[np.ndarray], str],
    count: int,
) -> list[dict[str, Any]]:
    """The first completion of `count` prompts as lines to read; all of every prompt where it is -1.

    The lines carry "row" and "sample", by which `rescore` knows the groups.

    Args:
      records, tokens, lengths, scores: of the whole batch.
    """
    prompts, group = lengths.shape
    chosen = [(p, 0) for p in range(min(count, prompts))]
    if count < 0:
        chosen = [(p, g) for p in range(prompts) for g in range(group)]
    return [
        evaluate.sample(
            evaluate.Prediction(
                records[p],
                decode(tokens[p, g]),
                float(scores.total[p, g]),
                {name: float(values[p, g]) for name, values in scores.components.items()},
                int(lengths[p, g]),
            )
        )
        | {"row": p, "sample": g}
        for p, g in chosen
    ]


def closing_words(config: Config) -> str:
    """What was written and what to do next."""
    run = config.run_dir
    return (
        f"wrote {run}: metrics.jsonl, completions.jsonl, curves.png, checkpoints/\n"
        f"next: jaxgrpo export {run} {run}-hf   (a directory for transformers and vLLM)"
    )
