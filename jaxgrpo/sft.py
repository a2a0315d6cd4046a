"""Supervised fine-tuning: `jaxgrpo sft CONFIG`. The cold start, and the paper's SFT baseline.

It learns the completions with the largest reward (`data.prompts.target_text`) by the forward pass
that GRPO uses, with one completion per prompt.
"""

from __future__ import annotations

import time

import jax

from jaxgrpo import evaluate, preemption
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.dataset import step_plan
from jaxgrpo.feed import Feed
from jaxgrpo.inputs import (
    PromptCollator,
    TargetCollator,
    TargetLoader,
    describe,
    prepare,
    prompt_loader,
)
from jaxgrpo.load import open_policy, open_processor, open_trained, weight_steps
from jaxgrpo.metrics import CompileCounter, Progress
from jaxgrpo.policy import Params
from jaxgrpo.processes import start_processes
from jaxgrpo.programs import cache_compilations, compile_sft, lower_weights
from jaxgrpo.run_dir import RunDir
from jaxgrpo.sharding import (
    check_divides,
    make_mesh,
    put_prompts,
    say,
)
from jaxgrpo.update import split_frozen, stop_if_not_finite


def main(config: Config) -> None:
    """Trains on the targets, evaluates, and leaves a run directory."""
    # ---- machine ----
    start_processes(config)
    cache_compilations(config)
    mesh = make_mesh(config.mesh)
    prompts, length = config.sft.batch, config.rollout.max_new_tokens
    if prompts % config.optim.accumulate:
        raise ConfigError(
            f"optim.accumulate is {config.optim.accumulate}, expected a divisor of sft.batch "
            f"({prompts})"
        )

    with CompileCounter() as compilations, RunDir(config, "sft") as run:
        if run.first_step == config.sft.steps and not run.owes_evaluation:
            say(f"{config.run_dir} is finished: it has done its {config.sft.steps} steps")
            say(evaluate.table({f"step {config.sft.steps}": run.scores(step=config.sft.steps)}))
            run.finish()
            say(closing_words(config))
            return

        # ---- data ----
        processor = open_processor(config)
        check_divides(
            mesh,
            processor.config,
            {
                "sft.batch / optim.accumulate": prompts // config.optim.accumulate,
                "eval.batch": config.eval.batch,
            },
            replicate_kv=config.mesh.replicate_kv,
        )
        inputs = prepare(config, processor, train=True, evaluation=True, excluded=run.excluded)
        assert inputs.train is not None and inputs.evaluation is not None
        say(describe(inputs))
        run.check_best({record.task for record in inputs.evaluation.records})
        run.keep_to(
            inputs.train.plan,
            weight_steps(config.model.path) if config.base_needed else [],
            inputs.excluded,
        )
        targets = TargetLoader(prompt_loader(inputs, inputs.train, config.data), length)
        for item in range(len(inputs.train.records)):
            targets.completion(item)  # one that is too long is named now, not in the middle

        # ---- weights, optimiser, programs ----
        policy = open_policy(
            config.model, processor, mesh, temperature=1.0, lora=config.lora.adapters
        )
        weights = lower_weights(config, mesh, policy, config.sft.steps, reference=False)
        frozen: Params = {}
        if run.first_step == 0 or config.base_needed:
            params = open_trained(config, policy.config, mesh)
            trained, frozen = split_frozen(params, config.model.freeze_vision)
            if run.first_step == 0:
                state = weights.init.compile()(trained)
            del params, trained
        if run.first_step:
            state = run.restore(weights.init.out_info)
        to_sampler = weights.to_sampler.compile()
        programs = {
            number: compile_sft(config, mesh, policy, bucket, weights)
            for number, bucket in enumerate(inputs.train.offers)
            if inputs.train.buckets[number]
        }
        eval_programs = evaluate.compile_eval(
            config, mesh, policy, inputs, weights.to_sampler.out_info
        )

        # ---- an evaluation that SIGTERM cut short ----
        if run.owes_evaluation:
            sampler = to_sampler(state.params, frozen)
            evaluate.run_evaluation(
                run.first_step, config, mesh, eval_programs, sampler, inputs, run
            )
            del sampler

        # ---- the loop ----
        loader = Feed(
            mesh,
            step_plan(inputs.train, prompts, config.seed),
            targets,
            TargetCollator(PromptCollator(inputs.train.offers, processor.pad_id), length),
            inputs.train.records,
            config.data,
            start_step=run.first_step,
            num_steps=config.sft.steps - run.first_step,
            given_up=run.given_up(inputs.train.records),
        )
        progress = Progress("SFT", config.sft.steps, run.first_step)
        preemption.defer()
        with loader:
            for batch in loader:
                done, begun = batch.step + 1, time.perf_counter()
                learnt = put_prompts(mesh, batch.prompts)
                state, updated = programs[batch.bucket](
                    state, frozen, learnt.prompt, learnt.completion, learnt.length
                )
                metrics = {name: float(value) for name, value in jax.device_get(updated).items()}
                for line in run.note(batch, loader.rows, inputs.train.records).lines:
                    progress.print(line)
                metrics |= {
                    "data/failed_videos": len(run.failures),
                    **inputs.served(),
                    "compilations": compilations.total,
                    "time/step": time.perf_counter() - begun,
                }
                last = done == config.sft.steps
                if last or done % config.log.every == 0:
                    run.write(done, "train", metrics)
                progress.update(metrics)
                records = [inputs.train.records[item] for item in batch.items]
                stop_if_not_finite(int(metrics["skipped_in_a_row"]), batch.step, records, config)
                due = last or bool(config.eval.every and done % config.eval.every == 0)
                if due and not run.stopping:
                    sampler = to_sampler(state.params, frozen)
                    scores = evaluate.run_evaluation(
                        done, config, mesh, eval_programs, sampler, inputs, run
                    )
                    del sampler
                    due = scores is None
                    if scores is not None:
                        progress.print(evaluate.table({f"step {done}": scores}))
                if last or run.stopping or done % config.checkpoint.every == 0:
                    run.save(done, state, owes_evaluation=due)
                if run.stopping:
                    run.stop(done)
        progress.close()
        if bad := run.bad_videos():
            say(bad)
        run.finish()
    say(closing_words(config))


def closing_words(config: Config) -> str:
    """What was written and what to do next."""
    return (
        f"wrote {config.run_dir}\n"
        f"next: jaxgrpo train CONFIG model.path={config.run_dir}, or "
        f"jaxgrpo export {config.run_dir} {config.run_dir}-hf"
    )
