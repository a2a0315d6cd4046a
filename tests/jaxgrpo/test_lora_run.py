"""Runs that train adapters: what they save, resume, add to the weights and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLForConditionalGeneration

from data.prompts import target_text
from data.records import read_manifest
from data.sources import FolderClips
from jaxgrpo import cli
from jaxgrpo.checkpoint import read_part
from jaxgrpo.config import GrpoSection, MeshSection
from jaxgrpo.inputs import PromptLoader
from jaxgrpo.load import load_params, open_processor, open_trained, restore_params, weight_steps
from jaxgrpo.metrics import COMPLETIONS, read_metrics
from jaxgrpo.policy import Params
from jaxgrpo.programs import lower_publish
from jaxgrpo.sharding import (
    jit_on,
    make_mesh,
    param_shapes,
    param_shardings,
    put_global,
    put_prompts,
)
from jaxgrpo.update import grpo_gradients, split_frozen
from models.low_rank import Lora
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, random_adapters, with_adapters
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.cases import (
    LAYOUTS,
    random_groups,
    small_model,
    tree_differences,
    update_batch,
)
from tests.jaxgrpo.tiny_run import TINY, Workplace
from tests.oracle import hf_model

LORA = ("lora.rank=4", "lora.alpha=8", "optim.learning_rate=2e-2")
SECTION = Lora(4, 8.0, ("text.attention", "text.mlp"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def overrides(place: Workplace) -> list[str]:
    return [*tiny_run.started(place), *LORA, "train.steps=4", "eval.every=0", "eval.limit=4"]


@pytest.fixture(scope="module")
def run_dir(place: Workplace) -> Path:
    """A GRPO run of adapters, with a KL term."""

    def make(folder: Path) -> None:
        tiny_run.run(place, "train", folder, *overrides(place))

    return tiny_run.once(place.folder / "lora", make)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in flat}


def adapters_of(run_dir: Path, **axes: int) -> Params:
    """Those of the newest checkpoint, {"lora": ...}, on a mesh."""
    devices = jax.local_devices()[: int(np.prod(list(axes.values())))]
    mesh = make_mesh(MeshSection(**axes), devices)
    like = param_shapes(ModelConfig.load(TINY), mesh, SECTION)["lora"]
    return dict(read_part(run_dir, {"params": {"lora": like}}, None)["params"])


def test_a_checkpoint_holds_adapters_and_their_optimiser_only(run_dir: Path) -> None:
    state = tiny_run.state_of(run_dir)
    arrays = {name: array for name, array in state.items() if array.ndim}
    assert arrays and all("['lora']['text']" in name for name in arrays)
    weights = sum(array.size for name, array in arrays.items() if name.startswith("['params']"))
    assert sum(array.size for array in arrays.values()) == 3 * weights
    assert weights < 0.2 * sum(x.size for x in jax.tree.leaves(restore_params(run_dir)[0]))


def test_only_the_weights_that_have_adapters_change(place: Workplace, run_dir: Path) -> None:
    cold_start = tiny_run.cold_start(place)
    after, directory = restore_params(run_dir)
    before, _ = restore_params(cold_start)
    assert directory == TINY
    assert weight_steps(run_dir) == [4, *weight_steps(cold_start)]
    found, began = by_name(after), by_name(before)
    assert found.keys() == began.keys()
    changed = {name for name in found if not np.array_equal(found[name], began[name])}
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    assert changed == {f"['text']['layers']['{name}']" for name in targets}


def test_a_killed_run_ends_as_one_never_killed(place: Workplace, run_dir: Path) -> None:
    killed, counts = place.folder / "killed_lora", place.folder / "killed_lora.json"
    tiny_run.run(place, "train", killed, *overrides(place), kill="update:4")
    tiny_run.run(place, "train", killed, *overrides(place), counts=counts)
    tiny_run.assert_same_bits(tiny_run.state_of(killed), tiny_run.state_of(run_dir))
    found, whole = (tiny_run.without_times(tiny_run.lines(x)) for x in (killed, run_dir))
    assert found == whole
    assert any(line["kl"] > 0 for line in tiny_run.lines(killed, "train"))
    # The reference is the base: it is published nowhere. Adapters are made anew, and restored.
    compiled, read, _ = json.loads(counts.read_text())
    expected = {"jit(rollout)": 2, "jit(reference)": 1, "jit(update)": 1, "jit(score)": 2}
    assert compiled == expected | {"jit(publish)": 1, "jit(init)": 1}
    assert read == sum(compiled.values())


def test_a_checkpoint_lies_on_another_mesh_bit_for_bit(run_dir: Path) -> None:
    one, four = adapters_of(run_dir, data=1), adapters_of(run_dir, data=1, fsdp=2, tensor=2)
    tiny_run.assert_same_bits(by_name(four), by_name(one))
    q = four["lora"]["text"]["q"]
    assert q["a"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert q["b"].sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor", None)
    config = ModelConfig.load(TINY)
    mesh = make_mesh(MeshSection(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    merged = by_name(load_params(run_dir, config, param_shardings(config, mesh)))
    for name, expected in by_name(restore_params(run_dir)[0]).items():
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_the_export_is_the_model_with_its_adapters_in_transformers_too(
    place: Workplace, run_dir: Path, tmp_path: Path
) -> None:
    """The logits of a question about a real clip and of its answer, within 1e-4 deviations."""
    out = tmp_path / "out"
    assert cli.main(["export", str(run_dir), str(out), "dtype=float32"]) == 0
    theirs, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found

    config = tiny_run.load_config(place)
    processor = open_processor(config)
    records = tuple(read_manifest(place.clips / "eval.jsonl", place.clips))
    item = next(i for i, record in enumerate(records) if record.task == "gqa")
    prompt = PromptLoader(processor, records, config.data, FolderClips(str(place.clips)))(item)
    completion = processor.encode_completion(target_text(records[item], thinking=False))
    grid = np.array([[len(prompt.frame_index), *(prompt.patch_hw.max(axis=0) + 1)]])
    no_images = np.zeros((0, 3), np.int64)
    with torch.no_grad():
        expected = hf_model.logits(theirs.eval(), prompt, no_images, grid, completion).numpy()
    expected = expected[len(prompt.tokens) - 1 : -1]

    base, _ = restore_params(tiny_run.cold_start(place))
    batch = jax.tree.map(lambda x: x[None], prompt)

    def logits(lora: Lora, params: Params) -> np.ndarray:
        model = nnx.merge(abstract_model(processor.config, lora)[0], params)
        features = model.encode_vision(batch)
        hidden = model.completion_hidden(batch, features, completion[None, None])
        return np.asarray(model.logits(hidden)[0, 0])

    ours = logits(SECTION, with_adapters(base | adapters_of(run_dir, data=1)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * expected.std())
    assert np.abs(logits(Lora(), base) - ours).max() > 0.01 * expected.std()


def test_a_run_of_adapters_is_a_model_for_other_commands(
    place: Workplace, run_dir: Path, tmp_path: Path
) -> None:
    """`eval` finds the scores that it ended with; `sft` goes on from it with new adapters."""
    model = [f"model.path={run_dir}", "model.init=checkpoint", "eval.limit=4"]
    tiny_run.run(place, "eval", tmp_path / "eval", *model)
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    ended = tiny_run.without_times(tiny_run.lines(run_dir, "eval"))[-1]
    scores = {name for name in ended if "/" in name}
    assert scores and {name: found[name] for name in scores} == {x: ended[x] for x in scores}

    sft = tmp_path / "sft"
    steps = ["sft.steps=2", "eval.every=0", "checkpoint.every=2"]
    tiny_run.run(place, "sft", sft, *model, *LORA, *steps)
    assert all("lora" in name for name, x in tiny_run.state_of(sft).items() if x.ndim)
    assert weight_steps(sft) == [2, *weight_steps(run_dir)]
    found_, began = by_name(restore_params(sft)[0]), by_name(restore_params(run_dir)[0])
    changed = {name for name in found_ if not np.array_equal(found_[name], began[name])}
    assert changed and all("layers" in name for name in changed)


def test_selection_samples_the_adapters_of_a_run_as_it_does_its_export(
    place: Workplace, run_dir: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    assert cli.main(["export", str(run_dir), str(exported), "dtype=float32"]) == 0
    said = []
    for model in (run_dir, exported, TINY):
        folder = tmp_path / f"select-{model.name}"
        overrides = [f"model.path={model}", "model.init=checkpoint", "select.samples=2"]
        tiny_run.run(place, "select", folder, *overrides)
        rows = read_metrics(folder / COMPLETIONS)
        said.append([(row["id"], row["completion"]) for row in rows])
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("key", ["lora.rank=4", "model.freeze_vision=true"])
def test_what_is_frozen_is_held_in_the_compute_type_alone(place: Workplace, key: str) -> None:
    """Of a run, whose checkpoint has them in float32."""
    config = tiny_run.load_config(
        place, *tiny_run.started(place), key, "model.compute_dtype=bfloat16"
    )
    mesh = make_mesh(MeshSection(data=1), jax.devices()[:1])
    params = open_trained(config, ModelConfig.load(TINY), mesh)
    trained, frozen = split_frozen(params, config.model.freeze_vision)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    wide = restore_params(tiny_run.cold_start(place))[0]
    for name, weights in frozen.items():
        rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), wide[name])
        tiny_run.assert_same_bits(by_name(weights), by_name(rounded))
    assert "vision" in frozen


def test_a_step_on_four_devices_equals_one_device(tmp_path: Path) -> None:
    """Gradients of adapters everywhere, and the sampler's merged weights."""
    targets = ("text.attention", "text.mlp", "vision.attention", "vision.mlp")
    small = small_model(tmp_path, tied=False)
    policy = small.policy._replace(lora=Lora(3, 6.0, targets))
    pairs = random_adapters(policy.config, policy.lora, 0)
    pairs = jax.tree.map(lambda x: np.asarray(x) + 0.05, pairs)
    groups = random_groups(small, group=2, width=4, seed=2, layouts=LAYOUTS)
    batch = jax.tree.map(np.asarray, update_batch(groups, 4))
    config = GrpoSection(kl=0.05)

    def step(section: MeshSection, devices: int) -> tuple[Params, Params]:
        mesh = make_mesh(section, jax.devices()[:devices])
        where = param_shardings(policy.config, mesh, lora=policy.lora)
        host = small.params | {"lora": pairs}
        params = jax.tree.map(lambda x, s: put_global(np.asarray(x), s), host, where)
        trained, frozen = split_frozen(params, freeze_vision=False)

        def gradients(trained: Params, frozen: Params, batch: Any) -> Params:
            return grpo_gradients(policy, trained, frozen, batch, config)[0]

        fast = {"xla_backend_optimization_level": 0}
        arguments = (trained, frozen, put_prompts(mesh, batch))
        program = jit_on(mesh, gradients, out_shardings={"lora": where["lora"]})
        found = program.lower(*arguments).compile(compiler_options=fast)(*arguments)
        sampler = lower_publish(mesh, policy, trained, frozen).compile(compiler_options=fast)
        return jax.device_get((found, sampler(trained, frozen)))  # type: ignore[no-any-return]

    alone = step(MeshSection(data=1), 1)
    shared = step(MeshSection(data=1, fsdp=2, tensor=2), 4)
    for found, expected in zip(shared, alone, strict=True):
        differences = tree_differences(found, expected)
        assert max(differences.values()) <= 1e-5, max(differences.items(), key=lambda x: x[1])
