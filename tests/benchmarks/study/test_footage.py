"""Clips over real films: their shots, objects where the labels say, the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import footage
from data.records import read_manifest
from data.synthetic import COLORS, Event, Scene
from data.video import FrameSampling, decode
from tests.data.clips import real_clips

EVENT = Event(2.0, 5.0, "red", "circle")
SCENE = Scene((1, 2, 3), 8.0, (EVENT,))


@pytest.fixture(scope="module")
def films() -> list[np.ndarray]:
    found = real_clips()
    return [footage.film_frames(found[name]) for name in footage.FILMS]


def test_films_are_eight_frames_a_second_of_their_shorter_side(films: list[np.ndarray]) -> None:
    assert [film.shape for film in films] == [
        (80, 112, 264, 3),  # bikes: 640 x 272, 10 s
        (42, 112, 199, 3),
        (32, 112, 137, 3),
        (60, 112, 199, 3),
    ]


def test_the_object_covers_the_middle_exactly_within_its_span(films: list[np.ndarray]) -> None:
    frames = footage.render_spliced(SCENE, films)
    assert frames.shape == (64, 112, 112, 3)
    shown = (frames[:, 56, 56] == COLORS["red"]).all(axis=-1)
    assert np.flatnonzero(shown).tolist() == list(range(16, 40))


def test_without_objects_every_frame_is_a_part_of_a_film_or_its_mirror_image(
    films: list[np.ndarray],
) -> None:
    frames = footage.render_spliced(SCENE._replace(events=()), films)
    corners = {
        film[t, y, x].tobytes()
        for film in films
        for t in range(len(film))
        for y in range(film.shape[1] - 111)
        for x in range(film.shape[2])
    }
    assert all(frame[0, 0].tobytes() in corners for frame in frames)
    jumps = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert 2 <= (jumps > 30).sum() <= 8, "cuts every 1.5 to 4 seconds, and the films' own"


def test_a_scene_is_rendered_the_same_each_time(films: list[np.ndarray]) -> None:
    first, second = (footage.render_spliced(SCENE, films) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_clips_have_the_length_that_their_rows_say(tmp_path: Path) -> None:
    manifest = footage.write_spliced(tmp_path, real_clips(), clips=2)
    records = read_manifest(manifest, tmp_path)
    assert [record.id for record in records] == [
        f"spliced-0000{clip}-{task}" for clip in (1, 2) for task in ("mcqa", "tvg", "gqa")
    ]
    for record in records[::3]:
        frames = decode(tmp_path / record.video, FrameSampling(fps=8)).frames
        assert record.duration is not None and len(frames) == record.duration * 8
