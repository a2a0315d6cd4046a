"""The committed measurements: the table is of the numbers, and the numbers are what we promise."""

from __future__ import annotations

import json

import pytest

from benchmarks import video


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return json.loads(video.JSON.read_text())


def test_the_table_shows_the_numbers(report) -> None:
    assert video.TABLE.read_text() == video.table(report)


def test_ours_is_twice_as_fast_as_qwen_vl_utils(report) -> None:
    assert report["ratios"]["all to RGB"] >= 2
    assert all(ratio >= 1 for ratio in report["ratios"].values())


def test_our_pixels_are_nearer_than_hugging_faces(report) -> None:
    for film in report["films"]:
        found = film["differences"]
        assert found["ours"] <= min(found["torch uint8"], found["Pillow"]), film["film"]


def test_the_frame_store_is_faster_than_decoding(report) -> None:
    for film in report["films"]:
        assert film["frame store"]["again"]["cpu"] < 0.5 * film["seconds"]["ours"]["cpu"]


def test_one_film_is_measured_here() -> None:
    """Each reader of qwen_vl_utils finds the frames that ours does."""
    path = video.real_clips()["carphone_pristine"]
    limits = video.LIMITS["the paper"]
    found = video.measure(path, limits, rounds=1)
    assert found["decoded"] == [8, 144, 176] and found["differences"]["decoded, to PyAV"] == 0
    assert found["differences"]["ours"] < 0.001
    for read in (video.read_all, video.read_chosen):
        theirs = video.fetch(path, limits, read)
        assert list(theirs.shape) == [8, 3, *found["resized"]]
    assert all(side["cpu"] > 0 for side in found["seconds"].values())
