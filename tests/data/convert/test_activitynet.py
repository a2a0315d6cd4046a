"""ActivityNet Captions: each sentence of a video is a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.convert import activitynet
from data.convert.reading import ConvertError
from tests.data.convert.files import json_file, reasons, written

CAPTIONS = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81], [56.26, 83.1], [90, 95], [-0.5, 4]],
        "sentences": [
            " A young woman is seen.",
            "The girl dances. ",
            "She ends.",
            "Late.",
            "Early.",
        ],
    },
    "v_bad_times": {
        "duration": 30,
        "timestamps": [[1, 2], [3], ["x", 5], [7, 7], [9, 8]],
        "sentences": ["", "One number.", "A text.", "Empty.", "Backwards."],
    },
    "v_uneven": {"duration": 30, "timestamps": [[1, 2]], "sentences": ["a", "b"]},
    "v_endless": {"duration": float("nan"), "timestamps": [[1, 2]], "sentences": ["a"]},
    "v_nothing": {"duration": 30, "timestamps": [], "sentences": []},
    "v_list": [1, 2],
    "../v_out": {"duration": 30, "timestamps": [[1, 2]], "sentences": ["a"]},
}


def test_sentences_become_grounding_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = json_file(tmp_path / "train.json", CAPTIONS)
    done = activitynet.convert([path], "activitynet/{id}.mp4")
    records = written(done, tmp_path)
    assert [record.id for record in records] == [
        "v_QOlSCBRmfWY",
        "v_QOlSCBRmfWY-2",
        "v_QOlSCBRmfWY-3",
        "v_QOlSCBRmfWY-5",
        "v_bad_times-5",
    ]
    assert records[0].video == "activitynet/v_QOlSCBRmfWY.mp4"
    assert records[1].question == "The girl dances." and records[1].duration == 82.73
    assert [record.spans[0] for record in records[2:]] == [(56.26, 82.73), (0.0, 4.0), (8.0, 9.0)]
    assert done.adjusted == {
        "end moved to the video's end": 1,
        "start moved to 0": 1,
        "start and end exchanged": 1,
    }
    assert reasons(done) == {
        "the span starts at the end of the video, or later": 1,
        "field 'sentence': expected a text": 1,
        "timestamp: expected [start, end]": 1,
        "timestamp: expected a number": 1,
        "the span is empty": 1,
        "not a timestamp for each sentence": 1,
        "duration: expected a number": 1,
        "no lists of timestamps and sentences": 1,
        "not a JSON object": 1,
        "the video's path is not one below the root": 1,
    }
    assert done.rejected[0].source == f"{path}: v_QOlSCBRmfWY, sentence 4"


def test_a_list_is_another_file(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="expected a JSON object"):
        activitynet.convert([json_file(tmp_path / "train.json", [CAPTIONS])])
