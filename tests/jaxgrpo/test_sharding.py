"""Meshes of 8 simulated devices against one device, and the errors of meshes that cannot be."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.config import (
    Config,
    ConfigError,
    DataSection,
    GrpoSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RolloutSection,
)
from jaxgrpo.policy import Params
from jaxgrpo.programs import (
    answer_shapes,
    init_program,
    lower_publish,
    prompt_shapes,
    publish_program,
    rollout_program,
    scalar_shape,
    score_program,
    truth_shapes,
    update_program,
)
from jaxgrpo.rollout import Rollout, Sampling
from jaxgrpo.scoring import open_reward
from jaxgrpo.sharding import (
    PROMPTS,
    SAMPLER_RULES,
    check_divides,
    make_mesh,
    param_shapes,
    param_shardings,
    process_rows,
    put_global,
    put_prompts,
    put_scalar,
    shardings_like,
)
from jaxgrpo.update import UpdateBatch, make_optimizer
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.sizes import Size
from tests.jaxgrpo.cases import (
    LAYOUTS,
    TEMPERATURE,
    SmallModel,
    random_groups,
    small_model,
    tree_differences,
    update_batch,
)
from tests.oracle import hf_model

PROMPT_COUNT, GROUP, WIDTH = 8, 2, 4
CONFIG = Config(
    run_dir="unused",
    model=ModelSection(path="unused", compute_dtype="float32"),
    data=DataSection(train="unused"),
    rollout=RolloutSection(PROMPT_COUNT, GROUP, WIDTH, TEMPERATURE),
    grpo=GrpoSection(kl=0.05, entropy=0.01),
    # A large eps keeps Adam's first step in proportion to the gradient, instead of to its sign.
    optim=OptimSection(learning_rate=0.1, eps=0.1, clip_norm=1e6),
)
BUCKET = Size(tokens=32, patches=16, windows=1, frames=1, frame_patches=16)
MESHES = {
    "8x1x1": MeshSection(data=8),
    "1x8x1": MeshSection(data=1, fsdp=8),
    "1x4x2": MeshSection(data=1, fsdp=4, tensor=2),
    "2x2x2": MeshSection(data=2, fsdp=2, tensor=2),
    "1x2x4": MeshSection(data=1, fsdp=2, tensor=4, replicate_kv=True),
}
HEAD_DIM = 8
HEADS = {"28/4": (28, 4), "16/2": (16, 2)}  # query and key/value heads of the 7B and the 3B model


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    assert len(jax.devices()) == 8, "tests/conftest.py asks XLA for 8 CPU devices"


class StepResult(NamedTuple):
    """Everything that a step makes, on the host."""

    rollout: Rollout
    loss: float
    metrics: dict[str, float]
    gradients: Params
    moved: Params  # weights after the update minus before


@pytest.fixture(scope="module", params=HEADS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A narrow model with the head counts of a released one."""
    heads, kv_heads = HEADS[request.param]
    config = hf_model.released_config(tied=False)
    vision = {"depth": 2, "num_heads": 4, "out_hidden_size": heads * HEAD_DIM}
    small = small_model(
        tmp_path_factory.mktemp("model"),
        tied=False,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
        vision_config=config["vision_config"] | vision,
    )
    # Logits of deviation 8, as this width has, would multiply the rounding of each sum by as much.
    with torch.no_grad():
        small.original.lm_head.weight.mul_(0.2)
    small.params["text"]["head"] *= 0.2
    return small


@pytest.fixture(scope="module")
def batch(small: SmallModel) -> UpdateBatch:
    groups = random_groups(small, group=GROUP, width=WIDTH, seed=2, layouts=LAYOUTS * 2)
    return jax.tree.map(np.asarray, update_batch(groups, WIDTH))


def compiled(program: Any, *args: Any) -> Any:
    return program.lower(*args).compile(compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def run_step(small: SmallModel, batch: UpdateBatch) -> Any:
    """A rollout and an update through the programs that training uses, on a mesh."""

    @cache
    def run(section: MeshSection, devices: int) -> StepResult:
        mesh = make_mesh(section, jax.devices()[:devices])
        sizes = {"rollout.prompts": PROMPT_COUNT}
        check_divides(mesh, small.policy.config, sizes, replicate_kv=section.replicate_kv)
        shardings = param_shardings(small.policy.config, mesh)
        params = jax.tree.map(lambda x, s: put_global(np.asarray(x), s), small.params, shardings)
        optimizer = make_optimizer(CONFIG.optim, 10)
        state = init_program(mesh, optimizer, params)(params)

        layout = param_shardings(small.policy.config, mesh, SAMPLER_RULES)
        sampler = publish_program(small.policy, layout)(state.params, {})
        on_device = put_prompts(mesh, batch)
        sampling = Sampling(GROUP, WIDTH, TEMPERATURE)
        arguments = (sampler, on_device.prompt, put_scalar(mesh, 5), put_scalar(mesh, 3))
        program = rollout_program(mesh, small.policy, sampling, keep_features=False)
        rollout, _ = compiled(program, *arguments)(*arguments)

        state_shardings = jax.tree.map(lambda x: x.sharding, state)
        update = update_program(mesh, small.policy, CONFIG, optimizer, state_shardings)
        after, metrics, _ = compiled(update, state, {}, on_device)(state, {}, on_device)
        assert_laid_out(after.params, shardings)
        moments = after.opt_state[0].mu
        assert_laid_out(moments, shardings)
        return StepResult(
            rollout=jax.device_get(rollout),
            loss=float(metrics["loss"]),
            metrics={k: float(v) for k, v in metrics.items()},
            gradients=jax.tree.map(lambda m: m / (1 - CONFIG.optim.b1), jax.device_get(moments)),
            moved=jax.tree.map(
                lambda new, old: new - np.asarray(old), jax.device_get(after.params), small.params
            ),
        )

    return run


def assert_laid_out(tree: Any, shardings: Any) -> None:
    for array, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.fixture(scope="module")
def alone(run_step: Any) -> StepResult:
    return run_step(MeshSection(data=1), 1)


@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_eight_devices_equals_one_device(
    run_step: Any, alone: StepResult, name: str
) -> None:
    ours = run_step(MESHES[name], 8)
    for field in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(
            ours.rollout._asdict()[field], alone.rollout._asdict()[field], err_msg=field
        )
    np.testing.assert_allclose(
        ours.rollout.sampler_logp, alone.rollout.sampler_logp, rtol=0, atol=5e-5
    )
    assert ours.loss == pytest.approx(alone.loss, rel=1e-5, abs=1e-6)
    for metric, value in alone.metrics.items():
        assert ours.metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    for tree, expected in ((ours.gradients, alone.gradients), (ours.moved, alone.moved)):
        differences = tree_differences(tree, expected)
        # Sums in another order: at most 7e-6 was measured.
        assert max(differences.values()) <= 1e-5, max(differences.items(), key=lambda x: x[1])


def test_the_step_on_one_device_is_worth_comparing(alone: StepResult) -> None:
    assert len(np.unique(alone.rollout.tokens)) > 8
    assert all(np.linalg.norm(g) > 1e-5 for g in jax.tree.leaves(alone.gradients))
    assert all(np.abs(m).max() > 1e-4 for m in jax.tree.leaves(alone.moved))


# ---- layout ----


def test_weights_are_split_over_fsdp_and_tensor(small: SmallModel) -> None:
    mesh = make_mesh(MESHES["2x2x2"])
    text = param_shardings(small.policy.config, mesh)["text"]
    assert text["layers"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert text["layers"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert text["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert text["norm"].spec == PartitionSpec(None)
    sampler = param_shardings(small.policy.config, mesh, SAMPLER_RULES)["text"]
    assert sampler["layers"]["q"].spec == PartitionSpec(None, None, "tensor", None)


def test_a_device_holds_its_share_of_the_large_weights(small: SmallModel) -> None:
    """A quarter of every matrix on fsdp x tensor = 2 x 2."""
    mesh = make_mesh(MESHES["2x2x2"])
    shardings = param_shardings(small.policy.config, mesh)
    for weight, sharding in zip(
        jax.tree.leaves(small.params), jax.tree.leaves(shardings), strict=True
    ):
        share = np.prod(sharding.shard_shape(weight.shape)) / weight.size
        if weight.size > 4000:
            assert share <= 0.5
        if weight.shape[-1] == small.policy.config.text.mlp_width:
            assert share == 0.25


def test_optimiser_moments_lie_as_their_weights_and_counts_everywhere(small: SmallModel) -> None:
    mesh = make_mesh(MESHES["1x4x2"])
    shardings = param_shardings(small.policy.config, mesh)
    shapes = jax.eval_shape(make_optimizer(OptimSection(), 5).init, small.params)
    laid_out = shardings_like(mesh, shapes, small.params, shardings)
    adam = laid_out[0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count == NamedSharding(mesh, PartitionSpec())
    assert jax.tree.structure(laid_out) == jax.tree.structure(shapes)


def test_every_device_gets_its_rows_of_a_batch() -> None:
    mesh = make_mesh(MESHES["2x2x2"])
    rows = np.arange(8 * 3).reshape(8, 3)
    array = put_prompts(mesh, rows)
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, PROMPTS), 2)
    for shard in array.addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = (data * 2 + fsdp) * 2
        np.testing.assert_array_equal(shard.data, rows[first : first + 2])
    np.testing.assert_array_equal(jax.device_get(array), rows)


@pytest.mark.parametrize("name", MESHES)
def test_a_single_process_feeds_all_rows(name: str) -> None:
    assert process_rows(make_mesh(MESHES[name]), 8) == list(range(8))


def test_processes_with_a_part_of_their_rows_in_common_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three processes of two devices on 1 x 2 x 3: the second has a device in either row."""
    mesh = make_mesh(MESHES["1x4x2"])
    rows = {0: frozenset({0, 1}), 1: frozenset(range(4)), 2: frozenset({2, 3})}
    monkeypatch.setattr("jaxgrpo.sharding._rows_of_processes", lambda mesh, prompts: rows)
    with pytest.raises(ConfigError, match="= 1 x 4 x 2, two processes have some prompts in common"):
        process_rows(mesh, 4)


def test_what_the_host_reads_is_whole_on_every_device(small: SmallModel) -> None:
    """A process reads it without asking the others: only its own shards are there."""
    mesh = make_mesh(MESHES["2x2x2"])
    shapes = param_shapes(small.policy.config, mesh)
    sampler = lower_publish(mesh, small.policy, shapes, {}).out_info
    prompt = prompt_shapes(mesh, small.policy.config.vision, BUCKET, PROMPT_COUNT)
    scalar = scalar_shape(mesh)
    program = rollout_program(mesh, small.policy, Sampling(GROUP, WIDTH, 1.0), keep_features=False)
    rollout, _ = program.lower(sampler, prompt, scalar, scalar).out_info
    whole = {name for name, x in rollout._asdict().items() if x.sharding.is_fully_replicated}
    assert whole == {"tokens", "lengths", "finished"}
    scores = score_program(mesh, open_reward(CONFIG), divide_by_std=True).lower(
        answer_shapes(mesh, PROMPT_COUNT, GROUP), truth_shapes(mesh, PROMPT_COUNT, 1)
    )
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(scores.out_info))


# ---- errors ----


def test_minus_one_takes_the_devices_that_are_left() -> None:
    mesh = make_mesh(MeshSection(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshSection()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (MeshSection(data=3), r"3 x 1 x 1 = 3, but there are 8 devices"),
        (MeshSection(data=2, fsdp=2, tensor=1), r"2 x 2 x 1 = 4, but there are 8 devices"),
        (MeshSection(fsdp=3), r"2 x 3 x 1 = 6, but there are 8 devices"),
        (MeshSection(tensor=16), r"1 x 1 x 16 = 16, but there are 8 devices"),
    ],
)
def test_a_mesh_of_another_size_than_the_machine_is_refused(
    section: MeshSection, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_mesh(section)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    return make_mesh(MeshSection(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def test_what_divides_is_accepted(small: SmallModel) -> None:
    sizes = {"rollout.prompts": 8, "eval.batch": 16}
    for section in MESHES.values():
        mesh, replicate = make_mesh(section), section.replicate_kv
        check_divides(mesh, small.policy.config, sizes, replicate_kv=replicate)


MODEL = ModelConfig.from_dict(hf_model.released_config(tied=False))  # 4 heads, 2 key/value heads


@pytest.mark.parametrize(
    ("mesh", "change", "says"),
    [
        ({"tensor": 4}, {}, r"num_key_value_heads \(2\).* or set mesh.replicate_kv=true"),
        ({"tensor": 3}, {}, r"mesh.tensor=3 .* num_key_value_heads \(2\); .* divides them$"),
        ({"tensor": 2}, {"heads": 5}, r"mesh.tensor=2 .* num_attention_heads \(5\)"),
        ({"tensor": 2}, {"vocab": 321}, r"mesh.tensor=2 .* vocab_size \(321\)"),
        ({"tensor": 2}, {"mlp_width": 95}, r"mesh.tensor=2 .* intermediate_size \(95\)"),
        ({"fsdp": 3}, {}, r"mesh.fsdp=3 .* hidden_size \(64\)"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_name(
    mesh: dict[str, int], change: dict[str, int], says: str
) -> None:
    config = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, **change))
    with pytest.raises(ConfigError, match=says):
        check_divides(mesh_of(**mesh), config, {})


def test_query_heads_must_divide_even_where_key_value_heads_are_replicated() -> None:
    config = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, heads=6, kv_heads=2))
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(2\); .* divides them$"):
        check_divides(mesh_of(tensor=4), config, {}, replicate_kv=True)


def test_a_vision_tower_that_does_not_divide_is_refused_by_name() -> None:
    config = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, heads=1))
    with pytest.raises(ConfigError, match=r"mesh.tensor=2 .* vision_config.num_heads \(1\)"):
        check_divides(mesh_of(tensor=2), config, {})


def test_a_batch_that_does_not_divide_is_refused_by_its_key() -> None:
    sizes = {"rollout.prompts": 8, "eval.batch": 6}
    with pytest.raises(ConfigError, match=r"eval.batch=6 .* multiple of 4"):
        check_divides(mesh_of(data=2, fsdp=2), MODEL, sizes)


def test_the_draws_do_not_depend_on_the_mesh() -> None:
    """Random bits of a sharded array are those of the whole one."""
    mesh = make_mesh(MESHES["2x2x2"])
    key = jax.random.key(1)
    plain = jax.random.categorical(key, jnp.zeros((8, 2, 50)))
    sharded = jax.jit(
        lambda logits: jax.random.categorical(key, logits),
        out_shardings=NamedSharding(mesh, PROMPTS),
    )(put_prompts(mesh, np.zeros((8, 2, 50), np.float32)))
    np.testing.assert_array_equal(plain, sharded)
