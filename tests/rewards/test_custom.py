"""A user's own reward: found, tried before it is needed, and never trusted in silence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.records import Record
from rewards.custom import CustomReward
from rewards.options import Custom
from rewards.parse import RewardError

SHORT = """
def short(completions):
    return [1.0 if c.tokens < 10 else 0.25 for c in completions]
"""
MIDDLE = """
import jax.numpy as jnp

def middle(answers, truth):
    return jnp.where(answers.span[..., 0] > 1, 1.0, 0.0) * answers.format_ok
"""
RECORD = Record("r7", "a.mp4", "ocr", "What?", (), "Stop", (), None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A user's folder; what was imported from it is forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(sys.modules[name].__dict__.get("__file__")):
            del sys.modules[name]


def load(
    folder: Path, code: str, kind: str = "host", name: str = "mine", **fields: Any
) -> CustomReward:
    (folder / f"{name}.py").write_text(code)
    function = fields.pop("function", None) or code.split("def ")[1].split("(")[0]
    spec = Custom(f"{name}:{function}", kind, folder=str(folder), **fields)
    return CustomReward(spec, thinking=True)


def test_a_host_function_sees_every_completion_in_order(folder: Path) -> None:
    code = """
def told(completions):
    return [len(c.text) / 100 + (c.record.id == "r7") * c.tokens / 1000 for c in completions]
"""
    reward = load(folder, code)
    found = reward.on_host([["ab", "abc"]], [RECORD], np.array([[1, 2]]))
    assert found.dtype == np.float32 and found.shape == (1, 2)
    np.testing.assert_allclose(found, [[0.021, 0.032]], rtol=1e-6)


def test_a_host_function_gets_what_the_parser_read(folder: Path) -> None:
    code = (
        "def read(completions):\n    return [float(c.answer.text == 'Stop') for c in completions]"
    )
    text = "<think></think><answer>Stop</answer>"
    found = load(folder, code).on_host([[text, "Stop"]], [RECORD], np.ones((1, 2)))
    np.testing.assert_array_equal(found, [[1, 0]])


def test_a_jitted_function_is_traced(folder: Path) -> None:
    reward = load(folder, MIDDLE, "jitted")
    assert reward.spec.function == "mine:middle"


def test_the_folder_is_appended_and_shadows_nothing(folder: Path) -> None:
    before = list(sys.path)
    (folder / "json.py").write_text("raise SystemExit('a user file was imported as json')")
    load(folder, SHORT)
    assert sys.path == [*before, str(folder)]
    with pytest.raises(RewardError, match=r"expected a function 'short' in .*json.*rename yours"):
        load(folder, SHORT, name="json", function="short")


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("x = 1\ndef f(c): return", "host", "returned None; expected 14 numbers"),
        ("def f(c): return [0.5]", "host", r"returned \[0.5\]; expected 14 numbers"),
        ("def f(c): return ['a'] * len(c)", "host", "returned .*'a'.*expected 14 numbers"),
        ("def f(c): return ['0.5'] * len(c)", "host", "returned .*'0.5'.*expected 14 numbers"),
        ("def f(c): return [10**400] * len(c)", "host", "returned .*1000.*expected 14 numbers"),
        ("def f(c): raise SystemExit(0)", "host", "raised SystemExit: 0"),
        ("def f(c):\n c.sort()\n return [0.5] * len(c)", "host", "raised AttributeError: 'tuple'"),
        ("def f(c): return [float('nan')] * len(c)", "host", "nan for .*'sample-mcqa'.*0.0 to 1.0"),
        ("def f(c): return [2.0] * len(c)", "host", "returned 2.0 for a completion.*low and high"),
        ("def f(c): return [-1e-3] * len(c)", "host", "returned -0.001"),
        ("def f(c): return 1 / 0", "host", "raised ZeroDivisionError: division by zero"),
        ("def f(): return 1", "host", "raised TypeError"),
        ("n = []\ndef f(c):\n n.append(1)\n return [1 / len(n)] * len(c)", "host", "called again"),
        ("def f(a, t): return 1.0", "jitted", r"returned 1.0; expected a float32.*\(7, 2\)"),
        ("def f(a, t): return a.span", "jitted", r"returned float32 of shape \(7, 2, 2\)"),
        ("def f(a, t): return a.choice", "jitted", r"returned int32 of shape \(7, 2\)"),
        ("def f(a, t): return a.number", "jitted", "returned nan in .* of 14; expected finite"),
        ("def f(a, t): return a.match + 1", "jitted", "returned 2.0 in 3 of 14"),
        ("def f(a, t):\n if a.match.sum() > 0: return a.match", "jitted", "raised Tracer"),
    ],
)
def test_a_broken_contract_is_named_before_the_run_begins(
    folder: Path, code: str, kind: str, says: str
) -> None:
    with pytest.raises(RewardError, match=f"reward.custom.function mine:f .*{says}"):
        load(folder, code, kind, function="f")


def test_a_function_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(RewardError, match="importing 'nowhere_at_all' raised ModuleNotFound"):
        CustomReward(Custom("nowhere_at_all:f", "host", folder=str(folder)), thinking=True)
    with pytest.raises(RewardError, match="expected a function 'long' in .*mine.py, found none"):
        load(folder, SHORT, function="long")
    with pytest.raises(RewardError, match="importing 'broken' raised SyntaxError"):
        load(folder, "def f(:", name="broken", function="f")
    with pytest.raises(RewardError, match="importing 'leaving' raised SystemExit"):
        load(folder, "raise SystemExit(0)", name="leaving", function="f")


def test_bounds_are_the_users(folder: Path) -> None:
    code = "def f(c): return [-2.0] * len(c)"
    found = load(folder, code, low=-2.0).on_host([["x"]], [RECORD], np.ones((1, 1)))
    np.testing.assert_array_equal(found, [[-2]])


def test_what_breaks_later_names_the_record(folder: Path) -> None:
    code = "def f(c): return [float('inf') if x.text == 'bad' else 0.0 for x in c]"
    reward = load(folder, code)
    with pytest.raises(RewardError, match="returned inf for a completion of record 'r7', 'bad'"):
        reward.on_host([["good", "bad"]], [RECORD], np.ones((1, 2)))


def test_values_from_the_device_are_checked(folder: Path) -> None:
    reward = load(folder, MIDDLE, "jitted")
    reward.check(np.float32([[0, 1]]))
    with pytest.raises(RewardError, match="returned nan in 1 of 2; expected finite numbers"):
        reward.check(np.float32([[0, np.nan]]))
