"""Loading prompts through the frame store, and videos that change while a run goes on."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.probe import VideoError
from jaxgrpo import inputs
from jaxgrpo.inputs import Inputs, prepare, prompt_loader
from jaxgrpo.load import open_processor
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def prepared(place: Workplace, clips: Path, *overrides: str) -> tuple[Inputs, inputs.PromptLoader]:
    """The training data with its clips in another folder, and its loader."""
    if not clips.exists():
        shutil.copytree(place.clips, clips)
    config = tiny_run.load_config(place, f"data.root={clips}", *overrides)
    found = prepare(config, open_processor(config), train=True, evaluation=False)
    assert found.train is not None
    return found, prompt_loader(found, found.train, config.data)


def test_the_store_gives_the_same_prompts_without_decoding(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, store = tmp_path / "clips", f"data.frame_store={tmp_path / 'store'}"
    _, plain = prepared(place, clips)
    found, load = prepared(place, clips, store)
    items = range(len(load.records))
    videos = len({record.video for record in load.records})
    expected = [plain(item) for item in items]
    first = [load(item) for item in items]
    assert found.served() == {
        "data/frame_store_hits": len(items) - videos,  # several questions about a video
        "data/frame_store_misses": videos,
    }
    monkeypatch.setattr(inputs, "decode", None)
    load = pickle.loads(pickle.dumps(load))  # as in a worker process
    second = [load(item) for item in items]
    for prompts in zip(expected, first, second, strict=True):
        for arrays in zip(*prompts, strict=True):
            for array in arrays[1:]:
                np.testing.assert_array_equal(array, arrays[0])
    assert found.served()["data/frame_store_misses"] == videos


@pytest.mark.parametrize(
    "override",
    ["data.max_pixels=3136", "data.fps=1.0", "data.frames=8", "data.resize=pillow"],
)
def test_other_settings_do_not_find_these_frames(
    place: Workplace, tmp_path: Path, override: str
) -> None:
    clips, store = tmp_path / "clips", f"data.frame_store={tmp_path / 'store'}"
    _, load = prepared(place, clips, store)
    load(0)
    found, other = prepared(place, clips, store, override, "data.buckets=[200]")
    other(0)
    assert found.served() == {"data/frame_store_hits": 0, "data/frame_store_misses": 1}


def test_a_video_that_changed_is_decoded_again(place: Workplace, tmp_path: Path) -> None:
    clips, store = tmp_path / "clips", f"data.frame_store={tmp_path / 'store'}"
    found, load = prepared(place, clips, store)
    videos = sorted({record.video for record in load.records})
    first = load(0)
    path = clips / load.records[0].video
    same_length = next(
        clips / other.video
        for other, size in zip(load.records, load.sizes, strict=True)
        if other.video != load.records[0].video
    )
    shutil.copy(same_length, path)
    bare = dataclasses.replace(load, sizes=())
    record = dataclasses.replace(load.records[0], duration=None)
    changed = dataclasses.replace(bare, records=(record,))(0)
    assert len(videos) > 1 and found.served()["data/frame_store_hits"] == 0
    assert changed.patches.shape != first.patches.shape or (changed.patches != first.patches).any()


def test_a_video_that_no_longer_fits_its_bucket_is_a_bad_video(
    place: Workplace, tmp_path: Path
) -> None:
    """It was replaced, after it was probed, by one of another length."""
    clips = tmp_path / "clips"
    _, load = prepared(place, clips)
    item, other = next(
        (a, b)
        for a, size in enumerate(load.sizes)
        for b, another in enumerate(load.sizes)
        if size.frames < another.frames
    )
    load(item)
    shutil.copy(clips / load.records[other].video, clips / load.records[item].video)
    with pytest.raises(VideoError, match="it was replaced since the run began") as caught:
        load(item)
    assert caught.value.kind == "changed"
