"""GRPO training: `jaxgrpo train CONFIG`. `main` reads like the algorithm, from top to bottom.

Legend: P prompts in a step, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data.sampling import Plan
from jaxgrpo import evaluate, preemption
from jaxgrpo.config import Config, RolloutSection
from jaxgrpo.dataset import online_plan, step_plan
from jaxgrpo.feed import Feed
from jaxgrpo.inputs import PromptCollator, describe, prepare, prompt_loader
from jaxgrpo.load import open_policy, open_processor, open_trained, weight_steps
from jaxgrpo.metrics import CompileCounter, Laps, Progress
from jaxgrpo.policy import Params
from jaxgrpo.processes import start_processes
from jaxgrpo.profile import Profiler
from jaxgrpo.programs import (
    Scores,
    answer_shapes,
    cache_compilations,
    lower_train,
    lower_weights,
    prompt_shapes,
    score_program,
    truth_shapes,
)
from jaxgrpo.refill import Drawn, Groups, lower_refill, places, refilled, together
from jaxgrpo.run_dir import RunDir
from jaxgrpo.scoring import ConstantWatch, agreed, group_line, open_reward
from jaxgrpo.sharding import (
    check_divides,
    make_mesh,
    put_global,
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
        needs_base = bool(config.grpo.kl) or config.base_needed  # when it is resumed too
        run.keep_to(
            inputs.train.plan,
            weight_steps(config.model.path) if needs_base else [],
            inputs.excluded,
        )

        # ---- weights: policy, reference, optimiser ----
        policy = open_policy(
            config.model,
            processor,
            mesh,
            temperature=config.rollout.temperature,
            lora=config.lora.adapters,
        )
        weights = lower_weights(
            config, mesh, policy, config.train.steps, reference=bool(config.grpo.kl)
        )
        reference: Params = {}  # with adapters it is what is frozen
        frozen: Params = {}
        if run.first_step == 0 or needs_base:
            params = open_trained(config, policy.config, mesh)
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
        score_shapes = (
            answer_shapes(mesh, prompts, config.rollout.group),
            truth_shapes(mesh, prompts, inputs.train.max_spans),
        )
        to_score = score_program(mesh, reward, config.grpo.divide_by_std).lower(*score_shapes)
        score = to_score.compile()
        programs, refill = {}, {}
        for number, bucket in enumerate(inputs.train.offers):
            if not inputs.train.buckets[number]:
                continue
            lowered = lower_train(config, mesh, policy, bucket, weights)
            programs[number] = lowered.compile()
            if config.rollout.refills:
                prompt = prompt_shapes(mesh, policy.config.vision, bucket, prompts)
                rollout, features = lowered.rollout.out_info
                groups = Groups(prompt, features, rollout, to_score.out_info)
                refill[number] = lower_refill(mesh, groups).compile()
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
        folder = tempfile.TemporaryDirectory(prefix="jaxgrpo-")
        attempts = 1 + config.rollout.refills  # rollouts in a step, at most
        plan: Plan
        online = None
        if config.data.online is None:
            plan = step_plan(inputs.train, prompts, config.seed, attempts)
        else:
            plan, online = online_plan(
                *(inputs.train, prompts, config.seed, attempts),
                *(config.data.online, Path(folder.name), run.online),
            )
        loader = Feed(
            mesh,
            plan,
            prompt_loader(inputs, inputs.train, config.data),
            PromptCollator(inputs.train.offers, processor.pad_id),
            inputs.train.records,
            config.data,
            start_step=run.next_batch,
            num_steps=(config.train.steps - run.first_step) * attempts,
            given_up=run.given_up(inputs.train.records),
        )
        rows = loader.rows  # of each batch, those of this process
        progress = Progress("GRPO", config.train.steps, run.first_step)
        watch = ConstantWatch(config.reward.constant_steps)
        profiler = Profiler(config.profile, run.path)
        seed = put_scalar(mesh, config.seed)
        preemption.defer()
        with loader, folder:  # in the end the folder goes first: who waits for weights is released
            following = next(loader, None)
            on_device: Any = put_prompts(mesh, following.prompts) if following else None
            for done in range(run.first_step + 1, config.train.steps + 1):
                last = done == config.train.steps
                profiler.begin(done)
                laps = Laps()
                held: Groups | None = None
                drawn: list[Drawn] = []
                for _ in range(attempts):
                    assert following is not None, "a batch for every rollout"
                    batch, prompt = following, on_device
                    program = programs[batch.bucket]

                    # ---- rollout: the video once, the prompt once, G completions ----
                    rollout, features = program.rollout(
                        sampler, prompt, seed, put_scalar(mesh, batch.step)
                    )

                    # ---- while the device works: the next batch ----
                    laps.lap("rollout")
                    following = next(loader, None)
                    laps.lap("data_wait")
                    on_device = put_prompts(mesh, following.prompts) if following else None
                    noted = run.note(batch, rows, inputs.train.records)
                    records = [inputs.train.records[item] for item in noted.items]
                    tokens, lengths, finished = jax.device_get(
                        (rollout.tokens, rollout.lengths, rollout.finished)
                    )
                    laps.lap("rollout")

                    # ---- rewards: text -> answers on the host -> scores and advantages ----
                    mine = [records[row] for row in rows]
                    texts = [[processor.decode(ids) for ids in row] for row in tokens[rows]]
                    answers = agreed(reward, mesh, rows, reward.read(texts, mine, lengths[rows]))
                    truth = reward.truth(mine, inputs.train.max_spans)
                    scores = score(*put_prompts(mesh, (answers, truth)))
                    earned = jax.device_get(scores)
                    reward.check(earned.components)
                    new = Drawn(records, tokens, lengths, finished, earned)
                    drawn.append(new)
                    lines = [group_line(record, earned, p) for p, record in enumerate(records)]
                    run.write_groups(done, [{"batch": batch.step} | line for line in lines])
                    if online is not None:
                        spread = [line["std"] for line in lines]
                        online.observe(batch.step, noted.items, spread, noted.failed)
                    for line in [*noted.lines, *watch.update(earned.components)]:
                        progress.print(line)

                    # ---- refill: other groups for those whose rewards are all equal ----
                    groups = Groups(prompt, features, rollout, scores)
                    if held is None:
                        held, kept = groups, new
                    else:
                        source = places(kept.scores.zero_variance, earned.zero_variance)
                        on_all = put_global(source, NamedSharding(mesh, PartitionSpec()))
                        held = refill[batch.bucket](held, groups, on_all)
                        kept = refilled(kept, new, source)
                    laps.lap("reward")
                    full = not kept.scores.zero_variance.any()
                    if full or following is None or following.bucket != batch.bucket:
                        break

                assert held is not None, "at least one rollout"

                # ---- reference: the longest completion says how far ----
                length = program.learn_from(kept.lengths)
                learn = program.learn[length]
                ref_logp = None
                if learn.reference is not None:
                    ref_logp = learn.reference(
                        *(reference, frozen, held.prompt, held.features, held.rollout.tokens)
                    )

                # ---- update: the prompt once and its G completions ----
                update_batch = UpdateBatch(
                    prompt=held.prompt,
                    features=held.features,
                    completions=held.rollout.tokens,
                    lengths=held.rollout.lengths,
                    finished=held.rollout.finished,
                    advantages=held.scores.advantages,
                    sampler_logp=held.rollout.sampler_logp,
                    old_logp=None,
                    ref_logp=ref_logp,
                )
                del sampler  # the update needs its memory
                state, updated, logp = learn.update(state, frozen, update_batch)
                if learn.update_again is not None:
                    update_batch = update_batch._replace(old_logp=logp)
                    for _ in range(config.grpo.updates - 1):
                        state, again, _ = learn.update_again(state, frozen, update_batch)
                    # Of the first: what it met. Of the last: what only the others can tell.
                    news = again.keys() - updated.keys() | {"skipped_in_a_row"}
                    updated |= {name: again[name] for name in news}
                sampler = to_sampler(state.params, frozen)
                updated = jax.device_get(updated)
                laps.lap("update")

                # ---- metrics ----
                if profiler.end(done, last=last):
                    progress.print(f"wrote a trace to {profiler.folder}")
                times = laps.seconds()
                sampled = together(drawn)
                metrics = {
                    **step_metrics(sampled.scores, sampled.lengths, sampled.finished, updated),
                    "completion/bucket": length,
                    "data/failed_videos": len(run.failures),
                    **inputs.served(),
                    "compilations": compilations.total,
                    **times,
                    "throughput/tokens_per_second": int(sampled.lengths.sum()) / times["time/step"],
                }
                if config.rollout.refills:
                    metrics["groups/sampled"] = len(sampled.records)
                    metrics["groups/teaching"] = 1 - float(kept.scores.zero_variance.mean())
                if done % config.log.every == 0 or last:
                    run.write(done, "train", metrics)
                    shown = samples(sampled, processor.decode, config.log.samples)
                    run.write_completions(done, "train", shown)
                progress.update(metrics)
                in_a_row = int(updated["skipped_in_a_row"])
                stop_if_not_finite(in_a_row, done - 1, kept.records, config)

                # ---- evaluation, checkpoint; the end if SIGTERM came ----
                due = last or bool(config.eval.every and done % config.eval.every == 0)
                if due and not run.stopping:
                    evaluated = evaluate.run_evaluation(
                        done, config, mesh, eval_programs, sampler, inputs, run
                    )
                    due = evaluated is None
                if last or run.stopping or done % config.checkpoint.every == 0:
                    run.save(
                        *(done, state),
                        owes_evaluation=due,
                        next_batch=batch.step + 1,
                        online=None if online is None else online.state(),
                    )
                if run.stopping:
                    run.stop(done)
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


def samples(drawn: Drawn, decode: Callable[[np.ndarray], str], count: int) -> list[dict[str, Any]]:
    """The first completion of `count` prompts as lines to read; all of every prompt where it is -1.

    The lines carry "row" and "sample", by which `rescore` knows the groups.
    """
    records, tokens, lengths, _, scores = drawn
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
        f"wrote {run}: metrics.jsonl, completions.jsonl, groups.jsonl, curves.png, checkpoints/\n"
        f"next: jaxgrpo export {run} {run}-hf   (a directory for transformers and vLLM)"
    )
