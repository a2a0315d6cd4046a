"""A plan of a real model's widths, with two layers, for a TPU slice that is not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxgrpo import hlo
from jaxgrpo import plan as planning
from jaxgrpo.config import Config, ConfigError, from_dict
from jaxgrpo.config import load as load_config
from jaxgrpo.flops import Flops
from jaxgrpo.plan import Plan, assumed_bucket, make_plan, remedy, table
from jaxgrpo.sharding import make_mesh, shape_on
from jaxgrpo.topology import GIB, before_jax_starts, find
from models.qwen2_5_vl.config import ModelConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("configs/[37]b_*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 600  # of a prompt: no size of the 3B model, nor a share of one on four devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux and Python 3.11"
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The 3B model's config.json with two layers and two vision blocks; there are no weights."""
    released = ROOT / "configs" / "models" / "Qwen2.5-VL-3B-Instruct" / "config.json"
    raw = json.loads(released.read_text())
    raw["num_hidden_layers"] = 2
    raw["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    directory = tmp_path_factory.mktemp("3B-with-two-layers")
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


def config_of(model_path: str, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": model_path},
        "data": {"train": "unused", "eval": "unused", "buckets": [TOKENS]},
        "rollout": {"prompts": 4, "group": 2, "max_new_tokens": 64},
        "eval": {"batch": 4},
        "mesh": {"fsdp": 2, "tensor": 2},
    }
    return from_dict(raw | changes)


# ---- TPUs: compiled ----


class Planned(NamedTuple):
    plan: Plan
    texts: list[str]  # of the compiled programs, in the plan's order
    works: list[hlo.Work]


@pytest.fixture(scope="module")
def planned(model_path: str) -> Planned:
    topology = find("v5e:2x2")
    before_jax_starts(topology)
    texts, works, original = [], [], hlo.read

    def read(text: str, **options: Any) -> hlo.Report:
        report = original(text, **options)
        texts.append(text)
        works.append(report.work)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hlo, "read", read)
        plan = make_plan(config_of(model_path), topology, lambda text: None)
    return Planned(plan, texts, works)


@pytest.fixture(scope="module")
def plan(planned: Planned) -> Plan:
    return planned.plan


@needs_libtpu
def test_all_programs_of_a_step_are_compiled(plan: Plan) -> None:
    assert [p.name for p in plan.programs] == ["publish", "rollout", "reference", "update"]
    assert all(p.peak_gib and p.error is None and not p.unknown for p in plan.programs)
    assert plan.mesh == {"data": 1, "fsdp": 2, "tensor": 2} and plan.devices == 4


@needs_libtpu
def test_products_are_those_of_the_formula(plan: Plan) -> None:
    for p in plan.programs[1:]:
        assert p.matmul_tflop and p.formula_tflop
        assert 0.98 <= p.matmul_tflop / p.formula_tflop <= 1.1, p.name


def quadratic(text: str) -> set[str]:
    """The shapes in a program's text that have two axes of at least a prompt's tokens each.

    Weights, and patches beside widths, are not meant: neither is as long as a prompt exactly.
    """
    shapes = set(re.findall(r"\w+\[[\d,]+\]", text))
    return {x for x in shapes if re.findall(r"\d+", x.partition("[")[2]).count(str(TOKENS)) > 1}


@needs_libtpu
def test_no_scores_of_a_prompt_over_itself_are_made(planned: Planned) -> None:
    assert quadratic("%s = f32[2,8,600,600]{3,2,1,0} dot(%q, %k)") == {"f32[2,8,600,600]"}
    for program, text in zip(planned.plan.programs, planned.texts, strict=True):
        assert not quadratic(text), program.name


@needs_libtpu
def test_kernels_run_once_forward_again_with_remat_and_twice_backward(planned: Planned) -> None:
    """In two layers and in one of two vision blocks; the formula counts on it."""
    executed = {}
    for program, work in zip(planned.plan.programs, planned.works, strict=True):
        calls = [(u.op_name.split("/")[-2], u.times) for u in work.unknown]
        executed[program.name] = [
            sum(times for name, times in calls if name.startswith(f"splash_mha_{kernel}_"))
            for kernel in ("fwd", "dq", "dkv")
        ]
    assert executed == {
        "publish": [0, 0, 0],
        "rollout": [3, 0, 0],
        "reference": [3, 0, 0],
        "update": [6, 3, 3],
    }


@needs_libtpu
def test_attention_in_kernels_is_by_formula_and_said_to_be(plan: Plan) -> None:
    publish, rollout, reference, update = plan.programs
    assert plan.config["attention"] == "splash" and publish.kernel_formula_tflop == 0
    for p in (rollout, reference, update):
        assert p.kernel_formula_tflop and p.kernel_formula_tflop > 0
        assert p.attention_tflop == pytest.approx(p.attention_formula_tflop, rel=0.05)
    assert "attention in them is by formula" in table(plan)


@needs_libtpu
def test_the_state_is_donated_to_the_update(plan: Plan) -> None:
    update = plan.programs[-1]
    state = plan.resident_gib["weights"] + plan.resident_gib["optimiser"]
    assert update.donated_gib == pytest.approx(state, rel=1e-3)
    assert update.arguments_gib == pytest.approx(state, rel=0.02)  # and a batch


@needs_libtpu
def test_what_is_resident_is_counted_exactly(plan: Plan, model_path: str) -> None:
    """A quarter of the weights on four devices, but for norms; AdamW holds two of each."""
    config = ModelConfig.load(model_path)
    embedding = config.text.vocab * config.text.width * 4 / 4 / GIB
    assert embedding < plan.resident_gib["weights"] < 2.5 * embedding
    twice = 2 * plan.resident_gib["weights"]
    assert plan.resident_gib["optimiser"] == pytest.approx(twice, rel=1e-6)
    # Both in bfloat16: the sampler's copy split over tensor only, the reference over both axes.
    assert plan.resident_gib["sampler's copy"] == pytest.approx(
        plan.resident_gib["weights"], rel=0.01
    )
    assert plan.resident_gib["reference"] == pytest.approx(plan.resident_gib["weights"] / 2)


@needs_libtpu
def test_memory_in_use_is_a_programs_peak_and_what_waits_beside_it(plan: Plan) -> None:
    held = plan.resident_gib
    peaks = {p.name: p.peak_gib or 0.0 for p in plan.programs}
    assert plan.phases_gib["update"] == pytest.approx(peaks["update"] + held["reference"])
    assert plan.phases_gib["rollout"] == pytest.approx(
        peaks["rollout"] + held["weights"] + held["optimiser"] + held["reference"]
    )


@needs_libtpu
def test_the_sampler_gets_its_weights_in_one_gathering(plan: Plan) -> None:
    """Half of the copy is already there: what moves is the other fsdp half."""
    publish = plan.programs[0]
    gathered = sum(t.result_gib for t in publish.transfers if t.kind == "all-gather")
    assert gathered == pytest.approx(plan.resident_gib["sampler's copy"], rel=0.05)
    assert {t.kind for t in publish.transfers} == {"all-gather"}


@needs_libtpu
def test_it_fits_and_says_so_in_text_and_json(plan: Plan) -> None:
    assert plan.fits and plan.remedy is None
    text = table(plan)
    assert "\nfits (jax " in text and "libtpu" in text and "on v5e:2x2: 4 devices" in text
    again = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert again["fits"] is True and len(again["programs"]) == 4


@needs_libtpu
def test_no_time_is_claimed(plan: Plan) -> None:
    words = json.dumps(dataclasses.asdict(plan)).lower() + table(plan).lower()
    for claim in ("mfu", "step time", "tokens/s", "seconds per"):
        assert claim not in words


@needs_libtpu
def test_a_program_that_does_not_fit_says_what_it_asked_for(model_path: str) -> None:
    topology = find("v5e:1x1")
    before_jax_starts(topology)
    config = config_of(model_path, mesh={})
    mesh = make_mesh(config.mesh, topology.describe())
    large = shape_on(mesh, PartitionSpec(), (80_000, 80_000), jnp.bfloat16)
    program = jax.jit(lambda x: (x @ x) @ x).lower(large)
    model = ModelConfig.load(model_path)
    found = planning._compiled("large", program, Flops(()), config, model, topology)
    assert found.error and "RESOURCE_EXHAUSTED" in found.error
    assert found.peak_gib and found.peak_gib > topology.usable_gib


# ---- GPUs: counted ----


def test_further_updates_from_a_rollout_are_planned_too(model_path: str) -> None:
    plan = make_plan(config_of(model_path, grpo={"updates": 2}), find("h100:4"), lambda text: None)
    names = [p.name for p in plan.programs]
    assert names == ["publish", "rollout", "reference", "update", "update_again"]
    assert plan.programs[3].peak_gib == plan.programs[4].peak_gib


def test_gpus_are_planned_without_a_compiler(model_path: str) -> None:
    config = config_of(model_path, mesh={"fsdp": 8}, rollout={"prompts": 8}, eval={"batch": 8})
    plan = make_plan(config, find("h100:8"), lambda text: None)
    assert plan.fits and "lower bound" in plan.note and "libtpu" not in plan.versions
    assert plan.config["attention"] == "cudnn"
    for p in plan.programs:
        assert p.peak_gib == pytest.approx(sum(p.counted_gib.values()))
        assert p.compile_seconds is None and p.matmul_tflop is None
    assert "counted" in table(plan)


def test_adapters_are_planned_beside_frozen_weights(model_path: str) -> None:
    """Nothing frozen in float32, no reference but what is frozen, a merged copy for sampling."""
    config = config_of(
        model_path,
        mesh={},
        rollout={"prompts": 2, "group": 2, "max_new_tokens": 64},
        eval={"batch": 2},
        lora={"rank": 16},
    )
    assert config.grpo.kl
    plan = make_plan(config, find("h100:1"), lambda text: None)
    held = plan.resident_gib
    assert held["frozen weights"] == held["sampler's copy"] and not held["reference"]
    width, heads, kv_heads, mlp = 2048, 2048, 256, 11008
    one_layer = 16 * (2 * (width + heads) + 2 * (width + kv_heads) + 3 * (width + mlp))
    assert held["weights"] * 2**30 == 2 * one_layer * 4
    assert held["optimiser"] == pytest.approx(2 * held["weights"], rel=1e-3)
    programs = {p.name: p for p in plan.programs}
    assert programs.keys() == {"publish", "rollout", "reference", "update"}
    assert programs["update"].counted_gib["gradients"] == held["weights"]


def test_too_much_for_a_gpu_is_seen(model_path: str) -> None:
    config = config_of(model_path, mesh={}, rollout={"prompts": 4, "max_new_tokens": 64})
    small = dataclasses.replace(find("h100:1"), usable_gib=5.0)
    plan = make_plan(config, small, lambda text: None)
    assert not plan.fits and plan.remedy
    assert "DOES NOT FIT; nearest remedy: " in table(plan)


@pytest.mark.parametrize(
    ("changes", "mesh", "state", "says"),
    [
        (
            {"model": {"path": "x", "remat": "none"}},
            {},
            1.0,
            "model.remat=products or model.remat=layer",
        ),
        ({"mesh": {"data": 8}}, {"data": 8}, 60.0, "larger mesh.fsdp in the place of mesh.data"),
        ({"mesh": {"fsdp": 2}}, {"fsdp": 2}, 1.0, "optim.accumulate=2"),
        ({"optim": {"accumulate": 4}}, {}, 60.0, "more devices"),
        ({"optim": {"accumulate": 4}}, {}, 1.0, "smaller largest bucket"),
    ],
)
def test_the_remedy_is_the_nearest(
    changes: dict[str, Any], mesh: dict[str, int], state: float, says: str
) -> None:
    config = config_of("x", **{"mesh": {}, **changes})
    devices = jax.devices()[: max(mesh.values(), default=1)]
    held = {"weights": state, "sampler's copy": 1.0}
    assert says in remedy(config, make_mesh(config.mesh, devices), held, limit=80.0)


# ---- what is assumed ----


def test_the_assumed_bucket_is_full_of_video_and_packs_its_frames() -> None:
    config = load_config(RECIPES[0])
    model = ModelConfig.load(ROOT / "configs" / "models" / "Qwen2.5-VL-3B-Instruct")
    bucket = assumed_bucket(config.data, model)
    assert bucket.tokens == 4096
    assert 0.9 * 4 * 2048 <= bucket.patches <= 4 * 2048 and bucket.patches % 4 == 0
    assert bucket.frames * bucket.frame_patches <= 2 * bucket.patches + bucket.frame_patches


def test_a_bucket_smaller_than_a_whole_video_takes_a_smaller_one() -> None:
    config = config_of("x")
    model = ModelConfig.load(ROOT / "configs" / "models" / "Qwen2.5-VL-3B-Instruct")
    bucket = assumed_bucket(config.data, model)
    assert bucket.patches // 4 + 256 <= bucket.tokens == TOKENS


# ---- the recipes ----


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_config_that_states_its_shapes(path: Path) -> None:
    config = load_config(path)
    first = path.read_text().split("run_dir")[0].replace("\n#", "")
    rollout = config.rollout
    stated = f"P {rollout.prompts}, G {rollout.group}, S {config.data.buckets[-1]}"
    assert f"{stated}, C {rollout.max_new_tokens}" in first
    assert config.compilation_cache == "{run_dir}/compiled"
    assert Path(config.run_dir).name == path.stem


def test_the_3b_recipes_have_the_released_scripts_settings() -> None:
    for path in ROOT.glob("configs/3b_*64*.yaml"):
        config = load_config(path)
        assert (config.rollout.group, config.rollout.temperature) == (8, 1.0)
        assert config.rollout.prompts == 16 and config.rollout.max_new_tokens == 2048
        assert (config.data.total_pixels, config.data.min_pixels) == (1_605_632, 3136)
        assert (config.optim.learning_rate, config.optim.weight_decay) == (1e-6, 1e-2)
        assert (config.grpo.kl, config.grpo.entropy) == (1e-2, 1e-3)
        assert (config.grpo.clip_low, config.grpo.clip_high) == (0.2, 0.2)
        assert config.optim.clip_norm == 1.0 and not config.model.freeze_vision


def test_a_mesh_that_the_model_refuses_is_refused_before_compiling(model_path: str) -> None:
    config = config_of(model_path, mesh={"fsdp": 1, "tensor": 4})
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        make_plan(config, find("h100:4"), lambda text: None)
