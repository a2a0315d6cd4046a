"""GRPO runs from start to end: killed, resumed, on bad input; what they write.

The runs are real processes on one CPU device (see `tiny_run`); some are shared between files.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data.records import read_manifest, write_manifest
from jaxgrpo import cli
from jaxgrpo.config import MeshSection
from jaxgrpo.load import load_params, restore_params
from jaxgrpo.programs import Scores
from jaxgrpo.sharding import make_mesh, param_shardings
from jaxgrpo.train import step_metrics
from models.qwen2_5_vl.config import ModelConfig
from tests.data import broken
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import STEPS, Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reference(place: Workplace) -> Path:
    return tiny_run.reference(place)


# ---- what a run writes ----


def test_a_run_writes_every_metric_by_its_name(reference: Path) -> None:
    train, evaluations = tiny_run.lines(reference, "train"), tiny_run.lines(reference, "eval")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    always = (
        "reward/total reward/format groups/zero_variance kl entropy loss grad_norm "
        "completion/length completion/bucket time/rollout time/update time/data_wait compilations "
        "data/failed_videos throughput/tokens_per_second"
    )
    for line in train:
        assert set(always.split()) <= line.keys()
        assert all(line[name] is not None for name in always.split())
    # A component is there in the steps whose questions have it.
    assert any("reward/choice" in line for line in train)
    assert any("reward/iou" in line for line in train)
    scores = (
        "tvg/mIoU tvg/R1@0.3 tvg/R1@0.5 tvg/R1@0.7 tvg/mIoU_constant_span "
        "tvg/mIoU_swapped_videos mcqa/accuracy gqa/accuracy gqa/mIoU gqa/acc_at_iou0.5 format"
    )
    for line in evaluations:
        assert set(scores.split()) <= line.keys()
        assert all(0 <= line[name] <= 1 for name in scores.split())


def test_a_run_learns_from_its_rewards(reference: Path) -> None:
    """The other tests of this file would pass on zeros if nothing had a gradient."""
    lines = tiny_run.lines(reference, "train")
    assert any(line["groups/zero_variance"] < 1 for line in lines)
    assert all(line["grad_norm"] > 0.01 for line in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-4
    assert all(line["sampler_gap"] < 1e-4 for line in lines)


def test_the_times_of_a_step_add_up(reference: Path) -> None:
    """No second is counted twice, and none is left out."""
    for line in tiny_run.lines(reference, "train"):
        parts = [line[f"time/{part}"] for part in ("rollout", "reward", "update", "data_wait")]
        assert sum(parts) == pytest.approx(line["time/step"], abs=1e-7)


def test_completions_are_kept_with_their_rewards(reference: Path) -> None:
    kept = [json.loads(x) for x in (reference / "completions.jsonl").read_text().splitlines()]
    train = [line for line in kept if line["split"] == "train"]
    place = [(line["step"], line["row"], line["sample"]) for line in train]
    assert place == list(itertools.product(range(1, STEPS + 1), range(4), range(2)))  # P, G
    assert {"id", "question", "truth", "completion", "reward/total"} <= train[0].keys()
    for line in kept:  # what is needed to score it again
        assert line["tokens"] > 0 and line["record"]["task"] in ("mcqa", "tvg", "gqa")
    assert any("<answer>" in line["completion"] for line in kept)


def test_a_run_says_what_it_wrote_and_what_comes_next(reference: Path) -> None:
    printed = (reference / "printed.txt").read_text()
    assert f"wrote {reference}: metrics.jsonl" in printed
    assert f"next: jaxgrpo export {reference}" in printed
    for name in ("metrics.jsonl", "completions.jsonl", "curves.png", "config.yaml", "checkpoints"):
        assert (reference / name).exists()
    row = next(x for x in printed.splitlines() if x.startswith("tvg/mIoU_swapped_videos"))
    before, after = (tiny_run.lines(reference, "eval")[i] for i in (0, -1))
    name = "tvg/mIoU_swapped_videos"
    assert row.split()[1:] == [f"{before[name]:.3f}", f"{after[name]:.3f}"]


def test_bad_videos_are_named_counted_and_replaced(reference: Path) -> None:
    printed = (reference / "printed.txt").read_text()
    assert "1 items left out" in printed and f"notes: unreadable: {reference.parent}" in printed
    assert f"{tiny_run.NOTES}: OpenCV finds no video stream in it" in printed
    assert "replaced cut: truncated" in printed and tiny_run.CUT in printed
    failed = [line["data/failed_videos"] for line in tiny_run.lines(reference, "train")]
    assert failed == sorted(failed) and failed[0] == 0 and failed[-1] == 1
    evaluation = tiny_run.lines(reference, "eval")[-1]
    assert (evaluation["items"], evaluation["items_failed"]) == (9, 1)
    assert "not scored cut: truncated" in printed


def test_nothing_compiles_after_the_first_step(reference: Path) -> None:
    assert {line["compilations"] for line in tiny_run.lines(reference, "train")} == {
        sum(expected_programs(1, kl=True).values())
    }


def expected_programs(buckets: int, kl: bool, resumed: bool = False) -> collections.Counter[str]:
    """What a run compiles: programs x buckets, and those that see no prompt once."""
    return collections.Counter(
        {
            "jit(rollout)": 2 * buckets,  # sampling and greedy
            "jit(reference)": buckets * kl,
            "jit(update)": buckets,
            "jit(score)": 2,  # of G and of one
            "jit(publish)": 1 + kl,  # to the sampler; to the reference
            "jit(init)": not resumed,  # the first training state
        }
    )


# ---- killed and resumed ----


def assert_equals_reference(run_dir: Path, reference: Path) -> None:
    tiny_run.assert_same_bits(tiny_run.state_of(run_dir), tiny_run.state_of(reference))
    found, expected = (
        tiny_run.without_times(tiny_run.lines(folder)) for folder in (run_dir, reference)
    )
    assert found == expected
    completions = "completions.jsonl"
    assert (run_dir / completions).read_bytes() == (reference / completions).read_bytes()


def test_a_run_killed_again_and_again_ends_as_one_never_killed(
    place: Workplace, reference: Path
) -> None:
    run_dir = place.folder / "killed"
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place)]
    # In the order of a run: each start passes the point that the one before died at.
    for point in ("checkpoint:2", "line:4", "evaluation:1", "update:6"):
        workers = "data.workers=1" if point == "line:4" else "data.workers=0"
        tiny_run.run(place, "train", run_dir, *overrides, workers, kill=point)
    counts = place.folder / "killed.json"
    last = tiny_run.run(place, "train", run_dir, *overrides, counts=counts)
    assert_equals_reference(run_dir, reference)
    # The last start, which resumed at step 4, made what a run makes, and read all from the cache.
    expected = +expected_programs(1, kl=True, resumed=True)
    compiled, read, fetches = json.loads(counts.read_text())
    assert (compiled, read) == (expected, expected.total())
    # A step asks the device for the completions, for the rewards, and for the metrics.
    assert fetches["jaxgrpo.train"] == 3 * (6 - 4)
    # It knows what was left out and what the scores were when the run began.
    assert "notes: " in last.out
    row = next(x for x in last.out.splitlines() if x.startswith("tvg/mIoU "))
    assert row.split()[1] == f"{tiny_run.lines(reference, 'eval')[0]['tvg/mIoU']:.3f}"


REFILLED = (
    *("rollout.refills=2", "data.online.round=2", "eval.every=0", "eval.limit=2", "grpo.kl=0"),
    *("grpo.updates=2", "grpo.dual_clip=3", "grpo.importance_cap=2", "grpo.mask_truncated=true"),
    "log.samples=-1",
)


def test_a_run_with_every_knob_is_the_same_killed_and_on_two_processes(place: Workplace) -> None:
    whole, killed, shared = (place.folder / f"refilled{number}" for number in range(3))
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place), *REFILLED]
    counts = place.folder / "refilled.json"
    tiny_run.run(place, "train", whole, *overrides, counts=counts)
    expected = +expected_programs(1, kl=False) | {"jit(refill)": 1, "jit(update)": 2}
    assert json.loads(counts.read_text())[0] == expected

    # What was sampled is written down by item, batch by batch; some steps took several.
    groups = [json.loads(line) for line in (whole / "groups.jsonl").read_text().splitlines()]
    of_batch = collections.Counter(group["batch"] for group in groups)
    assert set(of_batch) == set(range(len(of_batch))) and set(of_batch.values()) == {4}
    of_step = collections.Counter(group["step"] for group in groups)
    lines = tiny_run.lines(whole, "train")
    assert [line["groups/sampled"] for line in lines] == [of_step[line["step"]] for line in lines]
    assert len(of_batch) > max(STEPS, 4 * 2)  # several rounds follow what was seen
    for line in lines:
        mine = [group for group in groups if group["step"] == line["step"]]
        equal = sum(group["std"] == 0 for group in mine)
        assert line["groups/zero_variance"] == pytest.approx(equal / len(mine))
        assert line["reward/total"] == pytest.approx(np.mean([group["mean"] for group in mine]))
        assert line["groups/teaching"] == min((len(mine) - equal) / 4, 1)
        assert {"ratio", "clip_low", "clip_high", "dual_clip", "importance"} <= line.keys()
    assert any(line["ratio"] != 1 for line in lines)
    # So are all completions, also those whose place another group took.
    texts = (whole / "completions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in texts if json.loads(line)["split"] == "train"]
    first = [(line["step"], line["id"]) for line in found if line["sample"] == 0]
    assert first == [(group["step"], group["id"]) for group in groups]

    tiny_run.run(place, "train", killed, *overrides, kill="update:4")
    tiny_run.run(place, "train", killed, *overrides, "data.workers=1")
    assert_equals_reference(killed, whole)
    assert (killed / "groups.jsonl").read_bytes() == (whole / "groups.jsonl").read_bytes()

    tiny_run.run_processes(place, 2, shared, *overrides)
    found = [json.loads(line) for line in (shared / "groups.jsonl").read_text().splitlines()]
    assert [(g["batch"], g["id"]) for g in found] == [(g["batch"], g["id"]) for g in groups]


def test_a_third_of_broken_videos_is_replaced_alike_by_a_resumed_run(place: Workplace) -> None:
    """Among them one whose decoder hangs, until the run is killed; it is not tried again.

    One run decodes each video once and keeps its frames; the other decodes whenever it draws it.
    """
    clips = place.folder / "broken_clips"
    shutil.copytree(place.clips, clips)
    good = read_manifest(clips / "train.jsonl", clips)
    records = list(good)
    for number, name in enumerate(BROKEN):
        case = broken.CASES[name]
        video = f"broken{number}.{case.suffix}"
        case.make(clips / video)
        like = good[number % len(good)]
        records.append(dataclasses.replace(like, id=name, video=video, duration=case.seconds))
    shutil.copy(clips / good[0].video, clips / "hangs.mp4")
    records[0] = dataclasses.replace(good[0], id="hangs", video="hangs.mp4")
    write_manifest(clips / "broken.jsonl", records)
    assert (len(BROKEN) + 1) / len(records) > 0.3
    overrides = [
        *tiny_run.started(place),
        *(f"data.root={clips}", f"data.train={clips / 'broken.jsonl'}"),
        *("train.steps=8", "eval.every=0", "eval.limit=2", "data.timeout=5"),
    ]
    whole, killed = place.folder / "broken", place.folder / "broken_killed"
    store = f"data.frame_store={place.folder / 'frames'}"
    finished = tiny_run.run(place, "train", whole, *overrides, store, hangs="hangs.mp4")
    tiny_run.run(place, "train", killed, *overrides, hangs="hangs.mp4", kill="update:5")
    resumed = tiny_run.run(place, "train", killed, *overrides)

    assert_equals_reference(killed, whole)
    for printed in (finished.out, resumed.out):
        summary = printed[printed.index("items had videos that could not be used:") :]
        for name, kind in [*((name, broken.CASES[name].outcome) for name in BROKEN), HUNG]:
            [line] = [x for x in summary.splitlines() if x.startswith(f"  {kind}: ")]
            assert name in line
    last = tiny_run.lines(whole, "train")[-1]
    assert last["data/failed_videos"] == 5
    drawn = last["data/frame_store_hits"] + last["data/frame_store_misses"]
    assert drawn >= 8 * 4 and last["data/frame_store_hits"] > 8


HUNG = ("hangs", "timeout")
BROKEN = (
    *("cut, index in front", "a lying count", "a hole of zeros", "times that stand still"),
    *("text", "a PNG", "zero bytes"),
)


def test_a_preempted_run_saves_its_step_and_goes_on(place: Workplace, reference: Path) -> None:
    """SIGTERM before the first step, between two, and in the middle of the last evaluation."""
    run_dir = place.folder / "preempted"
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place)]
    ended = tiny_run.run(place, "train", run_dir, *overrides, term="evaluation:1")
    assert "SIGTERM before the first step" in ended.out
    assert not any((run_dir / "checkpoints").iterdir())

    # Step 3 is the next, and its evaluation is left to the process that goes on.
    ended = tiny_run.run(place, "train", run_dir, *overrides, term="update:2")
    assert f"SIGTERM: saved step 3 in {run_dir}; the same command goes on" in ended.out
    assert "Traceback" not in ended.out
    written = [(line["step"], line["split"]) for line in tiny_run.lines(run_dir)]
    assert written == [(0, "eval"), (1, "train"), (2, "train"), (3, "train")]

    ended = tiny_run.run(place, "train", run_dir, *overrides, term="evaluation:2")
    assert "SIGTERM: saved step 6" in ended.out and tiny_run.lines(run_dir, "eval")[-1]["step"] == 3
    tiny_run.run(place, "train", run_dir, *overrides)
    assert_equals_reference(run_dir, reference)


def test_a_finished_run_goes_on_to_a_later_end(place: Workplace, reference: Path) -> None:
    run_dir = place.folder / "longer"
    shutil.copytree(reference, run_dir)
    changed = [f"train.steps={STEPS + 1}", "eval.every=0", "log.samples=0", "checkpoint.keep=1"]
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place), *changed]
    tiny_run.run(place, "train", run_dir, *overrides)
    found, before = tiny_run.lines(run_dir), tiny_run.lines(reference)
    assert found[: len(before)] == before
    added = [(line["step"], line["split"]) for line in found[len(before) :]]
    assert added == [(STEPS + 1, "train"), (STEPS + 1, "eval")]


def test_a_finished_run_shows_its_scores_and_compiles_nothing(
    place: Workplace, reference: Path
) -> None:
    run_dir, counts = place.folder / "finished", place.folder / "finished.json"
    shutil.copytree(reference, run_dir)
    (run_dir / "curves.png").unlink()  # as if it was killed after its last checkpoint
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place)]
    again = tiny_run.run(place, "train", run_dir, *overrides, counts=counts)
    assert json.loads(counts.read_text()) == [{}, 0, {}]
    assert f"{run_dir} is finished: it has done its {STEPS} steps" in again.out
    row = next(x for x in again.out.splitlines() if x.startswith("tvg/mIoU "))
    before, after = (tiny_run.lines(reference, "eval")[i]["tvg/mIoU"] for i in (0, -1))
    assert row.split()[1:] == [f"{before:.3f}", f"{after:.3f}"]
    assert (run_dir / "curves.png").exists() and f"next: jaxgrpo export {run_dir}" in again.out
    assert tiny_run.lines(run_dir) == tiny_run.lines(reference)


def test_a_resumed_run_reads_the_weights_it_began_with_only_where_it_needs_them(
    place: Workplace,
) -> None:
    """Without a KL term and with all weights trained its checkpoint has everything."""
    model, run_dir = place.folder / "emptied", place.folder / "kl_free"
    shutil.copytree(tiny_run.random_model(place), model)
    overrides = [f"model.path={model}", "model.init=checkpoint", *tiny_run.mixed(place)]
    overrides += ["grpo.kl=0", "train.steps=3", "eval.every=0", "eval.limit=4"]
    tiny_run.run(place, "train", run_dir, *overrides, kill="update:3")
    (model / "model.safetensors").unlink()
    tiny_run.run(place, "train", run_dir, *overrides)
    assert [line["step"] for line in tiny_run.lines(run_dir, "train")] == [1, 2, 3]


def test_a_resumed_run_refuses_a_training_video_that_it_cannot_read_any_more(
    place: Workplace, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every later item would take another place of the plan."""
    run_dir, clips = tmp_path / "run", tmp_path / "clips"
    shutil.copytree(reference, run_dir)
    shutil.copytree(place.clips, clips)
    record = read_manifest(clips / "train.jsonl", clips)[0]
    (clips / record.video).write_text("lost")
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place), f"data.root={clips}"]
    eight = ["mesh.data=4", "mesh.tensor=2", f"train.steps={STEPS + 1}"]  # devices
    message = mistake(place, capsys, f"run_dir={run_dir}", *overrides, *eight)
    assert "data.train, items: 13 with digest" in message
    assert f"cannot be read now: {record.id}: unreadable: {clips / record.video}" in message
    assert "choose a new run_dir" in message


@pytest.mark.parametrize(
    "override, names",
    [
        ("seed=4", ["seed", "3", "4"]),
        ("rollout.group=4", ["rollout.group", "2", "4"]),
        ("optim.learning_rate=1e-3", ["optim.learning_rate", "0.0005", "0.001"]),
        (f"train.steps={STEPS - 1}", ["step 6", "train.steps=5", "raise train.steps"]),
    ],
)
def test_a_resumed_run_refuses_another_config(
    place: Workplace,
    reference: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    names: list[str],
) -> None:
    before = {path: path.read_bytes() for path in reference.glob("*.*")}
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place), override]
    message = mistake(place, capsys, f"run_dir={reference}", *overrides)
    assert all(name in message for name in [*names, str(reference)])
    assert {path: path.read_bytes() for path in reference.glob("*.*")} == before


# ---- two buckets, a frozen vision tower ----


def test_two_buckets_and_a_frozen_vision_tower(place: Workplace) -> None:
    run_dir, counts = place.folder / "frozen", place.folder / "frozen.json"
    overrides = [
        *tiny_run.started(place),
        # No prompt is as short as 40 tokens: nothing is compiled for that bucket.
        *("data.buckets=[40, 80, 104]", "model.freeze_vision=true", "grpo.kl=0", "train.steps=5"),
    ]
    tiny_run.run(place, "train", run_dir, *overrides, kill="update:4")
    tiny_run.run(place, "train", run_dir, *overrides, counts=counts)
    # Programs x buckets, over training, evaluation and resume.
    expected = [expected_programs(2, kl=False, resumed=resumed) for resumed in (False, True)]
    assert json.loads(counts.read_text())[0] == +expected[1]
    compiled = [line["compilations"] for line in tiny_run.lines(run_dir, "train")]
    assert compiled == [x.total() for x in (expected[0],) * 2 + (expected[1],) * 3]

    # The tower is neither trained nor saved, and comes back from where the run began.
    assert not any("vision" in name for name in tiny_run.state_of(run_dir))
    after, directory = restore_params(run_dir)
    before, _ = restore_params(tiny_run.cold_start(place))
    assert directory == tiny_run.TINY
    flat = [dict(flatten(tree)) for tree in (before, after)]
    assert flat[0].keys() == flat[1].keys()
    same = {name for name in flat[0] if np.array_equal(flat[0][name], flat[1][name])}
    assert same == {name for name in flat[0] if name.startswith("vision")}


def flatten(tree: dict, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    return [
        pair
        for key, value in tree.items()
        for pair in (
            flatten(value, f"{prefix}{key}/")
            if isinstance(value, dict)
            else [(f"{prefix}{key}", np.asarray(value))]
        )
    ]


# ---- steps that are not finite ----


def test_steps_that_are_not_finite_are_skipped_and_the_run_stops(place: Workplace) -> None:
    model = place.folder / "poisoned"
    shutil.copytree(tiny_run.random_model(place), model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run_dir = place.folder / "not_finite"
    # The clips of the other runs, whose programs are compiled already.
    overrides = [f"model.path={model}", "model.init=checkpoint", *tiny_run.mixed(place)]
    ended = tiny_run.run(place, "train", run_dir, *overrides, code=2)
    message = ended.out[ended.out.index("error:") :]
    assert "3 steps in a row" in message and "the last was step 2 with " in message
    assert "optim.learning_rate" in message and "Traceback" not in ended.out
    lines = tiny_run.lines(run_dir, "train")
    assert [line["skipped_in_a_row"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] is None for line in lines)

    # The checkpoint of step 2: two steps were taken, and none changed a bit.
    state = tiny_run.state_of(run_dir)
    assert state["['skipped']"] == 2
    config = ModelConfig.load(model)
    mesh = make_mesh(MeshSection(data=1), jax.local_devices()[:1])
    before = dict(flatten(load_params(model, config, param_shardings(config, mesh))))
    after = {"/".join(k[2:-2].split("']['")): v for k, v in state.items()}
    tiny_run.assert_same_bits({name: after[f"params/{name}"] for name in before}, before)
    assert not any(state[name].any() for name in state if "['mu']" in name)


# ---- sampling from a part of the distribution ----


def test_sampling_that_leaves_the_policy_is_warned_of(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, warned in (("rollout.top_p=0.9", 1), ("rollout.top_k=40", 1), ("seed=3", 0)):
        wrong = "eval.batch=3"  # ends the start right after
        assert cli.main(["train", str(place.config), f"run_dir={tmp_path}", override, wrong]) == 2
        assert capsys.readouterr().out.count("warning: with rollout.top_p=") == warned


# ---- mistakes, each one line and exit code 2 ----


def mistake(place: Workplace, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of `jaxgrpo train tiny.yaml ARGUMENTS`, which must fail as a user's mistake."""
    code = cli.main(["train", str(place.config), *arguments])
    message = capsys.readouterr().err
    assert code == 2 and "error: " in message
    return message[message.index("error: ") :]


@pytest.mark.parametrize(
    "overrides, names",
    [
        (["rollout.gruop=4"], ["unknown key rollout.gruop", "did you mean 'group'"]),
        (["train.steps=many"], ["train.steps", "'many'", "expected a whole number"]),
        (["rollout.group=1"], ["rollout.group is 1", "2 or more"]),
        (["rollout.prompts=12"], ["rollout.prompts", "12", "8 rows", "multiple of 8"]),
        (["eval.batch=3"], ["eval.batch=3", "8 rows", "multiple of 8"]),
        (["mesh.data=2", "mesh.tensor=4"], ["mesh.tensor=4", "num_key_value_heads", "2"]),
        (["mesh.data=3"], ["3 x 1 x 1", "8 devices", "mesh.data=-1"]),
        (["model.path=no/such/model"], ["model.path", "no/such/model", "directory"]),
        (["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_mistake_is_one_message_that_names_it(
    place: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    names: list[str],
) -> None:
    # This process has eight devices.
    eight = ["rollout.prompts=8", "eval.batch=8"]
    message = mistake(place, capsys, f"run_dir={tmp_path / 'run'}", *eight, *overrides)
    assert all(name in message for name in names), message


def test_a_mistake_has_no_traceback_in_a_real_process(place: Workplace, tmp_path: Path) -> None:
    ended = tiny_run.run(place, "train", tmp_path, "rollout.group=1", code=2)
    assert ended.out.startswith("error: ") and "Traceback" not in ended.out


# ---- the numbers of a step ----


def test_a_component_is_the_mean_over_the_prompts_that_have_it() -> None:
    """P = 2, G = 2: a tvg prompt, which has no choice, and an mcqa prompt, which has no IoU."""
    nan = np.nan
    scores = Scores(
        total=np.array([[0.9, 0.5], [1.0, 1.0]], np.float32),
        components={
            "format": np.array([[1, 1], [1, 1]], np.float32),
            "choice": np.array([[nan, nan], [1, 1]], np.float32),
            "iou": np.array([[0.8, 0.0], [nan, nan]], np.float32),
        },
        advantages=np.zeros((2, 2), np.float32),
        zero_variance=np.array([False, True]),
    )
    lengths, finished = np.array([[4, 6], [7, 7]]), np.array([[True, True], [True, False]])
    metrics = step_metrics(scores, lengths, finished, {"loss": np.float32(0.25)})
    assert metrics["reward/total"] == pytest.approx(0.85)
    assert metrics["reward/iou"] == pytest.approx(0.4)
    assert metrics["reward/iou_std"] == pytest.approx(0.4)
    assert metrics["reward/choice"] == 1
    assert metrics["groups/zero_variance"] == 0.5
    assert metrics["groups/zero_variance_choice"] == 1
    assert metrics["groups/zero_variance_iou"] == 0
    assert (metrics["completion/length"], metrics["completion/truncated"]) == (6, 0.25)
    assert metrics["loss"] == 0.25
