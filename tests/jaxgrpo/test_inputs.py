"""From manifests to batches: buckets, bad videos, swapped videos, loaders and targets."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.prompts import target_text
from data.records import Record, read_manifest, write_manifest
from data.sources import FolderClips
from jaxgrpo import cli, sharding
from jaxgrpo.config import Config, DataSection
from jaxgrpo.inputs import (
    InputError,
    Inputs,
    PromptCollator,
    PromptLoader,
    TargetCollator,
    TargetLoader,
    describe,
    frame_sampling,
    messages,
    pixel_limits,
    prepare,
)
from jaxgrpo.load import open_processor
from models.qwen2_5_vl.processor import Processor, Video
from models.qwen2_5_vl.resize import pillow
from tests.data import clips
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace
from tests.oracle import hf_processing as hf


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def processor(place: Workplace) -> Processor:
    return open_processor(tiny_run.load_config(place))


@pytest.fixture(scope="module")
def widths(place: Workplace, processor: Processor) -> list[int]:
    """Three buckets: the shortest prompts, most, and the longest with room to spare."""
    config = tiny_run.load_config(place, *tiny_run.mixed(place), "data.buckets=[1000]")
    sizes = prepare(config, processor, train=True, evaluation=False).train.sizes
    lengths = sorted({size.tokens for size in sizes})
    return [lengths[1], lengths[-2], lengths[-1] + 5]


@pytest.fixture(scope="module")
def config(place: Workplace, widths: list[int]) -> Config:
    return tiny_run.load_config(place, *tiny_run.mixed(place), f"data.buckets={widths}")


@pytest.fixture(scope="module")
def inputs(config: Config, processor: Processor) -> Inputs:
    return prepare(config, processor, train=True, evaluation=True)


# ---- buckets ----


def test_every_item_is_in_the_smallest_bucket_that_holds_it(
    inputs: Inputs, widths: list[int]
) -> None:
    assert all(inputs.train.buckets)
    assert [bucket.tokens for bucket in inputs.train.offers] == widths
    for dataset in (inputs.train, inputs.evaluation, inputs.swapped):
        assert sorted(sum(dataset.buckets, ())) == list(range(len(dataset.records)))
        for number, items in enumerate(dataset.buckets):
            for item in items:
                tokens = dataset.sizes[item].tokens
                assert tokens <= widths[number] and (number == 0 or tokens > widths[number - 1])


def test_a_bucket_offers_what_its_largest_prompt_needs(inputs: Inputs) -> None:
    """Of training, and of evaluation with its swapped videos."""
    assert inputs.swapped.offers == inputs.evaluation.offers
    for datasets in ((inputs.train,), (inputs.evaluation, inputs.swapped)):
        for number, bucket in enumerate(datasets[0].offers):
            sizes = [
                dataset.sizes[item] for dataset in datasets for item in dataset.buckets[number]
            ]
            for name in ("patches", "windows", "frame_patches"):
                most = max((size._asdict()[name] for size in sizes), default=0)
                assert most == bucket._asdict()[name]
            rows = [size.rows(bucket.frame_patches) for size in sizes]
            assert bucket.frames == max(rows, default=0)


def test_long_clips_of_small_frames_share_a_bucket_with_short_clips_of_large_ones(
    place: Workplace, tmp_path: Path
) -> None:
    """In a table of at most two slots for each patch, and a row for each prompt."""
    record = evaluation_records(place)[0]
    records = []
    for name, frames, side in (("short", 12, 336), ("long", 120, 84)):  # 4 frames/s
        fourcc = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(tmp_path / f"{name}.mp4"), fourcc, 4, (side, side))
        for number in range(frames):
            writer.write(np.full((side, side, 3), number, np.uint8))
        writer.release()
        records.append(
            dataclasses.replace(record, id=name, video=f"{name}.mp4", duration=None, clip=None)
        )
    write_manifest(tmp_path / "train.jsonl", records)
    paths = (f"data.train={tmp_path / 'train.jsonl'}", f"data.root={tmp_path}")
    pixels = ("data.min_pixels=784", "data.max_pixels=200000", "data.total_pixels=2000000")
    config = tiny_run.load_config(place, *paths, *pixels, "data.fps=2.0", "data.buckets=[1000]")
    processor = open_processor(config)
    train = prepare(config, processor, train=True, evaluation=False).train
    short, long = train.sizes
    assert (short.frames, short.frame_patches) == (3, 24 * 24)
    assert (long.frames, long.frame_patches) == (30, 6 * 6)
    [bucket] = train.offers
    assert (bucket.frames, bucket.frame_patches) == (3, 24 * 24)  # 16 frames of `long` in a row

    load = PromptLoader(processor, train.records, config.data, train.clips)
    prompts = [load(0), load(1)]
    table = PromptCollator(train.offers, processor.pad_id)(prompts, 0).frame_index
    assert table.size <= 2 * (short.patches + long.patches) + 2 * bucket.frame_patches
    for rows, prompt in zip(table, prompts, strict=True):
        np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(len(prompt.patches)))


def test_training_is_sized_without_evaluation(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    """eval.limit may change when a run is resumed; its programs and its steps must not."""
    short = read_manifest(place.clips / "train.jsonl", place.clips)[0]
    cut = next(
        record
        for record in read_manifest(place.clips / "mixed.jsonl", place.clips)
        if record.id == "cut"  # by its index 10 s, twice as long as the others
    )
    write_manifest(tmp_path / "train.jsonl", [short])
    twice = dataclasses.replace(cut, id="twice", spans=((0.0, 1.0), (2.0, 3.0)))
    write_manifest(tmp_path / "eval.jsonl", [short, twice])
    config = tiny_run.load_config(
        place,
        *(f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "eval")),
        "data.buckets=[1000]",
    )
    inputs = prepare(config, processor, train=True, evaluation=True)
    assert inputs.train.offers[0] == inputs.train.sizes[0]._replace(tokens=1000)
    assert inputs.evaluation.offers[0].frames > inputs.train.offers[0].frames
    assert (inputs.train.max_spans, inputs.evaluation.max_spans) == (1, 2)


def test_a_measured_prompt_is_what_is_loaded(config: Config, inputs: Inputs) -> None:
    load = PromptLoader(inputs.processor, inputs.train.records, config.data, inputs.train.clips)
    whole = [i for i, r in enumerate(inputs.train.records) if r.id != "cut"][:4]
    for item in whole:
        prompt = load(item)
        assert prompt.size == inputs.train.sizes[item]
        assert prompt.length == inputs.train.sizes[item].tokens


# ---- which videos ----


def test_a_bad_video_is_left_out_and_named(config: Config, inputs: Inputs) -> None:
    assert list(inputs.excluded) == ["data.train/notes"]
    assert "notes" not in {record.id for record in inputs.train.records}
    text = describe(inputs)
    assert "train: 13 items (4 gqa, 4 mcqa, 5 tvg)" in text
    assert "1 items left out, their videos cannot be read" in text
    assert (
        f"  notes: unreadable: {config.data.root}/{tiny_run.NOTES}: OpenCV finds no video" in text
    )


def test_a_video_of_an_impossible_shape_is_left_out_and_named(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    records = evaluation_records(place)
    shutil.copytree(place.clips, tmp_path / "clips")
    strip = tmp_path / "clips" / "strip.mp4"
    writer = cv2.VideoWriter(str(strip), cv2.VideoWriter_fourcc(*"mp4v"), 25, (1208, 6))
    for _ in range(50):
        writer.write(np.zeros((6, 1208, 3), np.uint8))
    writer.release()
    odd = dataclasses.replace(records[0], id="odd", video="strip.mp4", duration=None)
    write_manifest(tmp_path / "eval.jsonl", [*records, odd])
    config = tiny_run.load_config(
        place, f"data.eval={tmp_path / 'eval.jsonl'}", f"data.root={tmp_path / 'clips'}"
    )
    inputs = prepare(config, processor, train=False, evaluation=True)
    assert [record.id for record in inputs.evaluation.records] == [r.id for r in records]
    reason = inputs.excluded["data.eval/odd"]
    assert reason.startswith(f"odd: shape: {strip}: ") and "aspect ratio above 200" in reason


def test_a_question_that_spells_a_placeholder_is_named(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    record = dataclasses.replace(
        evaluation_records(place)[0], id="rude", question="What is <|video_pad|>?"
    )
    write_manifest(tmp_path / "eval.jsonl", [record])
    config = tiny_run.load_config(place, f"data.eval={tmp_path / 'eval.jsonl'}")
    with pytest.raises(InputError, match=r"record 'rude': its question .*<\|video_pad\|>; remove"):
        prepare(config, processor, train=False, evaluation=True)


# ---- several hosts ----


def test_a_video_that_one_host_cannot_read_is_left_out_by_all(
    config: Config, processor: Processor, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = inputs.train.records[0].id
    asked = []

    def gather(value: dict[str, Any]) -> list[dict[str, Any]]:
        asked.append(value)
        return [value, {name: f"{name}: not on this disk"}] if len(asked) == 1 else [value, value]

    monkeypatch.setattr(sharding, "gather_objects", gather)
    found = prepare(config, processor, train=True, evaluation=True)
    assert "notes" in asked[0]  # what this host could not read itself
    assert found.train.records == inputs.train.records[1:]
    assert found.excluded == inputs.excluded | {f"data.train/{name}": f"{name}: not on this disk"}


def test_hosts_that_see_other_data_are_told_apart(
    config: Config, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(value: dict[str, Any]) -> list[dict[str, Any]]:
        if "data.eval" not in value:  # what could not be read
            return [value, value]
        other = value["data.eval"] | {"items": "9 with digest 0"}
        return [value, value | {"data.eval": other}]

    monkeypatch.setattr(sharding, "gather_objects", gather)
    with pytest.raises(InputError, match="process 1 finds other items or videos in data.eval"):
        prepare(config, processor, train=True, evaluation=True)


def test_what_a_run_left_out_stays_out_with_its_reason(
    config: Config, processor: Processor, inputs: Inputs
) -> None:
    """A video that was mended meanwhile would change the plan of a run that goes on."""
    then = {"data.train/train-00001-tvg": "train-00001-tvg: it was damaged then"}
    known = inputs.excluded | then
    again = prepare(config, processor, train=True, evaluation=True, excluded=known)
    assert again.excluded == known
    assert "train-00001-tvg" not in {record.id for record in again.train.records}
    assert "train-00001-tvg: it was damaged then" in describe(again)


def test_the_two_manifests_may_use_the_same_ids(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    """A bad video of training leaves nothing out of the evaluation."""
    first, second = evaluation_records(place)[:2]
    bad = dataclasses.replace(first, video=tiny_run.NOTES)
    write_manifest(tmp_path / "train.jsonl", [bad, second])
    config = tiny_run.load_config(place, f"data.train={tmp_path / 'train.jsonl'}")
    inputs = prepare(config, processor, train=True, evaluation=True)
    assert [record.id for record in inputs.train.records] == [second.id]
    assert len(inputs.evaluation.records) == len(evaluation_records(place))


def test_no_question_meets_its_own_video_when_videos_are_swapped(inputs: Inputs) -> None:
    own = {record.id: record for record in inputs.evaluation.records}
    grounding = {name for name, record in own.items() if record.task == "tvg"}
    assert {record.id for record in inputs.swapped.records} == grounding
    for record in inputs.swapped.records:
        mine = own[record.id]
        assert record.video != mine.video
        assert (record.question, record.spans) == (mine.question, mine.spans)
        others = {(r.video, r.duration, r.clip) for r in own.values()}
        assert (record.video, record.duration, record.clip) in others


def test_questions_about_one_video_cannot_be_swapped(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    row = next(r for r in evaluation_records(place) if r.task == "tvg")
    write_manifest(tmp_path / "one.jsonl", [row, dataclasses.replace(row, id="b")])
    config = tiny_run.load_config(place, f"data.eval={tmp_path / 'one.jsonl'}")
    assert prepare(config, processor, train=False, evaluation=True).swapped is None


def evaluation_records(place: Workplace) -> list[Record]:
    return read_manifest(place.clips / "eval.jsonl", place.clips)


def test_eval_limit_takes_the_first_items(place: Workplace, processor: Processor) -> None:
    config = tiny_run.load_config(place, "eval.limit=4")
    inputs = prepare(config, processor, train=False, evaluation=True)
    assert list(inputs.evaluation.records) == evaluation_records(place)[:4]
    assert inputs.train is None


def test_synthetic_clips_are_made_where_they_are_asked_for(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    synthetic = "{train_clips: 2, eval_clips: 2, seconds: [4.0, 4.0], events: [1, 1]}"
    overrides = [f"data.root={tmp_path}", "data.train=''", "data.eval=''"]
    config = tiny_run.load_config(place, *overrides, f"data.synthetic={synthetic}")
    inputs = prepare(config, processor, train=True, evaluation=True)
    assert len(inputs.train.records) == len(inputs.evaluation.records) == 6
    train = {record.video for record in inputs.train.records}
    assert not train & {record.video for record in inputs.evaluation.records}
    assert all((tmp_path / video).is_file() for video in train)


# ---- what is loaded ----


@pytest.mark.parametrize("clip", [None, (0.5, 3.3)])
def test_from_file_to_prompt_it_is_what_pyav_qwen_vl_utils_and_transformers_make(
    tmp_path: Path, clip: tuple[float, float] | None
) -> None:
    path = clips.write_clip(tmp_path / "a.mp4", 100)
    model = hf.write_model_directory(tmp_path / "model")
    data = DataSection(train="unread.jsonl", root=str(tmp_path), fps=3.0, min_pixels=20 * 784)
    span = ((0.5, 1.0),)
    record = Record("a", "a.mp4", "tvg", "When does it open?", (), None, span, 4.0, clip)
    processor = Processor.load(model, pixel_limits(data), pillow)  # as transformers, below
    prompt = PromptLoader(processor, (record,), data, FolderClips(data.root))(0)

    pixels, _ = clips.decode_all(path)
    indices = hf.frame_indices(100, 25.0, frame_sampling(data), clip)
    sampled_fps = len(indices) / (indices[-1] - indices[0] + 1) * 25.0
    expected = hf.transformers_inputs(
        model,
        pixel_limits(data),
        messages(record, data.thinking),
        [Video(pixels[indices], 1 / sampled_fps)],
    )
    np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
    [grid] = expected["video_grid_thw"].tolist()
    assert grid[1:] == [8, 12] and len(indices) == 2 * grid[0]
    frames = prompt.frame_index.shape
    assert frames == (grid[0], grid[1] * grid[2])
    np.testing.assert_array_equal(
        prompt.positions, hf.released_positions(processor.config, expected)
    )
    raster = hf.raster_patches(processor.config, [grid], prompt.patches)
    difference = np.abs(raster - hf.pixels(expected["pixel_values_videos"]))
    # OpenCV and PyAV convert colours with other roundings: see tests/data/test_video.py.
    assert difference.max() <= 3 and difference.mean() < 0.25


@pytest.fixture(scope="module")
def targets(config: Config, inputs: Inputs) -> TargetLoader:
    prompts = PromptLoader(inputs.processor, inputs.train.records, config.data, inputs.train.clips)
    return TargetLoader(prompts, max_tokens=32)


def test_loaders_and_collators_pass_between_processes(
    config: Config, inputs: Inputs, targets: TargetLoader
) -> None:
    collate = TargetCollator(PromptCollator(inputs.train.offers, inputs.processor.pad_id), 32)
    again, collate_again = pickle.loads(pickle.dumps((targets, collate)))
    item = inputs.train.buckets[2][0]
    found = collate_again([again(item), again(item)], 2)
    expected = collate([targets(item), targets(item)], 2)
    for a, b in zip((*found.prompt, *found[1:]), (*expected.prompt, *expected[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_worker_processes_get_no_jax_with_their_loader() -> None:
    code = "import sys, jaxgrpo.inputs; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    subprocess.run([sys.executable, "-c", code], cwd=tiny_run.ROOT, check=True)


def test_a_batch_of_targets_is_padded_to_its_bucket_and_to_c(
    inputs: Inputs, targets: TargetLoader
) -> None:
    pad = inputs.processor.pad_id
    items = inputs.train.buckets[0][:2]
    batch = TargetCollator(PromptCollator(inputs.train.offers, pad), 32)(
        [targets(i) for i in items], 0
    )
    assert batch.prompt.tokens.shape == (2, inputs.train.offers[0].tokens)
    assert batch.completion.shape == (2, 1, 32)
    for row, item in enumerate(items):
        length = int(batch.length[row, 0])
        ids, rest = np.split(batch.completion[row, 0], [length])
        record = inputs.train.records[item]
        assert inputs.processor.decode(ids) == target_text(record, thinking=False)
        assert ids[-1] == inputs.processor.eos_ids[0] and (rest == pad).all()


def test_a_target_that_does_not_fit_is_named(inputs: Inputs, targets: TargetLoader) -> None:
    item = next(i for i, r in enumerate(inputs.train.records) if r.task == "gqa")
    name = inputs.train.records[item].id
    length = len(targets(item).completion)
    says = rf"'{name}'.*{length} tokens.*rollout.max_new_tokens \({length - 1}\)"
    with pytest.raises(InputError, match=says):
        dataclasses.replace(targets, max_tokens=length - 1)(item)
    assert len(dataclasses.replace(targets, max_tokens=length)(item).completion) == length


# ---- mistakes, through the command line ----


def mistake(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str
) -> str:
    eight = ["rollout.prompts=8", "eval.batch=8", f"run_dir={tmp_path / 'run'}"]  # devices
    assert cli.main(["train", str(place.config), *eight, *overrides]) == 2
    return capsys.readouterr().err


def test_a_prompt_longer_than_the_largest_bucket(
    place: Workplace, widths: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    longest = widths[-1] - 5
    message = mistake(place, capsys, tmp_path, f"data.buckets=[70, {longest - 1}]")
    largest = f"longer than the largest bucket ({longest - 1} tokens)"
    assert f"prompts of data.train are {largest}" in message
    assert f"-gqa ({longest} tokens)" in message
    assert f"add a bucket of {longest} to data.buckets, or lower data.total_pixels" in message


def test_a_row_without_its_fields(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [json.loads(x) for x in (place.clips / "train.jsonl").read_text().splitlines()]
    grounding = next(i for i, row in enumerate(rows) if row["task"] == "tvg")
    del rows[grounding]["spans"], rows[-1]["question"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = mistake(place, capsys, tmp_path, f"data.train={path}")
    assert f"{path}:{grounding + 1}" in message and "field 'spans'" in message
    assert f"{path}:{len(rows)}" in message and "field 'question'" in message


def test_no_manifest_and_no_readable_video(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "data.eval is empty" in mistake(place, capsys, tmp_path, "data.eval=''")
    record = dataclasses.replace(evaluation_records(place)[0], video=tiny_run.NOTES)
    write_manifest(tmp_path / "bad.jsonl", [record])
    message = mistake(place, capsys, tmp_path, f"data.train={tmp_path / 'bad.jsonl'}")
    assert "none of the 1 videos of data.train can be read" in message
    assert tiny_run.NOTES in message
