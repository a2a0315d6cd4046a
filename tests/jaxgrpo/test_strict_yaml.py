"""Reading YAML into dataclasses, strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from jaxgrpo.strict_yaml import ConfigError, build, override, parse, plain


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"inner.rate is {self.rate}, expected 0 or more")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def read(text: str) -> Outer:
    result: Outer = build(Outer, parse(text, "run.yaml"), "run.yaml")
    return result


def message(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


def test_what_is_not_given_keeps_its_default() -> None:
    assert read("name: a") == Outer("a")


def test_every_type_is_read() -> None:
    text = "{name: a, count: 3, flag: true, limit: 4, inner: {rate: 2, mode: slow, sizes: [5]}}"
    assert read(text) == Outer("a", 3, True, 4, Inner(2.0, "slow", (5,)))


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001"])
def test_a_number_may_be_written_as_yaml_1_1_does_not_know_it(text: str) -> None:
    assert read(f"{{name: a, inner: {{rate: {text}}}}}").inner.rate == 1e-6


def test_a_section_whose_keys_are_all_commented_out_is_its_defaults() -> None:
    assert read("name: a\ninner:\n  # rate: 3\n") == Outer("a")


def test_an_optional_section_is_none_until_given() -> None:
    assert read("name: a").extra is None
    assert read("{name: a, extra: null}").extra is None
    assert read("{name: a, extra: {}}").extra == Inner()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{name: a, count: true}", "count is true, expected a whole number"),
        ("{name: a, count: 1.5}", "count is the number 1.5, expected a whole number"),
        ("{name: a, count: null}", r"count is empty (null), expected a whole number"),
        ("{name: a, flag: 1}", "flag is the number 1, expected true or false"),
        ("name:", 'name is empty (null), expected text; "" stands for none, on the command '),
        ("{name: 3}", 'name is the number 3, expected text, as in "3"'),
        ("{name: a, inner: {rate: fast}}", "inner.rate is the text 'fast', expected a finite"),
        ("{name: a, inner: {rate: .inf}}", "inner.rate is the number inf, expected a finite"),
        ("{name: a, inner: {rate: yes}}", "inner.rate is true, expected a finite number"),
        ("{name: a, inner: {sizes: 3}}", "inner.sizes is the number 3, expected a list"),
        ("{name: a, inner: {sizes: [1, x]}}", "inner.sizes[1] is the text 'x', expected a whole"),
        ("{name: a, inner: 3}", "inner is the number 3, expected a section of keys"),
        ("{name: a, inner: {mode: fats}}", "expected fast or slow (did you mean 'fast'?)"),
        ("{count: 1}", "name is missing: it has no default"),
        ("{name: a, cuont: 1}", "unknown key cuont (did you mean 'count'?); known here: name, c"),
        ("{name: a, inner: {rat: 1}}", "unknown key inner.rat (did you mean 'rate'?)"),
        ("{name: a, inner: {rate: -1}}", "inner.rate is -1.0, expected 0 or more"),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("name: [", "run.yaml is not valid YAML"),
    ],
)
def test_a_mistake_names_the_key_what_was_found_and_what_was_expected(
    text: str, expected: str
) -> None:
    assert expected in message(text)
    assert message(text).startswith("run.yaml")


def test_all_mistakes_are_told_at_once() -> None:
    lines = message("{count: x, inner: {rate: -1, mod: fast}}").splitlines()
    assert lines[0] == "run.yaml:"
    assert [line.split()[0] for line in lines[1:]] == ["name", "count", "unknown", "inner.rate"]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["count=3"], {"count": 3, "inner": None}),
        (["inner.rate=1e-3", "inner.mode=slow"], {"inner": {"rate": "1e-3", "mode": "slow"}}),
        (["inner={rate: 2}", "inner.mode=slow"], {"inner": {"rate": 2, "mode": "slow"}}),
        (["name=a=b"], {"name": "a=b", "inner": None}),
        (["name="], {"name": None, "inner": None}),
    ],
)
def test_an_override_sets_one_key_however_deep(
    assignments: list[str], expected: dict[str, Any]
) -> None:
    raw: dict[str, Any] = {"inner": None}
    for assignment in assignments:
        override(raw, assignment)
    assert raw == expected


@pytest.mark.parametrize("assignment", ["count", "=3", "--count"])
def test_what_is_not_an_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="is not an override: expected key=value"):
        override({}, assignment)


def test_a_value_has_no_keys() -> None:
    with pytest.raises(ConfigError, match="name is a value, it has no keys"):
        override({"name": "a"}, "name.x=1")


def test_plain_is_the_way_back() -> None:
    outer = Outer("a", extra=Inner(sizes=(7,)))
    assert plain(outer)["extra"] == {"rate": 0.5, "mode": "fast", "sizes": [7]}
    assert build(Outer, plain(outer), "again") == outer
