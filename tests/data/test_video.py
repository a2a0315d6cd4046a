"""Decoding: qwen_vl_utils' frames, PyAV's pixels and times, and every lie of a container caught."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import threading
import time
import tracemalloc
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

import data.probe
from data.probe import Encoded, Probe, probe
from data.video import FrameSampling, VideoError, decode, frame_count
from models.qwen2_5_vl.resize import exact
from tests.data import broken, clips
from tests.oracle.hf_processing import frame_indices

# Encoders differ by release, and so may the last bit of colour conversion; the next frame differs
# by 37 in red alone.
PIXEL_TOLERANCE = 2

# A variable rate: 60 frames in 6.4 s, 20 to 199 ms apart.
VARIABLE_MS = np.cumsum(np.random.default_rng(0).integers(20, 200, 60))
VARIABLE_MS -= VARIABLE_MS[0]


def kind_of(path: Path, **options: object) -> str:
    with pytest.raises(VideoError) as caught:
        decode(path, FrameSampling(), **options)
    assert str(path) in caught.value.message
    return caught.value.kind


@pytest.mark.parametrize("frames", [2, 3, 5, 49, 50, 251, 750, 9000, 100_000])
@pytest.mark.parametrize("fps", [1.0, 10.0, 24000 / 1001, 25.0, 59.94])
@pytest.mark.parametrize(
    "sampling",
    [FrameSampling(), FrameSampling(1.0, 16, 16), FrameSampling(4.0, 5, 31), FrameSampling(0.1)],
)
def test_the_number_of_frames_is_that_of_qwen_vl_utils(
    frames: int, fps: float, sampling: FrameSampling
) -> None:
    claims = Probe(frames, fps, 64, 48, frames / fps)
    assert frame_count(claims, sampling) == len(frame_indices(frames, fps, sampling, None))
    clip = (0.25 * frames / fps, 0.75 * frames / fps)
    if frames > 5:
        assert frame_count(claims, sampling, clip) == len(
            frame_indices(frames, fps, sampling, clip)
        )


@pytest.mark.parametrize("frames", [2, 16, 49, 50])
def test_a_fixed_number_of_frames_is_qwen_vl_utils_nframes(tmp_path: Path, frames: int) -> None:
    sampling = FrameSampling(frames=frames - frames % 2)
    path = clips.write_clip(tmp_path / "clip.mp4")
    pixels, times = clips.decode_all(path)
    indices = frame_indices(50, 25.0, sampling, None)
    found = decode(path, sampling)
    assert len(found.frames) == len(indices) == sampling.frames
    np.testing.assert_allclose(found.timestamps, times[indices], atol=1e-6)
    np.testing.assert_allclose(found.frames, pixels[indices].astype(int), atol=PIXEL_TOLERANCE)
    inside = frame_indices(50, 25.0, FrameSampling(frames=8), (0.5, 1.5))
    found = decode(path, FrameSampling(frames=8), (0.5, 1.5))
    np.testing.assert_allclose(found.timestamps, times[inside] - 0.5, atol=1e-6)


def test_a_video_of_fewer_frames_than_are_to_be_taken_is_refused(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4", 15)
    for clip, kind in ((None, "too_short"), ((0.0, 0.4), "clip")):
        with pytest.raises(VideoError, match="at least 16 frames") as caught:
            decode(path, FrameSampling(frames=16), clip)
        assert caught.value.kind == kind


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine", "cityCC0"])
def test_real_films_are_decoded_like_by_pyav(name: str) -> None:
    path = clips.real_clips()[name]
    claims = probe(path)
    for clip in (None, (1.0, 3.0)):
        indices = frame_indices(claims.frames, claims.fps, FrameSampling(), clip)
        found = decode(path, FrameSampling(), clip)
        with av.open(str(path)) as container:
            frames = itertools.islice(container.decode(video=0), int(indices[-1]) + 1)
            chosen = [frame for i, frame in enumerate(frames) if i in indices or i == 0]
        first, chosen = chosen[0], chosen[-len(indices) :]
        pixels = np.stack([clips.rgb(frame) for frame in chosen])
        times = np.array([frame.time - first.time for frame in chosen]) - (clip or (0.0,))[0]
        # Colours of an odd number of rows (405) are interpolated.
        tolerance = 4 if claims.height % 2 else 0
        np.testing.assert_allclose(found.frames, pixels.astype(int), atol=tolerance)
        np.testing.assert_allclose(found.timestamps, times, atol=2e-3)


@pytest.mark.parametrize("clip", [None, (0.0, 2.0), (0.5, 3.3), (1.02, 1.5), (2.0, 4.0)])
@pytest.mark.parametrize("sampling", [FrameSampling(), FrameSampling(5.0, 8, 14)])
@pytest.mark.parametrize("codec", ["mp4v", "h264"])
def test_frames_and_times_are_those_of_pyav_at_qwen_vl_utils_indices(
    tmp_path: Path, codec: str, sampling: FrameSampling, clip: tuple[float, float] | None
) -> None:
    path = tmp_path / "clip.mp4"
    if codec == "mp4v":
        clips.write_mp4v(path, 100)
    else:
        clips.write_clip(path, 100)
    pixels, times = clips.decode_all(path)
    indices = frame_indices(100, 25.0, sampling, clip)

    found = decode(path, sampling, clip)

    assert found.frames.dtype == np.uint8 and found.timestamps.dtype == np.float64
    np.testing.assert_allclose(found.frames, pixels[indices].astype(int), atol=PIXEL_TOLERANCE)
    start = clip[0] if clip else 0.0
    np.testing.assert_allclose(found.timestamps, times[indices] - start, atol=1e-6)
    if clip:
        assert found.timestamps[0] >= 0 and found.timestamps[-1] <= clip[1] - clip[0]
    total = int(indices[-1] - indices[0]) + 1
    sampled_fps = len(indices) / total * 25.0
    assert found.seconds_per_frame == pytest.approx(1 / sampled_fps, rel=1e-12)
    assert len(found.frames) == frame_count(probe(path), sampling, clip)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_at_a_variable_rate_frames_are_chosen_by_time(tmp_path: Path, suffix: str) -> None:
    # Matroska's header says 25 frames/s and so 161 frames; there are 60, and nothing is missing.
    path = clips.write_clip(tmp_path / f"clip.{suffix}", 60, times_ms=VARIABLE_MS.tolist())
    pixels, times = clips.decode_all(path)
    count = frame_count(probe(path), FrameSampling())
    wanted = np.linspace(0, times[-1], count)
    nearest = np.abs(times[None, :] - wanted[:, None]).argmin(axis=1)
    by_number = np.linspace(0, 59, count).round().astype(int)
    assert (nearest != by_number).any()

    found = decode(path, FrameSampling())

    np.testing.assert_allclose(found.timestamps, times[nearest], atol=1e-6)
    np.testing.assert_allclose(found.frames, pixels[nearest].astype(int), atol=PIXEL_TOLERANCE)
    assert np.abs(found.timestamps - wanted).max() <= 0.1  # no gap is longer than 0.2 s
    assert found.seconds_per_frame * count == pytest.approx(times[-1] * 60 / 59)


def test_a_clip_of_a_variable_rate_file_is_cut_by_time(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4", 60, times_ms=VARIABLE_MS.tolist())
    found = decode(path, FrameSampling(), clip=(2.0, 5.0))
    _, times = clips.decode_all(path)
    inside = times[(times >= 2.0) & (times <= 5.0)] - 2.0
    assert found.timestamps[0] == pytest.approx(inside[0])
    assert found.timestamps[-1] == pytest.approx(inside[-1])


def test_a_longer_shot_between_two_frames_repeats_the_nearest_one(tmp_path: Path) -> None:
    # A screen recording: nothing changes for 5 s, so nothing is stored.
    times = [*range(0, 1000, 100), *range(6000, 7000, 100)]
    path = clips.write_clip(tmp_path / "clip.mp4", 20, times_ms=times)
    found = decode(path, FrameSampling(fps=4.0))
    assert len(found.frames) == frame_count(probe(path), FrameSampling(fps=4.0)) == 20
    assert set(np.round(found.timestamps * 1000)) <= set(times)
    assert (np.diff(found.timestamps) >= 0).all() and (np.diff(found.timestamps) == 0).any()


@pytest.mark.parametrize(
    ("suffix", "codec"), [("avi", "libx264"), ("avi", "mpeg4"), ("mpg", "mpeg4"), ("ts", "libx264")]
)
def test_containers_without_times_or_true_counts_are_read_to_their_end(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    # AVI and MPEG-PS leave frames held back for reordering without a time, and MPEG-PS claims
    # fewer frames than there are.
    path = clips.write_clip(tmp_path / f"clip.{suffix}", 50, codec=codec, b_frames=2)
    found = decode(path, FrameSampling())
    pixels, _ = clips.decode_all(path)
    assert len(found.frames) == frame_count(probe(path), FrameSampling()) == 4
    numbers = np.array([0, 16, 33, 49])
    np.testing.assert_allclose(found.timestamps, numbers / 25, atol=1e-6)
    np.testing.assert_allclose(found.frames, pixels[numbers].astype(int), atol=PIXEL_TOLERANCE)


@pytest.mark.parametrize("name", broken.CASES)
def test_a_broken_or_odd_file_is_decoded_right_or_refused_by_kind(
    tmp_path: Path, name: str
) -> None:
    case = broken.CASES[name]
    path = tmp_path / f"clip.{case.suffix}"
    case.make(path)
    if case.outcome not in (broken.RIGHT, broken.UPRIGHT, broken.SCALED):
        assert kind_of(path, expected_duration=case.seconds) == case.outcome
        return
    found = decode(path, FrameSampling(fps=5.0), None, case.seconds)
    if case.outcome == broken.SCALED:
        assert found.frames.shape == (10, clips.HEIGHT, clips.WIDTH, 3)
        return
    pixels, times = clips.decode_all(path)
    if case.outcome == broken.UPRIGHT:
        pixels = np.rot90(pixels, -1, axes=(1, 2))
    numbers = np.abs(times[None, :] - np.linspace(0, times[-1], len(found.frames))[:, None])
    numbers = numbers.argmin(axis=1)
    np.testing.assert_allclose(found.timestamps, times[numbers], atol=1e-6)
    tolerance = 5 if name == "10 bits" else PIXEL_TOLERANCE
    np.testing.assert_allclose(found.frames, pixels[numbers].astype(int), atol=tolerance)


def test_flipped_bits_may_be_concealed(tmp_path: Path) -> None:
    """What cannot be known: the decoder makes a picture of what is left, and tells nobody.

    Where a flipped bit costs frames, that is noticed.
    """
    whole = decode(clips.write_clip(tmp_path / "whole.mp4"), FrameSampling(fps=25.0)).frames
    kinds = []
    for number in range(12):
        broken.flip_bit(tmp_path / "clip.mp4", number)
        try:
            found = decode(tmp_path / "clip.mp4", FrameSampling(fps=25.0)).frames
        except VideoError as error:
            kinds.append(error.kind)
        else:
            assert found.shape == whole.shape
            kinds.append("concealed" if (found != whole).any() else "harmless")
    assert set(kinds) <= {"truncated", "concealed", "harmless"}
    assert "concealed" in kinds


def test_pictures_beyond_all_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr(data.probe, "_MOST_PIXELS", clips.WIDTH * clips.HEIGHT - 1)
    assert kind_of(path) == "frame_size"


def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who has it always
    assert kind_of(path) == "missing"


# ---- long videos ----


@pytest.mark.parametrize("name", ["a variable rate", "rotated", "B-frames in AVI"])
def test_frames_are_resized_as_they_are_read(tmp_path: Path, name: str) -> None:
    case = broken.CASES[name]
    path = tmp_path / f"clip.{case.suffix}"
    case.make(path)
    whole = decode(path, FrameSampling())

    def half(frame: np.ndarray, count: int) -> np.ndarray:
        assert count == len(whole.frames)
        return cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)

    found = decode(path, FrameSampling(), resize=half)
    expected = np.stack([half(frame, len(whole.frames)) for frame in whole.frames])
    np.testing.assert_array_equal(found.frames, expected)
    assert found.decoded_hw == whole.decoded_hw == whole.frames.shape[1:3]
    np.testing.assert_array_equal(found.timestamps, whole.timestamps)


def test_a_long_video_is_never_held_in_full(tmp_path: Path) -> None:
    """200 frames chosen of 400, 0.9 MB each: 184 MB, of which a few are held at any time."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (640, 480))
    for number in range(400):
        writer.write(np.full((480, 640, 3), number % 256, np.uint8))
    writer.release()
    frame, small = 480 * 640 * 3, 56 * 84 * 3
    decode(path, FrameSampling(frames=2))  # what is allocated once
    tracemalloc.start()
    try:
        found = decode(path, FrameSampling(frames=200), resize=lambda x, _: exact(x, 56, 84))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.frames.nbytes == 200 * small
    # The frames returned, one in full from OpenCV, and what resizing one needs.
    assert 200 * small < peak < 200 * small + 6 * frame


# ---- decoders that hang ----


class Stuck(io.BytesIO):
    """A file whose disk stops answering; OpenCV waits for it, inside of native code."""

    answer = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        Stuck.answer.wait(30)
        return super().read(size)


def test_a_hung_decoder_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Encoded("gs://b/clip.mp4", clips.write_clip(tmp_path / "clip.mp4").read_bytes())
    monkeypatch.setattr(data.probe.io, "BytesIO", Stuck)
    try:
        for look in (
            lambda: decode(clip, FrameSampling(), timeout=0.3),
            lambda: probe(clip, timeout=0.3),
        ):
            begun = time.monotonic()
            with pytest.raises(VideoError, match=r"gs://b/clip.mp4: no progress within 0.3 s") as e:
                look()
            assert e.value.kind == "timeout" and time.monotonic() - begun < 10
    finally:
        Stuck.answer.set()


def test_a_slow_decoder_is_waited_for_while_it_gets_on(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4")

    def slow(frame: np.ndarray, count: int) -> np.ndarray:
        time.sleep(0.05)
        return frame

    begun = time.monotonic()
    found = decode(path, FrameSampling(fps=25.0), resize=slow, timeout=1.0)
    assert time.monotonic() - begun > 1.0
    np.testing.assert_array_equal(found.frames, decode(path, FrameSampling(fps=25.0)).frames)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    path = clips.write_rotated(tmp_path / "clip.mp4", degrees)
    stored, _ = clips.decode_all(path)  # PyAV does not rotate
    found = decode(path, FrameSampling(min_frames=50, max_frames=50))
    upright = np.rot90(stored, -degrees // 90, axes=(1, 2))  # a player turns clockwise
    np.testing.assert_allclose(found.frames, upright.astype(int), atol=PIXEL_TOLERANCE)
    claims = probe(path)
    assert (claims.height, claims.width) == found.frames.shape[1:3]


def test_a_size_that_changes_is_scaled_to_the_first(tmp_path: Path) -> None:
    path = clips.write_growing(tmp_path / "clip.ts")
    found = decode(path, FrameSampling(min_frames=50))
    assert found.frames.shape == (50, clips.HEIGHT, clips.WIDTH, 3)
    large = found.frames[49].astype(int)
    assert np.abs(large - clips.picture(49)).mean() < 10


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = clips.write_cut(tmp_path / "clip.mp4")
    assert probe(path).frames == 250  # its index came first and is whole
    assert kind_of(path) == "truncated"
    assert kind_of(path, clip=(7.0, 9.0)) == "truncated"


def test_a_clip_before_the_cut_is_still_good(tmp_path: Path) -> None:
    path = clips.write_cut(tmp_path / "clip.mp4")
    assert len(decode(path, FrameSampling(), clip=(1.0, 3.0)).frames) == 4


def test_files_that_are_no_videos_are_refused_by_kind(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "zeros.mp4").write_bytes(bytes(10_000))
    assert kind_of(tmp_path / "none.mp4") == "missing"
    assert kind_of(tmp_path) == "missing"
    assert kind_of(tmp_path / "empty.mp4") == "empty"
    assert kind_of(tmp_path / "text.mp4") == "unreadable"
    assert kind_of(tmp_path / "zeros.mp4") == "unreadable"
    assert kind_of(clips.write_png(tmp_path / "picture.mp4")) == "frame_count"
    assert kind_of(clips.write_audio(tmp_path / "sound.mp4")) == "unreadable"


def test_times_that_stand_still_are_refused(tmp_path: Path) -> None:
    assert kind_of(clips.write_repeated_time(tmp_path / "clip.mkv")) == "timestamps"


def test_a_file_shorter_than_annotated_is_refused_and_a_longer_one_is_not(tmp_path: Path) -> None:
    path = clips.write_mp4v(tmp_path / "clip.mp4", 250)
    assert kind_of(path, expected_duration=17.0) == "duration"
    assert kind_of(path, expected_duration=11.1) == "duration"
    for close in (10.0, 10.4, 10.9, 6.0):
        assert len(decode(path, FrameSampling(), expected_duration=close).frames) == 20


def test_a_variable_rate_file_shorter_than_annotated_is_refused(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "clip.mkv", 60, times_ms=VARIABLE_MS.tolist())
    assert kind_of(path, expected_duration=9.0) == "duration"


def test_a_clip_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    path = clips.write_mp4v(tmp_path / "clip.mp4", 50)
    assert kind_of(path, clip=(4.0, 8.0)) == "clip"
    assert kind_of(path, clip=(1.0, 9.0)) == "clip"
    assert kind_of(path, clip=(1.0, 1.01)) == "clip"  # a single frame
    assert len(decode(path, FrameSampling(), clip=(0.0, 2.9)).frames) == 4  # a rounded end


def test_a_single_frame_is_too_short(tmp_path: Path) -> None:
    assert kind_of(clips.write_mp4v(tmp_path / "clip.mp4", 1)) == "too_short"
    with pytest.raises(VideoError) as caught:
        frame_count(Probe(1, 25.0, 64, 48, 0.04), FrameSampling())
    assert caught.value.kind == "too_short"


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(VideoError("truncated", "a.mp4: cut")))
    assert (error.kind, error.message, str(error)) == ("truncated", "a.mp4: cut", "a.mp4: cut")


@pytest.mark.parametrize(
    "options",
    [{"fps": 0.0}, {"fps": math.nan}, {"min_frames": 1}, {"max_frames": 2}, {"frames": 5}],
)
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        FrameSampling(**options)
