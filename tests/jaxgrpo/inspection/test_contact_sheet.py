"""The pictures of what the model sees, against PyAV and Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.records import Record
from data.sources import FolderClips
from jaxgrpo.inputs import PromptLoader
from jaxgrpo.inspection.contact_sheet import contact_sheet, frames_of
from jaxgrpo.load import open_processor
from tests.data import clips
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace

GREEN = (20, 150, 70)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("pixels", "size"),
    [(784, (28, 28)), (28 * 28 * 4, (56, 56)), (168 * 224, (224, 168))],  # 224: ragged windows
)
def test_the_frames_are_those_of_the_file_as_another_decoder_and_resizer_have_them(
    place: Workplace, tmp_path: Path, pixels: int, size: tuple[int, int]
) -> None:
    clips.write_clip(tmp_path / "a.mp4", 50)  # 64 x 48, 25 frames/s
    limits = (f"data.min_pixels={pixels}", f"data.max_pixels={pixels}")
    config = tiny_run.load_config(place, *limits)
    processor = open_processor(config)
    record = Record("a", "a.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), None)
    load = PromptLoader(processor, (record,), config.data, FolderClips(str(tmp_path)))
    frames = load.frames(0)
    seen = frames_of(load.prompt(0, frames), processor.config.vision)

    decoded, times = clips.decode_all(tmp_path / "a.mp4")
    assert len(seen) == len(frames.timestamps) == 4
    for frame, time in zip(seen, frames.timestamps, strict=True):
        expected = decoded[np.argmin(np.abs(times - time))]
        resized = Image.fromarray(expected).resize(size, Image.Resampling.BICUBIC)
        difference = np.abs(frame.astype(int) - np.asarray(resized))
        # The decoders' YUV to RGB differs by up to 3, which enlarging overshoots; and the encoder
        # does not always write the same file.
        assert difference.max() <= 6 and difference.mean() < 0.5


def test_a_sheet_shows_each_frame_pixel_by_pixel_and_marks_the_true_span() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), np.uint8)
    times = np.array([0.0, 1.0, 2.0, 3.0])
    sheet = np.asarray(contact_sheet("a (tvg)", frames, times, ((0.9, 2.5),), 4.0))
    enlarged = frames.repeat(5, axis=1).repeat(5, axis=2)
    places = []
    for frame in enlarged:
        rows, columns = np.nonzero((sheet == frame[0, 0]).all(axis=-1))
        found = [
            (top, left)
            for top, left in zip(rows, columns, strict=True)
            if np.array_equal(sheet[top : top + 140, left : left + 140], frame)
        ]
        places += found
    assert len(places) == 4
    marked = [tuple(sheet[top - 1, left - 1].tolist()) == GREEN for top, left in places]
    assert marked == [False, True, True, False]
    assert sorted(left for _, left in places) == [left for _, left in places]


def test_of_a_long_video_some_frames_are_shown_and_a_long_title_is_cut() -> None:
    frames = np.zeros((768, 140, 252, 3), np.uint8)
    short, long = (
        contact_sheet("t" * length, frames, np.arange(768) / 2.0, (), 384.0)
        for length in (10, 5000)
    )
    assert short.size == long.size
    assert short.size[0] < 1500 and short.size[1] < 1000


def test_the_timeline_marks_the_span_at_its_times() -> None:
    frames = np.zeros((2, 28, 28, 3), np.uint8)
    sheet = contact_sheet("a", frames, np.array([0.0, 9.0]), ((2.5, 5.0),), 10.0)
    pixels = np.asarray(sheet)
    [row] = np.flatnonzero((pixels == GREEN).all(axis=-1).sum(axis=1) > 100)[:1]
    green = np.flatnonzero((pixels[row] == GREEN).all(axis=-1))
    width = pixels.shape[1] - 20  # within the margins
    assert abs(green.min() - 10 - 0.25 * width) <= 1
    assert abs(green.max() - 10 - 0.5 * width) <= 1
