"""data/synthetic.py: the clips show what the records say, and only the clips tell the answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prompts import target_text
from data.records import LETTERS, Record, read_manifest
from data.synthetic import (
    COLORS,
    SHAPES,
    SIDE,
    Event,
    Scene,
    SyntheticError,
    SyntheticSpec,
    delayed,
    questions,
    render,
    scene,
    write_dataset,
)
from jaxgrpo.evaluate import best_constant_span

ROOT = Path(__file__).parents[2]
SPEC = SyntheticSpec(train_clips=3, eval_clips=2, seed=5)


@pytest.fixture(scope="module")
def many() -> list[tuple[Scene, list[Record]]]:
    scenes = [scene((0, 0, number)) for number in range(3000)]
    return [(drawn, questions(drawn, f"train-{i:05d}", "x.mp4")) for i, drawn in enumerate(scenes)]


def event_of(frame: np.ndarray) -> str | None:
    """The colour in the frame's middle, which every object covers; None for the background."""
    middle = frame[SIDE // 2 - 6 : SIDE // 2 + 6, SIDE // 2 - 6 : SIDE // 2 + 6]
    color = np.median(middle.reshape(-1, 3), axis=0)
    distances = {name: np.abs(color - rgb).max() for name, rgb in COLORS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < 45 else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


# Scenes


@given(st.tuples(st.integers(0, 9), st.integers(0, 1), st.integers(0, 10**6)))
def test_the_events_of_a_scene_are_apart_and_on_the_half_second(seed: tuple[int, ...]) -> None:
    drawn = scene(seed)
    assert 8 <= drawn.duration <= 16
    assert 2 <= len(drawn.events) <= 3
    assert drawn.events[0].start >= 0
    assert drawn.events[-1].end <= drawn.duration
    assert all(1.5 <= event.end - event.start <= 6 for event in drawn.events)
    assert all(a.end + 1 <= b.start for a, b in itertools.pairwise(drawn.events))
    times = [drawn.duration] + [time for event in drawn.events for time in event[:2]]
    assert all(time % 0.5 == 0 for time in times)
    assert len({event.color for event in drawn.events}) == len(drawn.events)
    assert len({event.shape for event in drawn.events}) == len(drawn.events)


def test_a_scene_and_its_frames_and_questions_follow_from_the_seed() -> None:
    drawn = scene((3, 0, 7))
    assert drawn == scene((3, 0, 7))
    assert drawn != scene((3, 1, 7))
    assert drawn != scene((4, 0, 7))
    assert questions(drawn, "a", "v") == questions(drawn, "a", "v")
    np.testing.assert_array_equal(render(drawn), render(drawn))


def test_shorter_clips_with_one_event_can_be_asked_for() -> None:
    drawn = scene((0, 0, 1), seconds=(4.0, 4.0), events=(1, 1))
    assert drawn.duration == 4
    assert len(drawn.events) == 1


# Frames


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_an_object_is_visible_exactly_in_its_span(number: int) -> None:
    drawn = scene((0, 0, number))
    frames = render(drawn)
    assert frames.shape == (drawn.duration * 8, SIDE, SIDE, 3)
    assert frames.dtype == np.uint8
    for i, frame in enumerate(frames):
        visible = [event.color for event in drawn.events if event.start <= i / 8 < event.end]
        assert event_of(frame) == (visible[0] if visible else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_covers_about_half_of_the_frame(shape: str) -> None:
    frames = render(Scene((1,), 9.0, (Event(0.0, 9.0, "yellow", shape),)))
    covered = (frames[..., 0] > 180).mean(axis=(1, 2))
    assert covered.min() > 0.35
    assert covered.max() < 0.55


def test_the_objects_move_but_not_far() -> None:
    frames = render(Scene((1,), 9.0, (Event(0.0, 9.0, "yellow", "circle"),)))
    columns = [np.flatnonzero(frame[SIDE // 2, :, 0] > 180).mean() for frame in frames]
    assert 4 < max(columns) - min(columns) < 20
    assert np.abs(np.diff(columns)).max() < 2


def test_colors_are_far_apart() -> None:
    for a, b in itertools.combinations(COLORS.values(), 2):
        assert np.abs(np.subtract(a, b)).max() >= 120


# Questions


def test_each_clip_has_one_question_per_task() -> None:
    drawn = Scene(
        (0, 0, 12),
        9.5,
        (Event(0.5, 3.0, "red", "square"), Event(4.5, 8.0, "yellow", "circle")),
    )
    mcqa, tvg, gqa = questions(drawn, "train-00012", "train/clip_00012.mp4")
    assert [mcqa.id, tvg.id, gqa.id] == [f"train-00012-{task}" for task in ("mcqa", "tvg", "gqa")]
    assert {record.video for record in (mcqa, tvg, gqa)} == {"train/clip_00012.mp4"}
    assert {record.duration for record in (mcqa, tvg, gqa)} == {9.5}

    place = mcqa.question.removeprefix("Which color appears ").removesuffix("?")
    assert answer_of(mcqa) == {"first": "red", "last": "yellow"}[place]
    assert mcqa.spans == ()

    span = {"red square": (0.5, 3.0), "yellow circle": (4.5, 8.0)}
    thing = tvg.question.removeprefix("When is the ").removesuffix(" visible?")
    assert tvg.spans == (span[thing],)
    assert tvg.options == ()
    assert tvg.answer is None

    shape = gqa.question.removeprefix("Which color is the ").split(",")[0]
    color = {"square": "red", "circle": "yellow"}[shape]
    assert answer_of(gqa) == color
    assert gqa.spans == (span[f"{color} {shape}"],)


def test_the_options_are_the_colors_in_one_order(
    many: list[tuple[Scene, list[Record]]],
) -> None:
    for _, (mcqa, tvg, gqa) in many[:300]:
        assert mcqa.options == gqa.options == tuple(COLORS)
        assert tvg.options == ()


def answer_of(record: Record) -> str:
    assert record.answer is not None
    return record.options[LETTERS.index(record.answer)]


# No question is answerable from its text: a predictor that sees the text alone is fitted on one
# half of the scenes, and scores on the other half what a blind guess scores.


@pytest.mark.parametrize("task", ["mcqa", "gqa"])
def test_no_choice_is_answerable_from_its_text(
    many: list[tuple[Scene, list[Record]]], task: str
) -> None:
    records = [record for _, asked in many for record in asked if record.task == task]
    counts: defaultdict[str, Counter[str | None]] = defaultdict(Counter)
    for record in records[::2]:
        counts[record.question][record.answer] += 1
    test = records[1::2]
    hits = sum(counts[record.question].most_common(1)[0][0] == record.answer for record in test)
    standard_error = (0.25 * 0.75 / len(test)) ** 0.5
    assert hits / len(test) < 0.25 + 3.5 * standard_error


@pytest.mark.parametrize("task", ["tvg", "gqa"])
def test_no_span_is_answerable_from_its_text(
    many: list[tuple[Scene, list[Record]]], task: str
) -> None:
    records = [record for _, asked in many for record in asked if record.task == task]
    overall = best_constant_span([record.spans for record in records])
    assert overall[2] < 0.30
    fit: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records[::2]:
        fit[record.question].append(record.spans[0])
    constant = {
        question: best_constant_span([[span] for span in spans])[:2]
        for question, spans in fit.items()
    }
    scores = [iou(constant[record.question], record.spans[0]) for record in records[1::2]]
    assert np.mean(scores) < overall[2] + 0.02


def test_what_is_asked_is_uniform(many: list[tuple[Scene, list[Record]]]) -> None:
    asked = Counter(record.question for _, records in many for record in records)
    for task_questions, kinds in (("appears", 2), ("When", 12), ("and when", 3)):
        counts = [count for question, count in asked.items() if task_questions in question]
        assert len(counts) == kinds
        expected = len(many) / kinds
        assert np.abs(np.array(counts) - expected).max() < 4.5 * expected**0.5


def test_the_ids_and_scenes_of_the_splits_are_disjoint() -> None:
    train = {scene((0, 0, number)) for number in range(300)}
    evaluation = {scene((0, 1, number)) for number in range(300)}
    assert not {drawn[1:] for drawn in train} & {drawn[1:] for drawn in evaluation}


# Late labels


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
def test_late_labels_lag_by_at_most_that(seed: int, late: float) -> None:
    drawn = scene((seed,))
    noted = delayed(drawn, late)
    assert noted == delayed(drawn, late)
    assert noted._replace(events=()) == drawn._replace(events=())
    for true, told in zip(drawn.events, noted.events, strict=True):
        assert (told.color, told.shape) == (true.color, true.shape)
        assert 0 <= told.start - true.start <= late and 0 <= told.end - true.end <= late
        assert told.start < told.end <= drawn.duration


def test_delays_are_uniform() -> None:
    delays = Counter(
        delayed(drawn, 2.0).events[0].start - drawn.events[0].start
        for drawn in (scene((number,), (16.0, 16.0), (1, 1)) for number in range(3000))
        if drawn.events[0].end - drawn.events[0].start > 2.0 and drawn.events[0].end <= 14.0
    )
    assert sorted(delays) == [0.0, 0.5, 1.0, 1.5, 2.0]
    expected = delays.total() / 5
    assert max(abs(count - expected) for count in delays.values()) < 4.5 * expected**0.5


def test_no_delay_is_the_scene_itself() -> None:
    assert delayed(scene((3,)), 0.0) == scene((3,))


def test_only_the_training_labels_are_late(tmp_path: Path) -> None:
    write_dataset(tmp_path / "exact", SPEC)
    write_dataset(tmp_path / "late", dataclasses.replace(SPEC, late=2.0))
    clips = [sorted(path.name for path in (tmp_path / x).rglob("*.mp4")) for x in ("exact", "late")]
    assert clips[0] == clips[1]
    for split, equal in (("train", False), ("eval", True)):
        exact, late = (
            read_manifest(tmp_path / x / f"{split}.jsonl", tmp_path / x) for x in ("exact", "late")
        )
        assert (exact == late) == equal
        assert [r.question for r in exact] == [r.question for r in late]


# Rationales


def test_rationales_in_full() -> None:
    events = (Event(0.5, 7.0, "red", "circle"), Event(8.0, 10.5, "blue", "square"))
    expected = {
        "Which color appears first?": "first red circle yes A, last blue square no",
        "Which color appears last?": "first red circle no, last blue square yes C",
        "When is the red circle visible?": "first red circle yes 0.5 to 7.0, last blue square no",
        "When is the blue square visible?": "first red circle no, last blue square yes 8.0 to 10.5",
        "Which color is the circle, and when is it visible?": (
            "first red circle yes A 0.5 to 7.0, last blue square no"
        ),
        "Which color is the square, and when is it visible?": (
            "first red circle no, last blue square yes C 8.0 to 10.5"
        ),
    }
    found = {
        record.question: record.rationale
        for number in range(20)
        for record in questions(Scene((number,), 12.0, events), "train-00001", "x.mp4")
    }
    assert found == {question: f"Seen: {seen}." for question, seen in expected.items()}


@pytest.mark.parametrize(("count", "places"), [(1, ["only"]), (3, ["first", "then", "last"])])
def test_events_are_named_by_their_order(count: int, places: list[str]) -> None:
    drawn = scene((1,), (8.0, 16.0), (count, count))
    tvg = questions(drawn, "train-00001", "x.mp4")[1]
    assert tvg.rationale is not None
    events = tvg.rationale.removeprefix("Seen: ").split(", ")
    assert [words.split()[0] for words in events] == places
    assert [words.split()[1:3] for words in events] == [[e.color, e.shape] for e in drawn.events]
    assert sum(words.split()[3] == "yes" for words in events) == 1


def test_the_times_of_a_rationale_are_written_as_in_the_answer(
    many: list[tuple[Scene, list[Record]]],
) -> None:
    for _, (_, tvg, _) in many[:100]:
        assert tvg.rationale is not None
        start, end = re.findall(r"\d+\.\d", tvg.rationale)
        assert f'"start_time": "{start}", "end_time": "{end}"' in target_text(tvg, False)


# Datasets on disk


def test_the_generator_runs_without_jax_and_torch() -> None:
    code = "import sys, data.synthetic; print({'jax', 'torch'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout == "set()\n"


def test_a_dataset_is_clips_and_manifests_that_read_back(tmp_path: Path) -> None:
    train, evaluation = write_dataset(tmp_path, SPEC)
    assert train == tmp_path / "train.jsonl"
    assert evaluation == tmp_path / "eval.jsonl"
    records = read_manifest(train, tmp_path) + read_manifest(evaluation, tmp_path)
    assert len(records) == 3 * (3 + 2)
    assert len({record.id for record in records}) == len(records)
    assert records[:3] == questions(scene((5, 0, 1)), "train-00001", "train/clip_00001.mp4")
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mp4")}
    assert names == {record.video for record in records}
    assert not list(tmp_path.rglob("partial_*"))


def test_the_clips_show_their_events_when_another_decoder_reads_them(tmp_path: Path) -> None:
    write_dataset(tmp_path, SPEC)
    for number in (1, 2, 3):
        drawn = scene((5, 0, number))
        with av.open(str(tmp_path / f"train/clip_{number:05d}.mp4")) as container:
            assert container.streams.video[0].average_rate == 8
            decoded = list(container.decode(video=0))
        assert [frame.time for frame in decoded] == [i / 8 for i in range(len(decoded))]
        assert len(decoded) == drawn.duration * 8
        for frame in decoded:
            assert frame.time is not None
            seen = [event.color for event in drawn.events if event.start <= frame.time < event.end]
            assert event_of(frame.to_ndarray(format="rgb24")) == (seen[0] if seen else None)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_same_spec_writes_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", SPEC, threads=1)
    write_dataset(tmp_path / "b", SPEC, threads=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_dataset_is_reused(tmp_path: Path) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    write_dataset(tmp_path, SPEC)
    before = written()
    write_dataset(tmp_path, SPEC)
    assert written() == before


def test_an_interrupted_dataset_is_completed(tmp_path: Path) -> None:
    write_dataset(tmp_path, SPEC)
    whole = contents(tmp_path)
    for name in ("train/clip_00002.mp4", "eval/clip_00001.mp4", "eval.jsonl"):
        (tmp_path / name).unlink()
    write_dataset(tmp_path, SPEC)
    assert contents(tmp_path) == whole


def test_a_folder_with_another_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, SPEC)
    with pytest.raises(SyntheticError, match="describes another dataset"):
        write_dataset(tmp_path, dataclasses.replace(SPEC, seed=6))
    assert json.loads((tmp_path / "dataset.json").read_text())["seed"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_clips": 0}, "at least one clip"),
        ({"seed": -1}, "is not negative"),
        ({"events": (0, 2)}, "events is"),
        ({"events": (2, 4)}, "events is"),
        ({"seconds": (8.2, 9.0)}, "multiples of 0.5"),
        ({"seconds": (9.0, 8.0)}, "shortest, longest"),
        ({"seconds": (6.0, 9.0)}, "3 events need 6.5"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SyntheticError, match=message):
        dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
