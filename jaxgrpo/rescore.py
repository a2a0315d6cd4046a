"""Scores a run's stored completions again, under another reward: `jaxgrpo rescore RUN CONFIG`.

It shows what another `reward` section would have made of the same completions: every component
before and after, the groups that would teach nothing, and whose advantage would turn. Nothing is
sampled, no model is loaded. Advantages need whole groups, which `log.samples=-1` keeps.

Legend: N completions.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data.records import Record, row_problems
from data.storage import is_url, join, read
from jaxgrpo.config import Config
from jaxgrpo.metrics import COMPLETIONS
from jaxgrpo.scoring import open_reward
from rewards.reward import Reward

PREDICTIONS = "predictions.jsonl"  # what `jaxgrpo eval` writes

_PROMPTS = 256  # scored at once: one program for each size of group
_EXAMPLES = 5
_NEAR = 1e-6  # float32 noise around a group's mean


class RescoreError(ValueError):
    """Completions that cannot be scored again."""


class Stored(NamedTuple):
    """A completion as it was written down."""

    text: str
    tokens: int
    record: Record
    group: tuple[Any, ...]  # the same for the completions of one prompt in one step
    scores: dict[str, float]  # "total" and the components; NaN where there was none


class Rescored(NamedTuple):
    """All completions, with what they earned and would earn."""

    completions: list[Stored]
    before: dict[str, np.ndarray]  # by name f64[N], NaN where there is none
    after: dict[str, np.ndarray]


def main(run: str, config: Config, as_json: bool) -> None:
    """Prints what `config.reward` would change about the completions in the folder `run`."""
    path, stored = read_stored(run)
    result = rescore(stored, open_reward(config))
    report = summary(result)
    if as_json:
        print(json.dumps({"completions_file": path, **report}, indent=2, allow_nan=False))
    else:
        print(f"{len(stored)} completions of {path}\n{table(report)}")


def read_stored(run: str) -> tuple[str, list[Stored]]:
    """The completions of a run directory, or of an evaluation's, and the file that they are in.

    Raises:
      RescoreError: there are none, or a line lacks what is needed to score it again.
    """
    path, content = _read_first(run, (COMPLETIONS, PREDICTIONS))
    stored = [
        _stored(f"{path}:{number}", number, text)
        for number, text in enumerate(content.split(b"\n")[:-1], start=1)  # a torn line is left out
    ]
    if not stored:
        raise RescoreError(f"{path} is empty: the run kept no completions; see log.samples")
    return path, stored


def rescore(stored: Sequence[Stored], reward: Reward) -> Rescored:
    """Scores all completions, in their order, by `reward`."""
    groups: dict[tuple[Any, ...], list[int]] = collections.defaultdict(list)
    for number, completion in enumerate(stored):
        groups[completion.group].append(number)
    by_size: dict[int, list[list[int]]] = collections.defaultdict(list)
    for members in groups.values():
        if len({stored[number].record for number in members}) > 1:
            step, row = stored[members[0]].group
            raise RescoreError(
                f"the completions of step {step}, row {row} are about several questions: expected "
                "the file of one run"
            )
        by_size[len(members)].append(members)
    max_spans = max(max(len(completion.record.spans), 1) for completion in stored)
    score = jax.jit(reward.score)
    after: dict[str, np.ndarray] = {}
    for alike in by_size.values():
        for first in range(0, len(alike), _PROMPTS):
            chunk = alike[first : first + _PROMPTS]
            padded = chunk + [chunk[-1]] * (_PROMPTS - len(chunk))
            records = [stored[group[0]].record for group in padded]
            texts = [[stored[i].text for i in group] for group in padded]
            lengths = np.array([[stored[i].tokens for i in group] for group in padded])
            answers = reward.read(texts, records, lengths)
            total, parts = jax.device_get(score(answers, reward.truth(records, max_spans)))
            reward.check(parts)
            for name, values in {"total": total, **parts}.items():
                column = after.setdefault(name, np.full(len(stored), np.nan))
                column[np.array(chunk)] = values[: len(chunk)]
    names = dict.fromkeys(name for completion in stored for name in completion.scores)
    before = {
        name: np.array([completion.scores.get(name, np.nan) for completion in stored])
        for name in names
    }
    return Rescored(list(stored), before, after)


def summary(result: Rescored, examples: int = _EXAMPLES) -> dict[str, Any]:
    """The report, ready for JSON; a number that is not defined is None.

    Returns:
      completions; groups: those of two completions or more, which alone have advantages;
      components: by name, "before" and "after" as {mean, equal_groups: the share of these groups
      in which all completions earn the same}; totals_changed; groups_reordered: in which two
      completions change places (ties apart); groups_with_another_best; advantages_turned: how many
      go from above to below the group's mean or back, as {up, down}; turned_lines: these, by line
      of the file; to_zero and from_zero: how many advantages vanish or appear; examples: those
      whose total changes most.
    """
    groups = _groups(result.completions)
    names = dict.fromkeys([*result.before, *result.after])
    columns = {"before": result.before, "after": result.after}
    components = {
        name: {when: _described(found.get(name), groups) for when, found in columns.items()}
        for name in names
    }
    before, after = result.before["total"], result.after["total"]
    signs_before, signs_after = (_signs(total, groups) for total in (before, after))
    turned = signs_before * signs_after < 0
    change = np.abs(after - before)
    most = [int(i) for i in np.argsort(-change, kind="stable")[:examples] if change[i] > _NEAR]
    return {
        "completions": len(result.completions),
        "groups": len(groups),
        "components": components,
        "totals_changed": int((change > _NEAR).sum()),
        "groups_reordered": sum(_reordered(before[g], after[g]) for g in groups),
        "groups_with_another_best": sum(_another_best(before[g], after[g]) for g in groups),
        "advantages_turned": {
            "up": int((turned & (signs_after > 0)).sum()),
            "down": int((turned & (signs_after < 0)).sum()),
        },
        "turned_lines": (np.flatnonzero(turned) + 1).tolist(),
        "to_zero": int(((signs_before != 0) & (signs_after == 0)).sum()),
        "from_zero": int(((signs_before == 0) & (signs_after != 0)).sum()),
        "examples": [_example(result, i) for i in most],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"{'':<12}{'mean':>10}{'->':>10}{'equal groups':>16}{'->':>10}"]
    for name, found in report["components"].items():
        cells = [found[when][key] for key in ("mean", "equal_groups") for when in found]
        if all(cell is None for cell in cells):
            continue  # none of the tasks has it
        shown = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"{name:<12}{shown[0]:>10}{shown[1]:>10}{shown[2]:>16}{shown[3]:>10}")
    lines.append(f"{report['totals_changed']} totals change")
    if report["groups"]:
        lines.append(
            f"of {report['groups']} groups {report['groups_reordered']} are reordered, "
            f"{report['groups_with_another_best']} get another best completion"
        )
        turned = report["advantages_turned"]
        lines.append(
            f"advantages: {turned['up']} turn positive, {turned['down']} negative, "
            f"{report['to_zero']} vanish, {report['from_zero']} appear"
        )
        if lines_turned := report["turned_lines"]:
            shown = [str(line) for line in lines_turned[:_LINES]]
            more = ", ..." if len(lines_turned) > _LINES else ""
            lines.append(f"turned: the completions of lines {', '.join(shown)}{more}")
    else:
        lines.append("no whole groups, so no advantages: train with log.samples=-1 to keep them")
    for x in report["examples"]:
        lines.append(f"  {x['before']:.3f} -> {x['after']:.3f}  {x['id']}, truth {x['truth']}:")
        lines.append(f"    {x['completion']}")
    return "\n".join(lines)


_SHOWN = 200  # characters of an example
_LINES = 10  # of turned completions


def _read_first(run: str, names: Sequence[str]) -> tuple[str, bytes]:
    """Path and content of the first of these files that the folder has."""
    for name in names:
        path = join(run, name) if is_url(run) else str(Path(run, name))
        try:
            return path, read(path) if is_url(path) else Path(path).read_bytes()
        except FileNotFoundError:
            continue
    raise RescoreError(f"{run} holds neither {' nor '.join(names)}: expected a run directory")


def _stored(place: str, number: int, text: bytes) -> Stored:
    try:
        line = json.loads(text)
        row = {**line["record"], "id": line["id"], "question": line["question"]}
        record = Record(
            id=row["id"],
            video=row["video"],
            task=row["task"],
            question=row["question"],
            options=tuple(row.get("options", ())),
            answer=row.get("answer"),
            spans=tuple((start, end) for start, end in row.get("spans", ())),
            duration=row.get("duration"),
            clip=tuple(row["clip"]) if "clip" in row else None,
            rationale=row.get("rationale"),
        )
        group = (line["step"], line["row"]) if "row" in line else (number,)
        scores = {
            name.removeprefix("reward/"): float("nan") if value is None else float(value)
            for name, value in line.items()
            if name.startswith("reward/")
        }
        _check(line, record)
        return Stored(line["completion"], line["tokens"], record, group, scores)
    except KeyError as error:
        raise RescoreError(
            f"{place} has no field {error}, which scoring it again needs: it is of an older "
            "version, or was edited"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RescoreError(f"{place} is not a completion as a run writes it: {error}") from error


def _check(line: Mapping[str, Any], record: Record) -> None:
    """Raises an error for a value that no run writes, a KeyError for one that is missing."""
    if problems := row_problems(record):
        raise ValueError("; ".join(problems))
    for key, kind in {"completion": str, "tokens": int, "step": int, "row": int}.items():
        if key in line and not isinstance(line[key], kind):
            raise ValueError(f"{key}: expected {kind.__name__}, found {line[key]!r}")
    if not 0 <= line["tokens"] <= np.iinfo(np.int32).max:
        raise ValueError(f"tokens: expected 0 or more, found {line['tokens']}")
    if not np.isfinite(float(line["reward/total"])):
        raise ValueError(f"reward/total: expected a number, found {line['reward/total']}")


def _groups(completions: Sequence[Stored]) -> list[np.ndarray]:
    """The numbers of the completions of each group of two or more."""
    members: dict[tuple[Any, ...], list[int]] = collections.defaultdict(list)
    for number, completion in enumerate(completions):
        members[completion.group].append(number)
    return [np.array(numbers) for numbers in members.values() if len(numbers) > 1]


def _described(values: np.ndarray | None, groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    if values is None or np.isnan(values).all():
        return {"mean": None, "equal_groups": None}
    equal = [np.ptp(values[g]) == 0 for g in groups if not np.isnan(values[g]).any()]
    share = float(np.mean(equal)) if equal else None
    return {"mean": float(np.nanmean(values)), "equal_groups": share}


def _signs(total: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """-1, 0 or 1 of each advantage; 0 outside of groups."""
    signs = np.zeros(len(total), int)
    for group in groups:
        centred = total[group] - total[group].mean()
        signs[group] = np.where(np.abs(centred) > _NEAR, np.sign(centred), 0)
    return signs


def _reordered(before: np.ndarray, after: np.ndarray) -> bool:
    was, now = (np.subtract.outer(x, x) for x in (before, after))
    return bool(((was > _NEAR) & (now < -_NEAR)).any())


def _another_best(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether none of the best completions is still among the best."""
    was, now = (x >= x.max() - _NEAR for x in (before, after))
    return not (was & now).any()


def _example(result: Rescored, number: int) -> dict[str, Any]:
    from jaxgrpo.evaluate import truth_text  # not above: it needs the models

    completion = result.completions[number]
    text = completion.text if len(completion.text) <= _SHOWN else completion.text[:_SHOWN] + "..."
    return {
        "id": completion.record.id,
        "question": completion.record.question,
        "truth": truth_text(completion.record),
        "completion": text,
        "before": float(result.before["total"][number]),
        "after": float(result.after["total"][number]),
    }
