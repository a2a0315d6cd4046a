"""The committed plans: of every recipe, all of which fit, and of what was promised of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import plans

COMMITTED: dict[str, dict[str, Any]] = json.loads(plans.JSON.read_text())
COMPILED = [case for case in plans.RECIPES if not case.topology.startswith("h100")]
NO_RECIPES = {"quickstart", "cold_start"}


def test_every_recipe_is_planned() -> None:
    recipes = {path.stem for path in (plans.ROOT / "configs").glob("*.yaml")} - NO_RECIPES
    assert {case.name for case in plans.RECIPES} == recipes
    assert set(COMMITTED) == {case.name for case in plans.RECIPES + plans.WEAK_SCALING}
    assert all(plan["fits"] for plan in COMMITTED.values())


def test_all_compiled_plans_are_of_one_compiler() -> None:
    versions = [COMMITTED[case.name]["versions"] for case in COMPILED + plans.WEAK_SCALING]
    assert all(set(found) == {"jax", "jaxlib", "libtpu"} for found in versions)
    assert all(found == versions[0] for found in versions)


@pytest.mark.parametrize("name", [case.name for case in COMPILED])
def test_a_recipe_executes_no_more_products_than_the_formula_counts(name: str) -> None:
    programs = {program["name"]: program for program in COMMITTED[name]["programs"]}
    for part in ("rollout", "reference", "update"):
        ratio = programs[part]["matmul_tflop"] / programs[part]["formula_tflop"]
        assert 0.99 < ratio < 1.1
        assert programs[part]["rematerialised"] == 0


@pytest.mark.parametrize("name", [case.name for case in COMPILED if case.slices > 1])
def test_little_but_the_gradients_crosses_slices(name: str) -> None:
    """What crosses in the update is at most twice a device's share of the gradients, float32."""
    plan = COMMITTED[name]
    for program in plan["programs"]:
        between = sum(t["result_gib"] for t in program["transfers"] if t["crosses_slices"])
        weights = 7.6e9 if name.startswith("7b") else 3.8e9
        share = 4 * weights / (plan["devices"] // plan["slices"]) / 2**30
        assert between < (2 * share if program["name"] == "update" else 0.01)


def test_work_memory_and_traffic_per_chip_do_not_grow_with_the_chips() -> None:
    found = [COMMITTED[case.name] for case in plans.WEAK_SCALING]
    assert [plan["devices"] for plan in found] == [64, 256, 1024, 4096]
    for plan in found[1:]:
        for mine, first in zip(plan["programs"], found[0]["programs"], strict=True):
            assert mine["matmul_tflop"] == pytest.approx(first["matmul_tflop"], rel=0.001)
        most = max(plan["phases_gib"].values())
        assert most == pytest.approx(max(found[0]["phases_gib"].values()), rel=0.01)
    traffic = [sum(t["result_gib"] for x in p["programs"] for t in x["transfers"]) for p in found]
    assert max(traffic[1:]) < 1.01 * min(traffic[1:]) < 1.01 * traffic[0]


def test_the_table_is_that_of_the_plans(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "JSON", tmp_path / "plans.json")
    monkeypatch.setattr(plans, "TABLE", tmp_path / "plans.md")
    committed = plans.HERE / "plans.md"
    plans.write(COMMITTED)
    assert (tmp_path / "plans.md").read_text() == committed.read_text()
