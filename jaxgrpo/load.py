"""Opening a model: a Hugging Face directory (here or in a bucket), a hub id, or an earlier run."""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.storage import Identity, StorageError, cache_folder, digest, is_url, list_files, mirror
from jaxgrpo.checkpoint import latest_step, read_part
from jaxgrpo.config import Config, ConfigError, MeshSection, ModelSection
from jaxgrpo.inputs import pixel_limits
from jaxgrpo.policy import Params, Policy, Vocabulary, cast
from jaxgrpo.processes import check_same
from jaxgrpo.run_dir import is_run, read_config
from jaxgrpo.sharding import make_mesh, param_shapes, param_shardings, say
from jaxgrpo.update import split_frozen
from models.attention_backend import Backend, Kernel
from models.low_rank import NO_LORA, Lora
from models.qwen2_5_vl import resize
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import (
    abstract_model,
    merge_adapters,
    random_adapters,
    random_params,
)
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.weights import load

_WEIGHTS: Final = "*.safetensors"
_OTHERS: Final = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*")
_THREADS: Final = 4  # that fetch from a bucket


def model_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The Hugging Face directory behind `model.path`: the one a run began from, if it is a run's.

    One in a bucket is fetched to `data.storage.cache_folder()` first.

    Args:
      weights: whether they are fetched, too; what is on this machine already has them anyway.

    Raises:
      FileNotFoundError: neither a directory nor the shape of a hub id.
      ConfigError: a run without a checkpoint.
      StorageError: a bucket path that holds no model or cannot be read.
    """
    if is_run(path):
        return model_directory(read_config(path).model.path, weights=weights)
    patterns = [*_OTHERS, _WEIGHTS] if weights else [*_OTHERS]
    if is_url(path):
        return _from_bucket(str(path), patterns)
    directory = Path(path)
    if directory.is_dir():
        return directory
    text = str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"model.path: there is no directory {text}, and it is not a hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except OSError as error:  # all that huggingface_hub raises: offline, unknown, gated
        raise FileNotFoundError(
            f"model.path: there is no directory {text}, and the Hugging Face hub gives no model of "
            f"that name: {error}\nWithout the hub, give model.path as a local directory."
        ) from error


def _from_bucket(url: str, patterns: Sequence[str]) -> Path:
    """The local copy of a model directory in a bucket, with the files of these patterns.

    Its name holds a digest of all versions: a directory that changes is fetched anew.
    """
    listed = list_files(url)
    if "config.json" not in listed:
        found = f"{len(listed)} other files" if listed else "no files"
        raise StorageError(
            f"model.path: expected a model directory with config.json and {_WEIGHTS}, or a run, in "
            f"{url}; found {found}; check the bucket and the folder"
        )

    def matching(patterns: Sequence[str]) -> dict[str, Identity]:
        return {
            name: identity
            for name, identity in listed.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }

    url = url.rstrip("/")
    key = digest(url, *sorted(matching([*_OTHERS, _WEIGHTS]).items()))
    folder = cache_folder() / "models" / f"{posixpath.basename(url)}-{key}"
    mirror(url, matching(patterns), folder, _THREADS, say)
    return folder


def config_directory(path: str) -> Path:
    """A directory with the config.json of `model.path`; weights are not fetched for it.

    The releases' own lie in configs/models, so that a hub id of theirs needs no hub.
    """
    kept = Path(__file__).resolve().parent.parent / "configs" / "models" / path.split("/")[-1]
    if not Path(path).exists() and (kept / "config.json").is_file():
        return kept
    return model_directory(path, weights=False)


def open_processor(config: Config, *, weights: bool = True) -> Processor:
    """The processor of `model.path`, with the pixel limits of `data`.

    Args:
      weights: whether they are fetched, too, where they will be needed: not for a random model or
        a run's.

    Raises:
      ConfigError: `model.init` would put random weights in the place of a run's.
    """
    if config.model.init == "random" and is_run(config.model.path):
        raise ConfigError(
            f"model.init is 'random', but model.path={config.model.path} is a run, whose weights "
            "would not be read: set model.init=checkpoint"
        )
    needed = config.model.init == "checkpoint" and not is_run(config.model.path)
    directory = model_directory(config.model.path, weights=weights and needed)
    how = {"exact": resize.exact, "pillow": resize.pillow}[config.data.resize]
    return Processor.load(directory, pixel_limits(config.data), how)


def vocabulary_of(processor: Processor) -> Vocabulary:
    """What may be emitted: the tokenizer's ids but its special ones, and the end of turn."""
    tokenizer = processor.tokenizer
    usable = np.zeros(processor.config.text.vocab, bool)
    usable[list(tokenizer.get_vocab().values())] = True
    usable[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = False
    end = processor.eos_ids[0]
    usable[end] = True
    return Vocabulary(usable, (end,), processor.pad_id)


def open_policy(
    section: ModelSection,
    processor: Processor,
    mesh: Mesh,
    *,
    temperature: float,
    lora: Lora = NO_LORA,
) -> Policy:
    """The policy without its weights; says what attention is computed by.

    Args:
      lora: the adapters that training is to make; a run's are in its weights already.

    Raises:
      ConfigError: see `choose_backend`.
    """
    platform = mesh.devices.flat[0].platform
    backend = choose_backend(section, platform)
    say(f"attention: {backend.kernel}, on {platform} in {section.compute_dtype}")
    vocabulary = vocabulary_of(processor)
    return make_policy(
        section, processor.config, vocabulary, backend, temperature=temperature, lora=lora
    )


def choose_backend(section: ModelSection, platform: str) -> Backend:
    """What computes attention on devices of `platform`: "tpu", "gpu" or "cpu".

    Raises:
      ConfigError: model.attention names a kernel that these devices, or cuDNN in float32, lack.
    """
    named, wide = section.attention, section.compute_dtype == "float32"
    fitting: Kernel = "xla"
    if platform == "tpu":
        fitting = "splash"
    elif platform == "gpu" and not wide:
        fitting = "cudnn"
    if named not in ("auto", "xla", fitting):
        needs = {"splash": "TPUs", "cudnn": "GPUs and model.compute_dtype=bfloat16"}[named]
        raise ConfigError(
            f"model.attention={named} needs {needs}; this is {platform} in "
            f"{section.compute_dtype}: set model.attention=auto, which takes {fitting}"
        )
    return Backend("xla" if named == "xla" else fitting, section.attention_chunk)


def make_policy(
    section: ModelSection,
    config: ModelConfig,
    vocabulary: Vocabulary,
    backend: Backend,
    *,
    temperature: float,
    lora: Lora = NO_LORA,
) -> Policy:
    """The policy of a model's sizes and vocabulary, without its weights."""
    graphdef, _ = abstract_model(config)
    return Policy(
        config=config,
        graphdef=graphdef,
        vocabulary=vocabulary,
        temperature=temperature,
        compute_dtype=jnp.dtype(section.compute_dtype),
        remat=section.remat,
        logit_chunk=section.logit_chunk,
        backend=backend,
        lora=lora,
    )


def open_params(section: ModelSection, config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """The master weights that `model` asks for, in the shapes of `sharding.param_shapes`.

    Raises:
      WeightError, FileNotFoundError: see `models.qwen2_5_vl.weights.load`.
      ConfigError: a run without a checkpoint, or with another newest one on another host.
    """
    shardings = param_shardings(config, mesh)
    if section.init == "random":
        return random_params(config, seed, shardings)
    check_same(f"the newest checkpoints of {section.path} are of steps", weight_steps(section.path))
    return load_params(section.path, config, shardings)


def open_trained(config: Config, model: ModelConfig, mesh: Mesh) -> Params:
    """The weights that training begins with: float32, but what is frozen in the compute dtype.

    With `lora` the adapters are new, by the seed; those of a run at model.path have been added to
    its weights.

    Raises: see `open_params`.
    """
    section, lora = config.model, config.lora.adapters
    shardings = param_shardings(model, mesh)
    dtype = jnp.dtype(section.compute_dtype)
    if section.init == "random":
        params = random_params(model, config.seed, shardings)
        trained, frozen = split_frozen(params, section.freeze_vision)
        return trained | cast(frozen, dtype)
    check_same(f"the newest checkpoints of {section.path} are of steps", weight_steps(section.path))
    if lora.rank:
        where = param_shardings(model, mesh, lora=lora)["lora"]
        adapters = {"lora": random_adapters(model, lora, config.seed, where)}
        return adapters | load_params(section.path, model, shardings, dtype=dtype)
    trained, frozen = split_frozen(shardings, section.freeze_vision)
    params = load_params(section.path, model, trained)
    return params | (load_params(section.path, model, frozen, dtype=dtype) if frozen else {})


def weight_steps(path: str | Path) -> list[int | None]:
    """The steps of the checkpoints that `load_params` reads: none for a model directory."""
    if not is_run(path):
        return []
    config = read_config(path)
    base, needed = config.model, config.base_needed
    return [latest_step(path), *(weight_steps(base.path) if needed else [])]


def load_params(
    path: str | Path,
    config: ModelConfig,
    shardings: Any,
    step: int | None = None,
    *,
    dtype: Any = np.float32,
) -> Params:
    """Weights of a model directory or of a run's checkpoint; a run's adapters added to them.

    Args:
      dtype: of all of them.
      shardings: where the weights lie, by "text" and "vision"; only what it names is read.
      step: of the run's checkpoint; None is the newest.

    Raises: as `open_params`; also ConfigError, the run has not kept that step.
    """
    if not is_run(path):
        return load(model_directory(path), config, dtype=dtype, shardings=shardings)
    run = read_config(path)
    base = run.model
    if run.lora.rank:
        return _with_adapters_of(path, run, config, shardings, step, dtype)
    trained = split_frozen(abstract_model(config)[1], base.freeze_vision)[0]
    like = {
        name: jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
            trained[name],
            shardings[name],
        )
        for name in trained
        if name in shardings
    }
    params = read_part(path, {"params": like}, step)["params"] if like else {}
    frozen = {name: where for name, where in shardings.items() if name not in trained}
    if not frozen:
        return params
    if base.init == "random":
        raise ConfigError(f"{path} froze a random vision tower, which is not kept anywhere")
    return params | load_params(base.path, config, frozen, dtype=dtype)


def _with_adapters_of(
    path: str | Path,
    run: Config,
    config: ModelConfig,
    shardings: Any,
    step: int | None,
    dtype: Any,
) -> Params:
    """`load_params` of a run that trained adapters: these added to its base as it had that."""
    lora = run.lora.adapters
    mesh = jax.tree.leaves(shardings)[0].mesh
    shapes = param_shapes(config, mesh, lora)["lora"]
    like = {part: pairs for part, pairs in shapes.items() if part in shardings}
    base = load_params(run.model.path, config, shardings, dtype=jnp.dtype(run.model.compute_dtype))
    adapters = read_part(path, {"params": {"lora": like}}, step)["params"] if like else {"lora": {}}

    def merge(base: Params, adapters: Params) -> Params:
        return cast(merge_adapters(base | adapters, lora.scale, dtype), dtype)

    return jax.jit(merge, out_shardings=shardings)(base, adapters)


def restore_params(run_dir: str | Path, step: int | None = None) -> tuple[Params, Path]:
    """(all weights of a run's checkpoint, the model directory it began from), for export.

    Args:
      step: see `load_params`.
    """
    directory = model_directory(run_dir)
    config = ModelConfig.load(directory)
    mesh = make_mesh(MeshSection(), jax.local_devices()[:1])
    return load_params(run_dir, config, param_shardings(config, mesh), step), directory
