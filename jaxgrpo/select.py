"""Variance-aware selection: `jaxgrpo select CONFIG`. Which items of the training data teach.

Every item is sampled k times; what each completion said and earned is kept, and the items whose
rewards disagree are written down (Temporal-RLT, arXiv 2506.01908; `data.selection`).

run_dir/completions.jsonl  all completions with their rewards and parsed answers, as in training
run_dir/groups.jsonl       a line per item: mean and deviation of its rewards, or why it failed
run_dir/selected.jsonl     the items that are kept: a manifest, and what `data.keep` takes
run_dir/difficulty.png     a picture of all items

The first two grow by a batch at a time, and a start that finds them goes on behind the last whole
one; the others are made of them, again and again under other rules, without a model.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.records import Record, write_atomically
from data.sampling import OnePass
from data.selection import (
    CONTINUOUS,
    DISCRETE,
    KEPT,
    TEMPORAL,
    VERDICTS,
    Rules,
    Sampled,
    verdicts,
)
from jaxgrpo import config as configs
from jaxgrpo import evaluate
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.dataset import Dataset
from jaxgrpo.difficulty import plot_difficulty
from jaxgrpo.feed import Feed
from jaxgrpo.inputs import PromptCollator, describe, prepare, prompt_loader
from jaxgrpo.load import open_params, open_policy, open_processor, weight_steps
from jaxgrpo.metrics import (
    COMPLETIONS,
    GROUPS,
    METRICS,
    Laps,
    MetricsLog,
    Progress,
    each_line,
    read_metrics,
)
from jaxgrpo.mirror import Mirror
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
from jaxgrpo.reward_config import RewardSection
from jaxgrpo.rollout import Sampling
from jaxgrpo.run_dir import CONFIG
from jaxgrpo.scoring import agreed, group_line, open_reward
from jaxgrpo.sharding import check_divides, gather_objects, make_mesh, put_prompts, put_scalar, say
from rewards.parse import LETTERS, parse

SELECTED = "selected.jsonl"
PICTURE = "difficulty.png"
_BEGUN = "select.json"  # what the samples depend on besides the config
_OF_LEARNING = ("grpo", "optim", "train", "sft")  # sections that no sample depends on
_DONE = "done"  # the split of the last line of metrics.jsonl
_PUSH_EVERY = 600.0  # seconds, to a run_dir in a bucket, where files are copied whole


def main(config: Config) -> None:
    """Samples what has not been sampled yet, and selects."""
    # ---- machine, files ----
    start_processes(config)
    cache_compilations(config)
    mirror = Mirror(config.run_dir, (METRICS, COMPLETIONS, GROUPS, CONFIG, _BEGUN))
    _check_begun(mirror.folder, config)

    # ---- samples ----
    done, finished = gather_objects(_progress(mirror.folder))[0]
    if finished:
        say(f"{config.run_dir} holds all samples: only the rules are applied again")
    else:
        sample(config, mirror, done)

    # ---- rules ----
    if jax.process_index() == 0:
        choose(config, mirror.folder)
        mirror.push()
    say(closing_words(config))


def sample(config: Config, mirror: Mirror, done: int) -> None:
    """Writes the completions and rewards of all batches from number `done` on."""
    section = config.select
    mesh = make_mesh(config.mesh)
    reward = open_reward(config)

    # ---- data: one pass over the training items ----
    processor = open_processor(config)
    sizes = {"select.batch": section.batch}
    check_divides(mesh, processor.config, sizes, replicate_kv=config.mesh.replicate_kv)
    begun = _read_begun(mirror.folder)
    excluded = begun["excluded"] if begun else {}
    inputs = prepare(config, processor, train=True, evaluation=False, excluded=excluded)
    dataset = inputs.train
    assert dataset is not None
    say(describe(inputs))
    reward.truth(dataset.records, dataset.max_spans)  # what is missing is named now
    plan = OnePass(dataset.buckets, section.batch, dataset.spares)
    _keep_to(mirror.folder, config, dataset, inputs.excluded)

    # ---- model and programs ----
    policy = open_policy(config.model, processor, mesh, temperature=config.rollout.temperature)
    params = open_params(config.model, processor.config, mesh, config.seed)
    sampler = lower_publish(mesh, policy, params, {}).compile()(params, {})
    del params
    rollout = config.rollout
    sampling = Sampling(
        section.samples,
        rollout.max_new_tokens,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
    )
    program = rollout_program(mesh, policy, sampling, keep_features=False)
    scalar = scalar_shape(mesh)
    programs = {
        number: program.lower(
            *(sampler, prompt_shapes(mesh, policy.config.vision, bucket, section.batch)),
            *(scalar, scalar),
        ).compile()
        for number, bucket in enumerate(dataset.offers)
        if dataset.buckets[number]
    }
    score = (
        score_program(mesh, reward, divide_by_std=False)
        .lower(
            answer_shapes(mesh, section.batch, section.samples),
            truth_shapes(mesh, section.batch, dataset.max_spans),
        )
        .compile()
    )

    # ---- batch by batch; a draw depends on the seed and the item's place in the pass alone ----
    loader = Feed(
        mesh,
        plan,
        prompt_loader(inputs, dataset, config.data),
        PromptCollator(dataset.offers, processor.pad_id),
        dataset.records,
        config.data,
        start_step=done,
        num_steps=plan.steps - done,
    )
    rows = loader.rows
    seen = {item for step in range(done) for item in plan.step(step).items}
    seed = put_scalar(mesh, config.seed)
    progress = Progress("select", plan.steps, done)
    log = MetricsLog(mirror.folder, done or None, tensorboard=False)
    spent: collections.Counter[str] = collections.Counter()
    pushed = time.monotonic()
    with loader, log:
        laps = Laps()
        for batch in loader:
            laps.lap("data_wait")
            completions, _ = programs[batch.bucket](
                sampler, put_prompts(mesh, batch.prompts), seed, put_scalar(mesh, batch.step)
            )
            tokens, lengths = jax.device_get((completions.tokens, completions.lengths))
            laps.lap("rollout")
            planned = plan.step(batch.step).items
            records = [dataset.records[item] for item in planned]
            mine = [records[row] for row in rows]
            texts = [[processor.decode(ids) for ids in row] for row in tokens[rows]]
            answers = agreed(reward, mesh, rows, reward.read(texts, mine, lengths[rows]))
            truth = reward.truth(mine, dataset.max_spans)
            scores = jax.device_get(score(*put_prompts(mesh, (answers, truth))))
            reward.check(scores.components)

            # ---- what was said and earned; nothing of an item whose video another's replaced ----
            failures = [(f.item, f"{f.kind}: {f.message}") for f in batch.failures]
            failed = {item: why for part in gather_objects(failures) for item, why in part}
            for row, item in enumerate(planned):
                if item in seen:  # the last batch of a bucket is filled up with its first items
                    continue
                seen.add(item)
                record = records[row]
                if item in failed:
                    line = {"id": record.id, "task": record.task, "failed": failed[item]}
                    log.write_groups(batch.step + 1, [line])
                    continue
                said = [processor.decode(ids) for ids in tokens[row]]
                log.write_completions(
                    batch.step + 1,
                    "select",
                    [
                        evaluate.sample(
                            evaluate.Prediction(
                                *(record, text, float(scores.total[row, g])),
                                {n: float(x[row, g]) for n, x in scores.components.items()},
                                int(lengths[row, g]),
                            )
                        )
                        | {"row": row, "sample": g, "answer": answer_of(text, config, record)}
                        for g, text in enumerate(said)
                    ],
                )
                log.write_groups(batch.step + 1, [group_line(record, scores, row)])
            laps.lap("reward")
            log.write(batch.step + 1, "select", laps.seconds())
            spent.update(laps.seconds())
            progress.update({"reward/total": float(scores.total.mean())})
            if jax.process_index() == 0 and time.monotonic() - pushed > _PUSH_EVERY:
                mirror.push()
                pushed = time.monotonic()
            laps = Laps()
        log.write(plan.steps, _DONE, {})
    progress.close()
    if jax.process_index() == 0:
        mirror.push()
    if spent["time/step"]:
        share = spent["time/rollout"] / spent["time/step"]
        waited = spent["time/data_wait"] / spent["time/step"]
        say(
            f"sampled in {spent['time/step']:.0f} s, {share:.0%} of it generation, {waited:.0%} "
            "waiting for videos"
        )


def answer_of(text: str, config: Config, record: Record) -> dict[str, Any]:
    """What the parser read: format, letter, span in seconds, or the written answer."""
    answer = parse(text, record.task, thinking=config.data.thinking)
    found: dict[str, Any] = {"format": answer.format_ok}
    if answer.choice >= 0:
        found["choice"] = LETTERS[answer.choice]
    if not np.isnan(answer.start):
        found["span"] = [answer.start, answer.end]
    if answer.text is not None:
        found["text"] = answer.text
    return found


# ---- rules ----


def choose(config: Config, folder: Path) -> None:
    """Writes the items that the rules keep, the picture, and a table for the user."""
    groups = read_metrics(folder / GROUPS)
    items = [sampled(g, config.reward) for g in groups if "failed" not in g]
    section = config.select
    low, high = section.right
    rules = Rules(
        right=(low, high),
        spread=section.spread,
        share=section.share,
        budget=section.budget.__dict__,
        order=section.order,
        seed=config.seed,
    )
    found = verdicts(items, rules) | {g["id"]: "failed" for g in groups if "failed" in g}
    kept = {name for name, verdict in found.items() if verdict == KEPT}
    rows = []
    for line, _ in each_line(folder / COMPLETIONS):
        if line["sample"] == 0 and line["id"] in kept:
            rows.append({"id": line["id"], "question": line["question"], **line["record"]})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / SELECTED, text)
    plot_difficulty(items, found, folder / PICTURE)
    say(table([(group["task"], found[group["id"]]) for group in groups]))
    if bad := bad_videos(groups, json.loads((folder / _BEGUN).read_text())["excluded"]):
        say(bad)
    tasks = {group["task"] for group in groups}
    if absent := [x for x, budget in rules.budget.items() if budget is not None and x not in tasks]:
        say(f"warning: select.budget names tasks that no item has: {', '.join(absent)}")
    if not rows:
        say("warning: no item is kept: choose rules that keep some before you train")


def bad_videos(groups: Sequence[Mapping[str, Any]], excluded: Mapping[str, str]) -> str:
    """The items whose videos could not be used, by name and with the reason; "" where all could.

    Args:
      groups: lines of groups.jsonl.
      excluded: what was left out before sampling, see `inputs.Inputs`.
    """
    lines = [*excluded.values(), *(f"{g['id']}: {g['failed']}" for g in groups if "failed" in g)]
    if not lines:
        return ""
    title = f"{len(lines)} items are not kept, their videos cannot be used:"
    return "\n".join([title, *(f"  {line}" for line in lines)])


def sampled(group: Mapping[str, Any], reward: RewardSection) -> Sampled:
    """An item's line of groups.jsonl, with the scores of its answer that count for training."""
    weights = {name: reward.__dict__[name] for name in (*DISCRETE, *CONTINUOUS)}
    weights[TEMPORAL] = reward.iou
    names = [name for name, weight in weights.items() if weight and f"std/{name}" in group]
    means, stds = ({name: group[f"{of}/{name}"] for name in names} for of in ("mean", "std"))
    return Sampled(group["id"], group["task"], means, stds)


def table(found: list[tuple[str, str]]) -> str:
    """How many items of each task got which verdict."""
    counts = collections.Counter(found)
    tasks = sorted({task for task, _ in found})
    named = [verdict for verdict in VERDICTS if any(counts[task, verdict] for task in tasks)]
    widths = [max(len(name), 6) + 2 for name in ("items", *named)]
    lines = [
        f"{'':12}" + "".join(f"{n:>{w}}" for n, w in zip(("items", *named), widths, strict=True))
    ]
    for task in tasks:
        of_task = [counts[task, verdict] for verdict in named]
        cells = zip((sum(of_task), *of_task), widths, strict=True)
        lines.append(f"{task:12}" + "".join(f"{n:>{w}}" for n, w in cells))
    return "\n".join(lines)


# ---- what a start finds ----


def _progress(folder: Path) -> tuple[int, bool]:
    """(whole batches sampled, whether those are all)."""
    path = folder / METRICS
    lines = read_metrics(path) if path.exists() else []
    if not lines:
        return 0, False
    return lines[-1]["step"], lines[-1]["split"] == _DONE


def _check_begun(folder: Path, config: Config) -> None:
    """Refuses a folder of another command or other samples; notes the config."""
    path = folder / CONFIG
    title = "# jaxgrpo select"
    if path.exists():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if first != title:
            raise ConfigError(
                f"{config.run_dir} holds a run of {first.removeprefix('# ')!r}: choose another "
                "run_dir for select"
            )
        learning = {name: config.__dict__[name] for name in _OF_LEARNING}
        configs.check_resume(dataclasses.replace(configs.load(path), **learning), config)
    if jax.process_index() == 0:
        write_atomically(path, f"{title}\n{configs.to_yaml(config)}")


def _read_begun(folder: Path) -> dict[str, Any] | None:
    path = folder / _BEGUN
    found: dict[str, Any] | None = gather_objects(
        json.loads(path.read_text()) if path.exists() else None
    )[0]
    return found


def _keep_to(folder: Path, config: Config, dataset: Dataset, excluded: dict[str, str]) -> None:
    """Notes what the samples depend on besides the config, or refuses what has changed."""
    now = {
        "plan": dataset.plan,
        "model.path, steps of its checkpoints": weight_steps(config.model.path),
        "excluded": excluded,
    }
    begun = _read_begun(folder)
    if begun is None:
        if jax.process_index() == 0:
            write_atomically(folder / _BEGUN, json.dumps(now, indent=1) + "\n")
        return
    changed = [name for name, value in now.items() if begun[name] != value]
    if changed:
        raise ConfigError(
            f"{config.run_dir} began with other data or weights than there are now "
            f"({', '.join(changed)}): put them back, or choose a new run_dir"
        )


def closing_words(config: Config) -> str:
    """What was written and what to do next."""
    run = config.run_dir
    return (
        f"wrote {run}: {COMPLETIONS}, {GROUPS}, {SELECTED}, {PICTURE}\n"
        f"next: jaxgrpo train CONFIG data.keep={run}/{SELECTED}, or other rules: the same command "
        "with select.spread, right, share, budget or order, which samples nothing"
    )
