"""`jaxgrpo inspect`: one whole inspection of data with something wrong of each kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from data.records import read_manifest, write_manifest
from jaxgrpo import cli
from jaxgrpo.inputs import Inputs, prepare, prompt_loader
from jaxgrpo.inspection.main import prompt_text
from jaxgrpo.load import open_processor
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def manifest(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's questions, a cut video first, and five with something wrong."""
    records = read_manifest(place.clips / "mixed.jsonl", place.clips)
    cut = next(record for record in records if record.id == "cut")
    whole = [record for record in records if record.id != "cut"]
    when = next(record for record in whole if record.task == "tvg")
    which = next(record for record in whole if record.task == "mcqa")
    wrong = [
        dataclasses.replace(when, id="two spans", spans=((0.0, 1.0), (2.0, 3.0))),
        dataclasses.replace(when, id="outside", spans=((100.0, 101.0),), duration=None),
        dataclasses.replace(which, id="markup", question="<script>alert('&')</script>?"),
        dataclasses.replace(which, id="long", question="Which color appears first? " * 30),
    ]
    path = tmp_path_factory.mktemp("manifest") / "train.jsonl"
    write_manifest(path, [cut, *whole, *wrong])
    return path


class Report(NamedTuple):
    code: int
    printed: str
    folder: Path
    figures: dict[str, Any]


def inspected(
    place: Workplace, manifest: Path, out: Path, capsys: Any, *options: str
) -> tuple[int, str, str]:
    arguments = [str(place.config), "run_dir=unused", f"data.train={manifest}", *options]
    code = cli.main(["inspect", "--out", str(out), *arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def report(place: Workplace, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        arguments = [str(place.config), "run_dir=unused", f"data.train={manifest}", "train.steps=2"]
        code = cli.main(["inspect", "--out", str(folder), "--show", "markup", *arguments])
    figures = json.loads((folder / "inspect.json").read_text())
    return Report(code, "\n".join(lines), folder, figures)


@pytest.fixture(scope="module")
def inputs(place: Workplace, manifest: Path) -> Inputs:
    """What training makes of the same data, once it has a bucket for the longest prompt."""
    config = tiny_run.load_config(place, f"data.train={manifest}", "data.buckets=[104, 1000]")
    return prepare(config, open_processor(config), train=True, evaluation=True)


# ---- the verdict ----


def test_data_that_training_would_refuse_is_a_mistake_with_the_mend(report: Report) -> None:
    assert report.code == 2 and not report.figures["trainable"]
    assert report.printed.count("verdict: CANNOT be trained on yet: 1 problem to mend") == 1
    [problem] = report.figures["problems"]
    [long] = report.figures["train"]["overflows"]
    assert long["id"] == "long" and long["over"] == long["tokens"] - 104
    assert f"of 104 tokens, is too small for 1 prompt: long by {long['over']} tokens" in problem
    assert f"add a bucket of {long['tokens']} to data.buckets" in problem
    assert "next: mend the problems above" in report.printed


def test_the_mend_mends_and_the_next_command_is_named(
    place: Workplace, manifest: Path, report: Report, tmp_path: Path, capsys: Any
) -> None:
    [long] = report.figures["train"]["overflows"]
    mend = f"data.buckets=[104, {long['tokens']}]"
    code, out, _ = inspected(place, manifest, tmp_path / "out", capsys, mend)
    assert code == 0
    assert "verdict: can be trained on, " in out and "next: jaxgrpo train CONFIG" in out


@pytest.mark.parametrize(
    "told",
    [
        "data.train: 1 of 18 items left out, their videos cannot be used (1 unreadable): notes",
        "do not earn the most that the reward gives: two spans (0.833 of 1: format 1, iou 0.667)",
        "data.train: 1 true span beyond the end of the video: outside (100-101 s of ",
        "data.train: cut cannot be decoded: truncated: ",
        "data.train: 8 of 16 items are never drawn in train.steps=2 of 4 prompts",
    ],
)
def test_what_training_goes_on_with_is_a_warning(report: Report, told: str) -> None:
    assert told in report.printed
    assert sum(told in warning for warning in report.figures["warnings"]) == 1


# ---- the figures ----


def test_the_figures_are_those_of_training(report: Report, inputs: Inputs) -> None:
    for key, dataset in (("train", inputs.train), ("evaluation", inputs.evaluation)):
        found = report.figures[key]
        assert dataset is not None
        fits = [size for size in dataset.sizes if size.tokens <= 104]
        assert found["items"] == len(fits) == sum(part["items"] for part in found["parts"])
        tokens = found["columns"]["prompt (tokens)"]
        assert tokens["least"] == min(size.tokens for size in fits)
        assert tokens["most"] == max(size.tokens for size in fits)
        assert sum(tokens["counts"]) == len(fits)
        assert found["buckets"][0]["token_ratio"] == 104 * len(fits) / sum(s.tokens for s in fits)
    assert report.figures["train"]["questions"] == 18
    assert report.figures["evaluation"]["steps"] is None


def test_only_the_figures_go_to_stdout_for_programs(
    place: Workplace, manifest: Path, tmp_path: Path, capsys: Any
) -> None:
    code, out, _ = inspected(place, manifest, tmp_path / "out", capsys, "--json")
    assert code == 2
    assert json.loads(out) == json.loads((tmp_path / "out" / "inspect.json").read_text())


# ---- what is shown ----


def test_one_item_of_each_task_is_shown_and_those_asked_for(report: Report) -> None:
    shown = [(item["task"], item["id"]) for item in report.figures["shown"]]
    assert {task for task, _ in shown} == {"mcqa", "tvg", "gqa"}
    assert ("mcqa", "markup") in shown
    assert ("tvg", "cut") not in shown  # another one stands for its task
    assert len(shown) == 3 + 1
    for item in report.figures["shown"]:
        with Image.open(report.folder / item["picture"]) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100


def test_the_prompt_is_shown_as_its_tokens_are(
    place: Workplace, report: Report, inputs: Inputs
) -> None:
    assert inputs.train is not None
    data = tiny_run.load_config(place).data
    [shown] = [item for item in report.figures["shown"] if item["id"] == "markup"]
    item = [record.id for record in inputs.train.records].index("markup")
    prompt = prompt_loader(inputs, inputs.train, data)(item)
    assert prompt_text(prompt, inputs.processor) == shown["prompt"]
    pads = int(np.count_nonzero(prompt.tokens == inputs.processor.config.video_token_id))
    short, pad = f"<|video_pad|> x {pads}<|vision_end|>", "<|video_pad|>"
    assert short in shown["prompt"] and "<script>alert('&')</script>?" in shown["prompt"]
    whole = shown["prompt"].replace(short, pad * pads + "<|vision_end|>")
    again = inputs.processor.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False)
    assert again.ids == prompt.tokens.tolist()


def test_the_page_needs_no_scripts_and_shows_markup_as_text(report: Report) -> None:
    page = (report.folder / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page
    for file in report.folder.glob("*.png"):
        assert f'src="{file.name}"' in page
    assert f"wrote {report.folder / 'index.html'}" in report.printed


# ---- where it is written ----


def test_a_folder_of_something_else_is_left_alone(
    place: Workplace, manifest: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, told = inspected(place, manifest, tmp_path, capsys)
    assert code == 2 and "holds files but no inspect.json of an earlier inspection" in told
    code = cli.main(["inspect", "--out=gs://bucket/a", str(place.config), "run_dir=unused"])
    assert code == 2 and "--out gs://bucket/a: expected a local folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_earlier_report_is_replaced_and_lies_beside_the_run(
    place: Workplace, report: Report, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "runs" / "a"
    arguments = [str(place.config), f"run_dir={run}"]
    folder = tmp_path / "runs" / "a-inspect"
    folder.mkdir(parents=True)
    for name in ("inspect.json", "item-7-mcqa.png"):
        (folder / name).write_text("of an earlier report")
    assert cli.main(["inspect", *arguments]) == 0
    assert json.loads((folder / "inspect.json").read_text())["trainable"]
    assert not (folder / "item-7-mcqa.png").exists()
    assert (folder / "index.html").is_file()
    assert not run.exists()


def test_an_item_that_is_not_there_cannot_be_shown(
    place: Workplace, manifest: Path, tmp_path: Path, capsys: Any
) -> None:
    code, _, told = inspected(place, manifest, tmp_path / "out", capsys, "--show=notes")
    assert code == 2 and "--show notes: data.train has no such item that can be read" in told
    assert not (tmp_path / "out").exists()
