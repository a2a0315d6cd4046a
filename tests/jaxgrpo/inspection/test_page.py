"""The report for people."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from jaxgrpo import config
from jaxgrpo.inspection.main import Inspection, Shown
from jaxgrpo.inspection.page import histograms, page, summary
from jaxgrpo.inspection.right_answers import Short
from jaxgrpo.inspection.survey import Bad, Bucket, Column, Outside, Overflow
from tests.jaxgrpo.inspection.surveys import ANSWERS, a_survey

CONFIG = config.from_dict({"run_dir": "r<u>n", "model": {"path": "m"}, "data": {"train": "t"}})
HOSTILE = "<img src=x onerror=alert(1)>\"'&"
SHOWN = Shown(
    id=HOSTILE,
    task="mcqa",
    video=HOSTILE,
    question=HOSTILE,
    options=(HOSTILE, "b"),
    truth=HOSTILE,
    prompt=f"<|im_start|>{HOSTILE}\nsecond line",
    right_completion="<answer>A</answer>",
    frames=4,
    frame_size="28 x 28",
    times=(0.0, 1.0, 2.0, 3.0),
    seconds_per_frame=1.0,
    picture="item-0-mcqa.png",
)
TROUBLE = a_survey(
    bad=tuple(Bad(f"{HOSTILE}{i}", "empty", HOSTILE) for i in range(300)),
    overflows=(Overflow(HOSTILE, 200, 100, 72),),
    outside=(Outside(HOSTILE, (1.0, 2.0), 1.0),),
    answers=ANSWERS.__class__(0.9, 0.0, (Short(HOSTILE, 0.5, 1.0, {"iou": 0.0}),), {}, 64, {}),
    buckets=(*a_survey().buckets, Bucket(512, 0, None, None, None, 0)),
)
EVALUATED = a_survey(steps=None, buckets=(Bucket(128, 20, 100.0, 1.28, 1.1, None),))
FOUND = Inspection((f"problem {HOSTILE}",), (), TROUBLE, EVALUATED, (SHOWN,))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whatever_users_wrote_is_text_on_the_page() -> None:
    found = Tags(page(FOUND, CONFIG, "figures.png"))
    pictures = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert pictures == ["figures.png", "item-0-mcqa.png"]
    assert not [tag for tag, _ in found.tags if tag in ("script", "u", "answer")]
    assert SHOWN.prompt in found.text and "<answer>A</answer>" in found.text
    assert found.text.count(HOSTILE) > 10


def test_a_long_list_is_cut_on_the_page() -> None:
    found = Tags(page(FOUND, CONFIG, "figures.png"))
    assert f"{HOSTILE}199" in found.text and f"{HOSTILE}299" not in found.text
    assert found.text.count("more, in inspect.json") == 1
    assert "and 100 more, in inspect.json" in found.text


def test_the_summary_says_what_is_wrong_first() -> None:
    lines = summary(FOUND).splitlines()
    assert lines[0] == "verdict: CANNOT be trained on yet: 1 problem to mend"
    assert lines[1] == f"problem: problem {HOSTILE}"
    text = "\n".join(lines)
    assert "training data: 20 items, without 300 videos that cannot be used, 1 prompts too" in text
    assert "evaluation data: 20 items\n" in text
    assert "bucket of 512 tokens: empty" in text
    assert "  | second line" in text
    assert "(19 of 20 the most there is)" in text


def test_steps_and_weights_are_of_training_only() -> None:
    trained, evaluated = summary(FOUND).split("evaluation data")
    for told in ("weight 1", "steps an epoch", "epochs"):
        assert told in trained and told not in evaluated


def test_the_histograms_are_one_picture_whatever_the_data_is_like() -> None:
    one_value = Column(8.0, 8.0, 8.0, 8.0, (7.5, 8.5), (20,))
    many = {f"{i} x {i}": 30 - i for i in range(1, 20)}
    alike = a_survey(columns={"frame rate": one_value}, resolutions=many)
    for part in (alike, TROUBLE):
        with Image.open(io.BytesIO(histograms(part))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape == (700, 1400, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
