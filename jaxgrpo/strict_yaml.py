"""Strict reading: YAML text and `a.b=value` overrides into a tree of dataclasses.

The dataclasses' annotations are the schema: bool, int, float, str, `Literal` of texts, `T | None`,
`tuple[T, ...]` and nested dataclasses (an absent one is built from its defaults). Whatever does not
fit is a `ConfigError` that names the key, what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be run, or cannot resume the run it names."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse(text: str | bytes, source: str) -> Any:
    """The plain values of a YAML document; `source` names it in errors.

    Raises:
      ConfigError: it is not valid YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def override(raw: dict[str, Any], assignment: str) -> None:
    """Sets one `a.b=value`, the value being YAML, in the nested plain values, in place.

    Raises:
      ConfigError: it is not of that form.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"{assignment!r} is not an override: expected key=value, as in seed=1")
    *sections, name = key.split(".")
    level = raw
    for section in sections:
        inner = level.get(section)
        if inner is None:  # absent, or a section whose keys are all commented out
            inner = level[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{assignment!r}: {section} is a value, it has no keys")
        level = inner
    level[name] = parse(text, f"the value of {assignment!r}")


def build(cls: type, raw: Mapping[str, Any], source: str) -> Any:
    """An instance of the dataclass `cls` from nested plain values.

    Raises:
      ConfigError: all unknown keys, missing keys, wrong types and values out of range (a
        `ConfigError` raised by a `__post_init__`), one a line.
    """
    problems: list[str] = []
    result = _section(cls, raw, "", problems)
    if problems:
        start = f"{source}:\n  " if len(problems) > 1 else f"{source}: "
        raise ConfigError(start + "\n  ".join(problems))
    return result


def plain(value: Any) -> Any:
    """The way back: dataclasses as dicts, tuples as lists, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value):
        return {item.name: plain(value.__dict__[item.name]) for item in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _section(cls: type, raw: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of `cls`, or None and lines in `problems`."""
    if raw is None:  # a section whose keys are all commented out
        raw = {}
    if not isinstance(raw, Mapping):
        problems.append(f"{prefix.rstrip('.')} is {_describe(raw)}, expected a section of keys")
        return None
    hints = typing.get_type_hints(cls)
    problems += [_unknown(key, prefix, list(hints)) for key in raw if key not in hints]
    before = len(problems)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        key = prefix + item.name
        if item.name in raw or dataclasses.is_dataclass(hints[item.name]):
            values[item.name] = _value(hints[item.name], raw.get(item.name), key, problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(f"{key} is missing: it has no default")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _value(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as the type `hint`, or None and a line in `problems`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # T | None; the second if T is a Literal
        return None if value is None else _value(arguments[0], value, key, problems)
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, f"{key}.", problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(
            _value(arguments[0], item, f"{key}[{number}]", problems)
            for number, item in enumerate(value)
        )
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        expected = " or ".join(arguments) + _nearest(str(value), arguments)
    elif origin is tuple:
        expected = "a list, for example [1, 2]"
    elif hint is float:
        number = _as_float(value)
        if number is not None:
            return number
        expected = "a finite number"
    elif type(value) is hint:  # not isinstance: a bool is no int here
        return value
    else:
        quoted = "" if isinstance(value, (dict, list)) else f', as in "{value}"'
        if value is None:  # what YAML makes of key= and, behind a shell, of key=""
            quoted = f'; "" stands for none, on the command line {key}=\'""\''
        expected = {int: "a whole number", bool: "true or false", str: f"text{quoted}"}[hint]
    problems.append(f"{key} is {_describe(value)}, expected {expected}")
    return None


def _as_float(value: Any) -> float | None:
    """Accepts whole numbers, and text such as "1e-6", which YAML 1.1 does not read as a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _unknown(key: Any, prefix: str, known: Sequence[str]) -> str:
    return f"unknown key {prefix}{key}{_nearest(str(key), known)}; known here: {', '.join(known)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _describe(value: Any) -> str:
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    kinds = {int: "the number", float: "the number", str: "the text", dict: "the section"}
    return f"{kinds.get(type(value), f'a {type(value).__name__}')} {value!r}"
