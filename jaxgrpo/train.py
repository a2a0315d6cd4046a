"""GRPO training: `jaxgrpo train CONFIG`. Reads like the algorithm, from top to bottom.

Legend: P prompts in a step, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.pipeline import batches
from data.sampling import StepPlan
from jaxgrpo import evaluate, metrics, run
from jaxgrpo.config import Config
from jaxgrpo.inputs import PromptCollator, PromptLoader, prepare
from jaxgrpo.programs import (
    answer_shapes,
    compile_train,
    publish_program,
    score_program,
    truth_shapes,
)
from jaxgrpo.sharding import (
    check_divides,
    gather_to_host,
    process_rows,
    put_prompts,
    put_scalar,
)
from jaxgrpo.update import UpdateBatch, init_program, make_optimizer, split_frozen
from rewards.dual import truth_arrays
from rewards.parse import parse_batch


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def main(config: Config) -> None:
    """Trains, evaluates before and after, and leaves a run directory to resume, read and export."""
    # ---- machine: processes, mesh ----
    mesh = run.start(config)
    prompts, group = config.rollout.prompts, config.rollout.group
    micro = prompts // config.optim.accumulate
    say = run.Console()

    with metrics.CompileCounter() as compilations, run.RunDir(config, "train") as folder:
        # ---- data: manifests, probes, buckets ----
        model_dir = run.find_model(config.model.path)
        processor = run.open_processor(config, model_dir)
        check_divides(
            mesh,
            processor.config,
            {"rollout.prompts / optim.accumulate": micro, "eval.batch": config.eval.batch},
        )
        saved = folder.saved_data()
        inputs = prepare(
            config, processor, train=True, evaluation=True, excluded=saved.get("excluded", ())
        )
        assert inputs.train is not None
        say(run.describe_data(inputs))

        # ---- weights: policy, reference, optimiser ----
        policy, params = run.open_policy(config, model_dir, processor, mesh)
        optimizer = make_optimizer(config.optim, config.train.steps)
        trained, frozen = split_frozen(params, config.model.freeze_vision)
        reference = params if config.grpo.kl else None
        state = init_program(mesh, optimizer, trained)(trained)
        first_step = folder.first_step
        if first_step:
            state = folder.restore(state)

        # ---- programs: everything is compiled before the first step ----
        say(f"compiling for {len(inputs.buckets)} bucket(s) of {config.data.buckets} tokens ...")
        started = time.perf_counter()
        publish = publish_program(policy, run.sampler_shardings(processor.config, mesh))
        publish = publish.lower(state.params, frozen).compile()
        sampler = publish(state.params, frozen)
        programs = [
            compile_train(config, mesh, policy, bucket, optimizer, state, frozen, sampler)
            for bucket in inputs.buckets
        ]
        score = (
            score_program(mesh, config.reward, config.grpo.divide_by_std)
            .lower(
                answer_shapes(mesh, prompts, group), truth_shapes(mesh, prompts, inputs.max_spans)
            )
            .compile()
        )
        eval_programs = evaluate.compile_eval(config, mesh, policy, inputs, sampler)
        say(f"compiled in {time.perf_counter() - started:.0f} s")

        # ---- evaluation before the first step ----
        if first_step == 0:
            run.evaluate_and_log(0, config, mesh, eval_programs, sampler, inputs, folder)

        # ---- the loop ----
        plan = StepPlan(inputs.train.buckets, prompts, config.seed)
        rows = process_rows(mesh, prompts)
        loader = batches(
            plan,
            PromptLoader(processor, inputs.train.records, config.data),
            PromptCollator(inputs.buckets, processor.pad_id),
            start_step=first_step,
            num_steps=config.train.steps - first_step,
            rows=rows,
            threads=config.data.threads,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            ids=[record.id for record in inputs.train.records],
        )
        seed = put_scalar(mesh, config.seed)
        progress = metrics.Progress("GRPO", config.train.steps, first_step)
        with loader:
            batch = next(loader, None)
            device_prompts = put_prompts(mesh, batch.prompts) if batch else None
            while batch is not None:
                step = batch.step
                clock = run.Clock()
                executables = programs[batch.bucket]

                # -- rollout: the video once, the prompt once, G completions --
                rollout, features = executables.rollout(
                    sampler, device_prompts, seed, put_scalar(mesh, step)
                )
                ref_logp = None
                if reference is not None and executables.reference is not None:
                    ref_logp = executables.reference(
                        reference, device_prompts, features, rollout.tokens
                    )
                tokens, lengths, finished = gather_to_host(
                    (rollout.tokens, rollout.lengths, rollout.finished)
                )
                clock.lap("time/rollout")

                # -- rewards: text -> answers on the host, scores and advantages on the device --
                records = [inputs.train.records[item] for item in batch.items]
                texts = [[processor.decode(t) for t in row] for row in tokens[rows]]
                answers = parse_batch(
                    texts, [record.task for record in records], thinking=config.data.thinking
                )
                truth = truth_arrays(records, inputs.max_spans)
                scores = score(*put_prompts(mesh, (answers, truth)))
                clock.lap("time/reward")

                # -- update: the prompt once and its G completions --
                update_batch = UpdateBatch(
                    prompt=device_prompts,
                    features=features,
                    completions=rollout.tokens,
                    lengths=rollout.lengths,
                    advantages=scores.advantages,
                    sampler_logp=rollout.sampler_logp,
                    old_logp=None,
                    ref_logp=ref_logp,
                )
                state, update_metrics = executables.update(state, frozen, update_batch)
                sampler = publish(state.params, frozen)

                # -- while the device works: the next batch --
                waiting = time.perf_counter()
                following = next(loader, None)
                clock.note("time/data_wait", time.perf_counter() - waiting)
                if following is not None:
                    device_prompts = put_prompts(mesh, following.prompts)

                # -- metrics --
                update_metrics = jax.device_get(update_metrics)
                scores = gather_to_host(scores)
                clock.lap("time/update")
                line = run.train_metrics(scores, lengths, finished, update_metrics)
                line |= clock.metrics(prompts, device_tokens=int(lengths.sum()))
                line["compilations"] = compilations.total
                line["data/failures"] = folder.note_failures(batch.failures, inputs.train, say)
                folder.write(step + 1, "train", line)
                folder.write_samples(step + 1, records, texts, gather_rows(scores, rows), config)
                progress.update(line)
                check_finite(state_skipped=int(update_metrics["skipped_in_a_row"]), line=line,
                             config=config, step=step, items=[r.id for r in records])

                # -- evaluation and checkpoint --
                last = step + 1 == config.train.steps
                if last or (config.eval.every and (step + 1) % config.eval.every == 0):
                    run.evaluate_and_log(
                        step + 1, config, mesh, eval_programs, sampler, inputs, folder
                    )
                if last or (step + 1) % config.checkpoint.every == 0:
                    folder.save(step + 1, state, inputs)
                batch = following
        progress.close()
        folder.finish(config)
