"""Prompts against transformers' processor and qwen_vl_utils' sizes."""

from __future__ import annotations

import concurrent.futures
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.qwen2_5_vl.processor import (
    Grid,
    Image,
    Processor,
    Prompt,
    Video,
    collate,
    pack_frames,
)
from models.qwen2_5_vl.resize import pillow
from models.qwen2_5_vl.sizes import PixelLimits, ProcessorError, Size
from tests.oracle import hf_processing as hf
from tests.oracle.hf_processing import CASES, Case, image, messages, noise, video

ROOT = Path(__file__).parents[3]
# Low enough that multiples of 28 stay as they are.
LIMITS = PixelLimits(min_pixels=28 * 28, max_pixels=768 * 28 * 28)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.write_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return Processor.load(directory, LIMITS)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def grids_of(processor: Processor, media: list[Video | Image]) -> list[Grid]:
    return [
        processor.grid(item.pixels.shape[:2], None)
        if isinstance(item, Image)
        else processor.grid(item.frames.shape[1:3], len(item.frames))
        for item in media
    ]


# --- Against transformers' Qwen2_5_VLProcessor --------------------------------------------------


@every_case
def test_token_ids_are_those_of_transformers(processor: Processor, directory: Path, case: Case):
    expected = hf.transformers_inputs(directory, LIMITS, *case)
    prompt = processor(*case)
    np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
    assert prompt.length == len(prompt.tokens)


@every_case
def test_grids_are_those_of_transformers(processor: Processor, directory: Path, case: Case):
    expected = hf.transformers_inputs(directory, LIMITS, *case)
    grids = grids_of(processor, case[1])
    for kind, key in ((Image, "image_grid_thw"), (Video, "video_grid_thw")):
        ours = [grid for grid, item in zip(grids, case[1], strict=True) if isinstance(item, kind)]
        np.testing.assert_array_equal(
            np.reshape(ours, (-1, 3)), expected.get(key, np.zeros((0, 3)))
        )


@every_case
def test_patches_are_those_of_transformers_in_window_order(
    processor: Processor, directory: Path, case: Case
):
    expected = hf.transformers_inputs(directory, LIMITS, *case)
    prompt, first = processor(*case), 0
    unread = {kind: expected.get(f"pixel_values{kind}") for kind in ("", "_videos")}
    for item, grid in zip(case[1], grids_of(processor, case[1]), strict=True):
        kind = "" if isinstance(item, Image) else "_videos"
        values, unread[kind] = np.split(unread[kind], [grid.patches])
        ours = prompt.patches[first : first + grid.patches]
        raster = hf.raster_patches(processor.config, [grid], ours)
        np.testing.assert_allclose(raster, hf.pixels(values), atol=1e-3)
        first += grid.patches
    assert first == len(prompt.patches)
    assert all(values is None or len(values) == 0 for values in unread.values())


@every_case
def test_positions_are_those_of_the_release(processor: Processor, directory: Path, case: Case):
    inputs = hf.transformers_inputs(directory, LIMITS, *case)
    expected = hf.released_positions(processor.config, inputs)
    np.testing.assert_array_equal(processor(*case).positions, expected)


def test_positions_of_images_are_those_of_transformers_5(processor: Processor, directory: Path):
    case = (messages("image", "and", "image", "?"), [image(56, 140), image(112, 28)])
    inputs = hf.transformers_inputs(directory, LIMITS, *case)
    expected = hf.transformers_rope_index(processor.config, inputs)
    np.testing.assert_array_equal(processor(*case).positions, expected)


@every_case
def test_every_vision_token_is_replaced_by_the_unit_of_its_place(
    processor: Processor, directory: Path, case: Case
):
    prompt = processor(*case)
    config = processor.config
    vision = np.isin(prompt.tokens, [config.image_token_id, config.video_token_id])
    np.testing.assert_array_equal(prompt.vision_index >= 0, vision)
    if case[1]:
        order, _ = hf.window_order(config, grids_of(processor, case[1]))
        np.testing.assert_array_equal(prompt.vision_index[vision], np.argsort(order))


# --- Sizes ---------------------------------------------------------------------------------------


@every_case
def test_the_size_is_known_before_decoding(processor: Processor, case: Case):
    prompt = processor(*case)
    assert processor.size(case[0], grids_of(processor, case[1])) == prompt.size
    assert prompt.size == Size(
        len(prompt.tokens),
        len(prompt.patches),
        len(prompt.window_index),
        len(prompt.frame_index),
        max((grid.h * grid.w for grid in grids_of(processor, case[1])), default=0),
    )


def test_more_frames_get_fewer_pixels_each(directory: Path):
    # The released training script: at most 2,048 video tokens.
    limits = PixelLimits(min_pixels=3_136, max_pixels=768 * 784, total_pixels=1_605_632)
    processor = Processor.load(directory, limits)
    tokens = {n: math.prod(processor.grid((720, 1280), n)) // 4 for n in (2, 16, 64, 767, 768)}
    assert all(count <= 2048 for count in tokens.values())
    assert processor.grid((720, 1280), 2) == (1, 40, 72)
    assert processor.grid((720, 1280), 64)[1:] < processor.grid((720, 1280), 16)[1:]
    assert processor.grid((720, 1280), 767) == processor.grid((720, 1280), 768)


# --- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(100, 130), (333, 517), (40, 300), (20, 25)])
def test_a_resized_image_is_that_of_transformers(directory: Path, shape: tuple[int, int]):
    limits = PixelLimits(min_pixels=56 * 56, max_pixels=40 * 784)
    processor = Processor.load(directory, limits, pillow)
    case = (messages("image"), [image(*shape)])
    expected = hf.transformers_inputs(directory, limits, *case)
    raster = hf.raster_patches(
        processor.config, grids_of(processor, case[1]), processor(*case).patches
    )
    np.testing.assert_allclose(raster, hf.pixels(expected["pixel_values"]), atol=1e-3)


def test_frames_resized_one_by_one_make_the_same_prompt(directory: Path):
    """As `data.video.decode` does it; sizes are those of the decoded frame, not of the resized."""
    limits = PixelLimits(min_pixels=784, max_pixels=784)
    processor = Processor.load(directory, limits)
    for height, width in ((112, 112), (100, 300), (28, 5000)):
        whole = video(4, height, width)
        frames = np.stack([processor.resize_frame(frame, 4) for frame in whole.frames])
        small = Video(frames, whole.seconds_per_frame, decoded_hw=(height, width))
        found, expected = (processor(messages("video"), [item]) for item in (small, whole))
        assert found.size == expected.size
        np.testing.assert_array_equal(found.patches, expected.patches)


# --- Text ----------------------------------------------------------------------------------------


def test_a_completion_ends_with_the_end_of_turn_and_decodes_to_itself(processor: Processor):
    text = "<think>a man — runs</think><answer>[1.5, 4]</answer>"
    ids = processor.encode_completion(text)
    assert ids.dtype == np.int32
    assert processor.tokenizer.convert_ids_to_tokens(int(ids[-1])) == "<|im_end|>"
    assert processor.decode(ids) == text
    assert processor.decode([*ids, *ids]) == text


def test_decoding_stops_at_any_stop_id_and_shows_other_special_tokens(processor: Processor):
    names = ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]
    start, *stops = processor.tokenizer.convert_tokens_to_ids(names)
    assert set(processor.eos_ids) == set(stops)
    assert processor.pad_id == stops[0]
    yes = processor.encode_completion("yes")[:-1]
    for stop in stops:
        assert processor.decode([start, *yes, stop, *yes]) == "<|im_start|>yes"


def test_a_completion_that_spells_a_stop_token_is_an_error(processor: Processor):
    with pytest.raises(ProcessorError, match="stop token"):
        processor.encode_completion("done<|im_end|>not done")


def test_the_releases_chat_template_file_comes_before_the_tokenizers(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    prompt = Processor.load(directory, LIMITS)([{"role": "user", "content": "hello"}], [])
    plain = Processor.load(directory, LIMITS).encode_completion("hello")[:-1]
    np.testing.assert_array_equal(prompt.tokens, plain)


def test_without_a_generation_config_the_tokenizers_end_stops(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    (directory / "generation_config.json").unlink()
    processor = Processor.load(directory, LIMITS)
    assert processor.tokenizer.convert_ids_to_tokens(list(processor.eos_ids)) == ["<|im_end|>"]


# --- Batches -------------------------------------------------------------------------------------


def test_a_batch_pads_every_prompt_on_the_right(processor: Processor):
    prompts = [processor(*case) for case in CASES.values()]
    bucket = Size(*(max(values) + 3 for values in zip(*(p.size for p in prompts), strict=True)))
    batch = collate(prompts, bucket, pad_id=processor.pad_id)
    assert batch.tokens.shape == (len(prompts), bucket.tokens)
    assert batch.window_index.shape == (len(prompts), bucket.windows, 64)
    assert batch.frame_index.shape == (len(prompts), bucket.frames, bucket.frame_patches)
    padding = Prompt(processor.pad_id, 0, -1, None, 0, 0, -1, -1)
    for row, prompt in enumerate(prompts):
        assert batch.length[row] == len(prompt.tokens)
        packed = pack_frames(prompt.frame_index, bucket.frame_patches)
        parts = prompt._replace(frame_index=packed)
        for whole, part, fill in zip(batch, parts, padding, strict=True):
            assert whole.dtype == part.dtype
            inside = np.zeros(whole[row].shape, bool)
            inside[tuple(slice(size) for size in part.shape)] = True
            np.testing.assert_array_equal(whole[row][inside].reshape(part.shape), part)
            assert (whole[row][~inside] == fill).all()


def test_a_prompt_that_fits_exactly_is_not_changed(processor: Processor):
    """Each of its frames is the largest, so that each has a row."""
    prompt = processor(*CASES["a video of ragged windows"])
    for stacked, single in zip(collate([prompt], prompt.size, 0), prompt, strict=True):
        np.testing.assert_array_equal(stacked[0], single)


@pytest.mark.parametrize("field", Size._fields)
def test_a_prompt_too_large_for_its_bucket_is_an_error_naming_both_sizes(
    processor: Processor, field: str
):
    small, large = (processor(*CASES[name]) for name in ("one frame", "image and video"))
    offered = large.size._asdict()
    bucket = Size(**{**offered, field: offered[field] - 1})
    with pytest.raises(ProcessorError) as error:
        collate([small, large], bucket, 0)
    assert "prompt 1 of the batch" in str(error.value)
    assert str(large.size) in str(error.value)
    assert str(bucket) in str(error.value)


def test_an_empty_batch_is_an_error():
    with pytest.raises(ProcessorError, match="at least one prompt"):
        collate([], Size(1, 0, 0, 0, 0), 0)


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "media"),
    [
        (["video"], []),
        (["video"], [video(2, 28, 28), video(2, 28, 28)]),
        (["no media here"], [image(28, 28)]),
        (["image"], [video(2, 28, 28)]),
        (["image", "video"], [video(2, 28, 28), image(28, 28)]),
        (["video", "what does <|video_pad|> mean?"], [video(2, 28, 28)]),
    ],
)
def test_media_that_do_not_match_the_messages_are_an_error(
    processor: Processor, parts: list[str], media: list[Video | Image]
):
    with pytest.raises(ProcessorError, match="media must match .* in order"):
        processor(messages(*parts), media)


def test_grids_that_do_not_match_the_messages_are_an_error(processor: Processor):
    with pytest.raises(ProcessorError, match="hold 1 images and videos, but 2 grids"):
        processor.size(messages("video"), [Grid(1, 2, 2)] * 2)


def test_a_video_without_frames_is_an_error(processor: Processor):
    with pytest.raises(ProcessorError, match="0 frames"):
        processor(messages("video"), [Video(np.zeros((0, 56, 56, 3), np.uint8), 0.5)])
    with pytest.raises(ProcessorError, match="0 frames"):
        processor.grid((56, 56), 0)


def test_media_without_pixels_are_an_error(processor: Processor):
    with pytest.raises(ProcessorError, match="no pixels"):
        processor(messages("image"), [Image(np.zeros((0, 56, 3), np.uint8))])


def test_an_aspect_ratio_above_200_is_an_error(processor: Processor):
    assert processor.grid((10, 2000), None).w > 0
    with pytest.raises(ProcessorError, match="10 x 2001 pixels have an aspect ratio above 200"):
        processor.grid((10, 2001), None)


@pytest.mark.parametrize(
    "item",
    [
        Image(noise(28, 28).astype(np.float32)),
        Image(noise(28, 28)[..., 0]),
        Image(noise(28, 28).transpose(2, 0, 1)),
        Image(noise(2, 28, 28)),
        Video(noise(28, 28), 0.5),
    ],
)
def test_arrays_of_the_wrong_kind_are_an_error(processor: Processor, item: Video | Image):
    kind = "image" if isinstance(item, Image) else "video"
    with pytest.raises(ProcessorError, match=r"media\[0\] is .*, expected uint8\["):
        processor(messages(kind), [item])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_between_frames_that_is_not_positive_is_an_error(
    processor: Processor, seconds: float
):
    with pytest.raises(ProcessorError, match="seconds per frame"):
        processor(messages("video"), [Video(noise(2, 28, 28), seconds)])


@pytest.mark.parametrize("values", [(0, 10, 10), (20, 10, 10), (5, 10, 0)])
def test_impossible_pixel_limits_are_an_error(values: tuple[int, int, int]):
    with pytest.raises(ProcessorError, match="pixel limits must satisfy"):
        PixelLimits(*values)


def test_a_tokenizer_of_another_model_is_an_error(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "video_token_id": 3}))
    with pytest.raises(ProcessorError, match=r"<\|video_pad\|> has id \d+, but config.json says 3"):
        Processor.load(directory, LIMITS)


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ProcessorError, match="vocab_size of 100"):
        Processor.load(directory, LIMITS)


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Processor.load(directory, LIMITS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.json", "no JSON"),
        ("chat_template.json", '{"chat_template": "{% for"}'),
    ],
)
def test_broken_files_of_the_tokenizer_are_named(tmp_path: Path, name: str, content: str):
    directory = hf.write_model_directory(tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(ProcessorError, match=f"{directory}: the tokenizer's files or the chat"):
        Processor.load(directory, LIMITS)


def test_a_missing_chat_template_is_an_error(tmp_path: Path):
    directory = hf.write_model_directory(tmp_path)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with pytest.raises(ProcessorError, match="no chat template"):
        Processor.load(directory, LIMITS)


# --- In threads and worker processes -------------------------------------------------------------


def assert_equal(left: Prompt, right: Prompt) -> None:
    for name, a, b in zip(Prompt._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_pickled_processor_builds_the_same_prompt(processor: Processor):
    case = CASES["video, image, video"]
    assert_equal(pickle.loads(pickle.dumps(processor))(*case), processor(*case))


def test_threads_share_one_processor(processor: Processor):
    case = CASES["two videos of different sizes"]
    expected = processor(*case)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for prompt in pool.map(lambda _: processor(*case), range(64)):
            assert_equal(prompt, expected)


def test_a_worker_process_imports_neither_torch_nor_jax(processor: Processor, tmp_path: Path):
    # A worker unpickles the processor and runs it on a clip; here in a fresh interpreter.
    (tmp_path / "processor.pickle").write_bytes(pickle.dumps(processor))
    script = """
import pickle, sys
import numpy as np
from models.qwen2_5_vl.processor import (Image, Processor, Video, collate)
processor = pickle.load(open(sys.argv[1], "rb"))
content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What happens?"}]
clip = Video(np.zeros((5, 90, 120, 3), np.uint8), 0.5)
prompt = processor([{"role": "user", "content": content}], [clip, Image(clip.frames[0])])
collate([prompt], prompt.size, processor.pad_id)
processor.decode(processor.encode_completion("yes"))
Processor.load(sys.argv[2], processor.limits)
print(*sorted({"torch", "jax", "tensorflow", "torchvision"} & set(sys.modules)))
"""
    directory = hf.write_model_directory(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "processor.pickle"), str(directory)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
