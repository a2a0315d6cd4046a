"""Supervised fine-tuning: `jaxgrpo sft CONFIG`. The cold start, and the paper's SFT baseline.

It learns the completions with the largest reward (`data.prompts.target_text`) by the forward pass
that GRPO uses, with one completion per prompt.
"""

from __future__ import annotations

import time

import jax

from data.pipeline import batches
from data.sampling import StepPlan
from jaxgrpo import evaluate
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.inputs import (
    PromptCollator,
    PromptLoader,
    TargetCollator,
    TargetLoader,
    describe,
    prepare,
)
from jaxgrpo.load import open_policy, open_processor
from jaxgrpo.metrics import CompileCounter, Progress
from jaxgrpo.programs import compile_sft, init_program, publish_program
from jaxgrpo.run_dir import RunDir
from jaxgrpo.sharding import (
    SAMPLER_RULES,
    check_divides,
    make_mesh,
    param_shardings,
    process_rows,
    put_prompts,
    start_processes,
)
from jaxgrpo.train import run_evaluation, say, stop_if_not_finite
from jaxgrpo.update import make_optimizer, split_frozen


def main(config: Config) -> None:
    """Trains on the targets, evaluates, and leaves a run directory."""
    # ---- machine ----
    start_processes()
    mesh = make_mesh(config.mesh)
    prompts, length = config.sft.batch, config.rollout.max_new_tokens
    if prompts % config.optim.accumulate:
        raise ConfigError(
            f"optim.accumulate is {config.optim.accumulate}, expected a divisor of sft.batch "
            f"({prompts})"
        )

    with CompileCounter() as compilations, RunDir(config, "sft") as run:
        # ---- data ----
        processor = open_processor(config)
        check_divides(
            mesh,
            processor.config,
            {
                "sft.batch / optim.accumulate": prompts // config.optim.accumulate,
                "eval.batch": config.eval.batch,
            },
        )
        inputs = prepare(config, processor, train=True, evaluation=True, excluded=run.excluded)
        run.excluded = inputs.excluded
        assert inputs.train is not None
        say(describe(inputs))
        targets = TargetLoader(PromptLoader(processor, inputs.train.records, config.data), length)
        for item in range(len(inputs.train.records)):
            targets.completion(item)  # one that is too long is named now, not in the middle

        # ---- weights, optimiser, programs ----
        policy, params = open_policy(
            config.model, processor, mesh, temperature=1.0, seed=config.seed
        )
        optimizer = make_optimizer(config.optim, config.sft.steps)
        trained, frozen = split_frozen(params, config.model.freeze_vision)
        state = run.restore(init_program(mesh, optimizer, trained)(trained))
        del params, trained
        layout = param_shardings(policy.config, mesh, SAMPLER_RULES)
        publish = publish_program(policy, layout).lower(state.params, frozen).compile()
        sampler = publish(state.params, frozen)
        programs = [
            compile_sft(config, mesh, policy, bucket, optimizer, state, frozen)
            for bucket in inputs.buckets
        ]
        eval_programs = evaluate.compile_eval(config, mesh, policy, inputs, sampler)

        # ---- the loop ----
        loader = batches(
            StepPlan(inputs.train.buckets, prompts, config.seed),
            targets,
            TargetCollator(PromptCollator(inputs.buckets, processor.pad_id), length),
            start_step=run.first_step,
            num_steps=config.sft.steps - run.first_step,
            rows=process_rows(mesh, prompts),
            threads=config.data.threads,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            ids=[record.id for record in inputs.train.records],
        )
        progress = Progress("SFT", config.sft.steps, run.first_step)
        with loader:
            for batch in loader:
                done, begun = batch.step + 1, time.perf_counter()
                learnt = put_prompts(mesh, batch.prompts)
                state, updated = programs[batch.bucket](
                    state, frozen, learnt.prompt, learnt.completion, learnt.length
                )
                metrics = {name: float(value) for name, value in jax.device_get(updated).items()}
                for line in run.note_failures(batch.failures, inputs.train.records):
                    progress.print(line)
                metrics |= {
                    "data/failed_videos": len(run.failures),
                    "compilations": compilations.total,
                    "time/step": time.perf_counter() - begun,
                }
                last = done == config.sft.steps
                if last or done % config.log.every == 0:
                    run.write(done, "train", metrics)
                progress.update(metrics)
                records = [inputs.train.records[item] for item in batch.items]
                stop_if_not_finite(int(metrics["skipped_in_a_row"]), batch.step, records, config)
                if last or (config.eval.every and done % config.eval.every == 0):
                    sampler = publish(state.params, frozen)
                    scores = run_evaluation(done, config, mesh, eval_programs, sampler, inputs, run)
                    progress.print(evaluate.table({f"step {done}": scores}))
                if last or done % config.checkpoint.every == 0:
                    run.save(done, state)
        progress.close()
        run.finish()
    say(
        f"wrote {config.run_dir}\n"
        f"next: jaxgrpo train CONFIG model.path={config.run_dir}, or "
        f"jaxgrpo export {config.run_dir} {config.run_dir}-hf"
    )
