"""`jaxgrpo convert`: a manifest, its rejected rows, and what is told about them."""

from __future__ import annotations

import io
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.convert.reading import ConvertError
from data.records import read_manifest
from jaxgrpo import cli, convert
from tests.data.convert.files import json_file

ROW = {"video": "a.mp4", "problem": "p", "solution": [0.1, 0.5], "video_length": 10}
CHOICE = {"question": "q", "candidates": ["x", "y"], "answer": "y", "video": "a.mp4"}

# A good file and a bad row of each kind, and the options that are needed.
SMALLEST: dict[str, tuple[str, str, list[str]]] = {
    "temporal-r1": (json.dumps([ROW, 1]), "tvg", []),
    "video-r1": (
        json.dumps(
            [
                {
                    "problem_id": 1,
                    "problem": "p",
                    "data_type": "video",
                    "problem_type": "multiple choice",
                    "options": ["A. x", "B. y"],
                    "solution": "<answer>B</answer>",
                    "path": "a.mp4",
                },
                1,
            ]
        ),
        "mcqa",
        [],
    ),
    "charades-sta": ("a 0.0 6.9##s\nb", "tvg", ["--durations", "side.csv"]),
    "activitynet-captions": (
        json.dumps({"a": {"duration": 9, "timestamps": [[1, 2]], "sentences": ["s"]}, "b": 1}),
        "tvg",
        [],
    ),
    "next-gqa": (
        "video_id,question,answer,qid,a0,a1,a2,a3,a4\nv,q,x,0,x,y,z,w,u\nb\n",
        "gqa",
        ["--spans", "gsub.json", "--paths", "map.json"],
    ),
    "mvbench": (json.dumps([CHOICE, 1]), "mcqa", []),
    "video-mme": (
        json.dumps([{"videoID": "a", "question": "q", "options": ["x", "y"], "answer": "B"}, 1]),
        "mcqa",
        [],
    ),
    "tempcompass": (
        json.dumps({"a": {"speed": [{"question": "q\nA. x\nB. y", "answer": "B. y"}]}, "b": 1}),
        "mcqa",
        [],
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "side.csv").write_text("id,length\na,12.5\n")
    json_file(tmp_path / "gsub.json", {"v": {"duration": 9, "location": {"0": [[1, 2]]}}})
    json_file(tmp_path / "map.json", {"v": "a"})
    return tmp_path


def test_every_kind_is_tested() -> None:
    assert SMALLEST.keys() == cli._KINDS.keys()


@pytest.mark.parametrize("kind", SMALLEST)
def test_a_kind_becomes_a_manifest_and_rejected_rows(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, task, options = SMALLEST[kind]
    (folder / "in").write_text(content)
    videos = "clips/{id}" if ".mp4" in content else "clips/{id}.mp4"
    assert cli.main(["convert", kind, "in", "out.jsonl", "--videos", videos, *options]) == 0
    [record] = read_manifest("out.jsonl", "videos")
    assert (record.task, record.video) == (task, "clips/a.mp4")
    [rejected] = (folder / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(rejected).keys() == {"source", "reason", "detail", "row"}
    told = capsys.readouterr().out
    assert told.startswith(f"{kind}: 2 rows read, 1 written\n  rejected 1: ")
    assert "wrote out.jsonl, and the rejected rows to out.rejects.jsonl" in told


def test_several_files_become_one_manifest(folder: Path) -> None:
    for name in ("a.json", "b.json"):
        json_file(folder / name, [{**CHOICE, "video": f"{name}.mp4"}])
    assert cli.main(["convert", "mvbench", "a.json", "b.json", "out.jsonl"]) == 0
    assert [record.id for record in read_manifest("out.jsonl", ".")] == ["a-a.json", "b-b.json"]


# ---- the YAML of Temporal-R1 ----


def entries(folder: Path, *lines: str) -> None:
    (folder / "in").mkdir()
    for name in ("a.json", "b.json"):
        json_file(folder / "in" / name, [{**ROW, "video": f"{i}.mp4"} for i in range(4)])
    (folder / "in" / "data.yaml").write_text("datasets:\n" + "\n".join(f"  - {x}" for x in lines))


def test_a_yaml_file_joins_datasets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries(
        folder,
        f"{{json_path: a.json, data_folder: {folder}/videos/a, sampling_strategy: 'first:1'}}",
        f"{{json_path: {folder}/in/b.json, data_folder: b, sampling_strategy: 'random:50%'}}",
    )
    command = ["convert", "temporal-r1", "in/data.yaml", "out.jsonl", "--root", "videos"]
    assert cli.main([*command, "--seed", "3"]) == 0
    videos = [record.video for record in read_manifest("out.jsonl", "videos")]
    assert videos[0] == "a/0.mp4" and len(videos) == 3
    assert all(video.startswith("b/") for video in videos[1:])
    told = capsys.readouterr().out
    assert "8 rows read, 3 written" in told
    assert "left out 3: not in sampling_strategy first:1 of" in told


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{json_path: a.json, sampling: all}", "unknown key datasets[0].sampling"),
        ("{data_folder: a}", "datasets[0].json_path is missing"),
        ("{json_path: a.json, data_folder: /elsewhere}", "is not below --root ."),
        ("{json_path: gone.json}", "gone.json: cannot be read"),
        ("{json_path: a.json, sampling_strategy: 'last:2'}", "sampling_strategy is 'last:2'"),
        ("{json_path: a.json, data_folder: ..}", "not one below the root"),
    ],
)
def test_a_mistake_in_the_yaml_is_named(
    line: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries(folder, line)
    assert cli.main(["convert", "temporal-r1", "in/data.yaml", "out.jsonl"]) == 2
    assert expected in capsys.readouterr().err


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mvbench", "in.json", "other.json"], "OUT is other.json, expected a manifest"),
        (["mvbench", "in.json", "in.jsonl"], "in.jsonl exists"),
        (["mvbench", "in.json", "gs://bucket/out.jsonl"], "write to a local folder"),
        (["mvbench", "gone.json", "out.jsonl"], "gone.json: cannot be read"),
        (["mvbench", "in.json", "out.jsonl", "--videos", "x"], "--videos is 'x'"),
        (["tempcompass", "in.json", "out.jsonl"], "expected a JSON object"),
        (["temporal-r1", "in.json", "out.jsonl"], "none of the 1 rows can be used"),
        (["temporal-r1", "in.yaml", "out.jsonl"], "expected `datasets:` and a list"),
    ],
)
def test_a_mistake_is_told_and_writes_no_manifest(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file(folder / "in.json", [CHOICE])
    (folder / "in.jsonl").write_text("mine\n")
    (folder / "in.yaml").write_text("a: 1\n")
    assert cli.main(["convert", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (folder / "out.jsonl").exists() and (folder / "in.jsonl").read_text() == "mine\n"


def test_an_option_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "mvbench", "in.json", "out.jsonl", "--durations", "a.csv"])
    assert "unrecognized arguments: --durations" in capsys.readouterr().err


def test_the_command_line_and_this_module_know_the_same_kinds(folder: Path) -> None:
    (folder / "in").write_text("")
    for kind in cli._KINDS:
        with pytest.raises(ValueError):  # no rows, or no JSON; not an AssertionError
            convert.main(kind, ["in"], "out.jsonl", {"root": ".", "seed": 0})


# ---- damage ----

JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    "",
    "\ud800",
    "a\0b",
    [],
    {},
    [[]],
    "../x",
    "A",
    10**30,
]
JUNK += [[1, 2, 3], [5, 1], "<think>", "A. x\nB. y", float("nan"), float("inf"), {"a": "b"}]


def damaged(value: Any, chance: random.Random) -> Any:
    """The value with parts of it replaced, doubled or missing."""
    if chance.random() < 0.1:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {k: damaged(v, chance) for k, v in value.items() if chance.random() > 0.04}
    if isinstance(value, list):
        kept = [damaged(item, chance) for item in value if chance.random() > 0.04]
        return kept * chance.choice([1, 1, 1, 2])
    return value


@pytest.mark.parametrize("kind", [kind for kind, (text, *_) in SMALLEST.items() if text[0] in "[{"])
def test_whatever_is_damaged_every_row_is_written_or_rejected(kind: str, folder: Path) -> None:
    chance, outcomes = random.Random(kind), set()
    whole = json.loads(SMALLEST[kind][0])
    for number in range(150):
        json_file(folder / "in", damaged(whole, chance))
        try:
            done = convert._convert(kind, [folder / "in"], {"root": ".", "seed": 0})
        except ConvertError:
            outcomes.add("refused")
            continue
        assert done.read == len(done.records) + len(done.rejected)
        outcomes |= {"written"} if done.records else {"rejected"}
        if done.records:
            done.write(folder / f"{number}.jsonl")
            assert read_manifest(folder / f"{number}.jsonl", folder) == done.records
    assert outcomes == {"refused", "written", "rejected"}


def test_a_key_that_is_no_unicode_is_named_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"duration": 9, "timestamps": [[1, 2]], "sentences": ["s"]}
    json_file(folder / "in", {"v_a": entry, "\ud800": 1})
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["convert", "activitynet-captions", "in", "out.jsonl"]) == 0
    out.seek(0)
    assert "the first: in: \\ud800" in out.read()


# ---- docs ----


def test_the_commands_in_the_docs_are_valid_and_name_every_kind() -> None:
    text = (Path(cli.__file__).parents[1] / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(x)[1:] for x in text.splitlines() if x.startswith("jaxgrpo convert ")]
    parsed = [cli._parser().parse_args(command) for command in commands]
    assert [options.kind for options in parsed] == list(cli._KINDS)
    assert all(options.out.endswith(".jsonl") for options in parsed)
