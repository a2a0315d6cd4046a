"""Our tokenizer and processor beside transformers', and what is said where they differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data.video import VideoError
from jaxgrpo.verification import prompts
from jaxgrpo.verification.checks import Check, Status
from jaxgrpo.verification.prompts import LIMITS, Clip
from models.qwen2_5_vl.processor import Processor, Video
from tests.jaxgrpo.verification.directories import TINY, copy, edit_json
from tests.oracle import hf_model


@pytest.fixture(scope="module")
def ours() -> Processor:
    return Processor.load(TINY, LIMITS)


def noise(frames: int, height: int, width: int, seconds: float = 0.5) -> Clip:
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Clip("noise", Video(pixels, seconds))


def processed(directory: Path, ours: Processor, clip: Clip) -> Check:
    return prompts.processor(directory, ours, clip, prompts.inputs(ours, clip))


# ---- the tokenizer ----


def test_the_shipped_tokenizer_is_transformers(ours: Processor) -> None:
    check = prompts.tokenizer(TINY, ours)
    assert (check.status, check.details) == (Status.PASS, ())
    assert "22 special tokens" in check.summary


def test_texts_that_get_other_ids_are_named(tmp_path: Path) -> None:
    """tokenizer.json normalises by NFKC here; transformers' class has Qwen's NFC built in."""
    path = copy(tmp_path / "model") / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "NFKC"}
    path.write_text(json.dumps(content), encoding="utf-8")
    check = prompts.tokenizer(path.parent, Processor.load(path.parent, LIMITS))
    assert check.status is Status.FAIL
    assert any(told.startswith("'١٢٣ ４５ 1234567890 1e309 -0.5': id") for told in check.details)


def test_a_chat_that_is_written_otherwise_is_named(ours: Processor) -> None:
    template = ours.chat_template.replace("helpful", "hopeful")
    check = prompts.tokenizer(TINY, dataclasses.replace(ours, chat_template=template))
    assert check.status is Status.FAIL
    assert all(told.startswith("chat [{") for told in check.details)
    assert len(check.details) == 2


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"eos_token_id": 7}, "config.json: eos_token_id 7 is not among the stop ids [443, 441]"),
        ({"bos_token_id": 7}, "config.json: bos_token_id is 7, but <|endoftext|> has id 441"),
        (
            {"vision_token_id": 7},
            "config.json: vision_token_id is 7, but <|vision_pad|> has id 452",
        ),
    ],
)
def test_ids_of_config_json_are_the_tokenizers(
    values: dict[str, int], told: str, ours: Processor, tmp_path: Path
) -> None:
    directory = edit_json(copy(tmp_path / "model"), "config.json", **values)
    check = prompts.tokenizer(directory, ours)
    assert check.status is Status.FAIL
    assert len(check.details) == 1
    assert check.details[0].startswith(told)


# ---- the processor ----


@pytest.mark.parametrize(
    "clip",
    [noise(4, 112, 112), noise(5, 90, 260, 0.65), noise(2, 300, 333)],
    ids=["as made", "odd, wide", "resized down"],
)
def test_a_prompt_with_a_clip_is_transformers(ours: Processor, clip: Clip) -> None:
    check = processed(TINY, ours, clip)
    assert (check.status, check.details) == (Status.PASS, ())


def test_a_pixel_an_id_and_a_time_that_differ_are_named(ours: Processor) -> None:
    clip = noise(4, 112, 112)
    given = prompts.inputs(ours, clip)
    tokens, values = given.prompt.tokens.copy(), given.pixel_values.copy()
    tokens[3] += 1
    values[7, 100] += 0.5
    wrong = given._replace(
        prompt=given.prompt._replace(tokens=tokens), seconds_per_grid=0.5, pixel_values=values
    )
    check = prompts.processor(TINY, ours, clip, wrong)
    assert check.status is Status.FAIL
    ids, time, pixels = check.details
    assert ids.startswith(f"input_ids[3]: ours {tokens[3]}, theirs {tokens[3] - 1} (1 of ")
    assert time.startswith("second_per_grid_ts[0]: ours 0.5, theirs 1 ")
    assert pixels.startswith("pixel_values_videos[7, 100]: ours")
    assert "tolerance 0.0001" in pixels


def test_another_patch_size_gives_other_inputs(ours: Processor, tmp_path: Path) -> None:
    directory = edit_json(copy(tmp_path / "model"), "preprocessor_config.json", patch_size=16)
    check = processed(directory, ours, noise(4, 112, 112))
    assert check.status is Status.FAIL
    assert check.details == ("pixel_values_videos: ours is [200, 1176], theirs [200, 1536]",)


def test_patches_are_put_in_transformers_order(ours: Processor) -> None:
    given = prompts.inputs(ours, noise(4, 90, 260))
    found = prompts.natural_order(given.prompt, given.grid, ours.config.vision)
    np.testing.assert_array_equal(found, hf_model.natural_order(given.prompt))
    expected = hf_model.pixel_values(given.prompt)
    np.testing.assert_allclose(given.pixel_values, expected.numpy(), atol=1e-5)


# ---- the clip ----


def test_without_a_video_one_is_made_whose_windows_are_ragged(ours: Processor) -> None:
    clip = prompts.open_clip(None)
    assert clip.video.frames.shape == (8, 112, 112, 3)
    grid = prompts.inputs(ours, clip).grid
    assert grid.h % 8 and grid.w % 8


def test_a_video_that_cannot_be_used_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        prompts.open_clip(str(tmp_path / "a.mp4"))
