"""Opening a model: a Hugging Face directory (here or in a bucket), a hub id, or an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.storage import is_url, model_folder
from jaxgrpo.checkpoint import latest_step, read_part
from jaxgrpo.config import Config, ConfigError, MeshSection, ModelSection
from jaxgrpo.inputs import pixel_limits
from jaxgrpo.policy import Params, Policy, Vocabulary
from jaxgrpo.processes import check_same
from jaxgrpo.run_dir import is_run, read_config
from jaxgrpo.sharding import make_mesh, param_shardings, say
from jaxgrpo.update import split_frozen
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, random_params
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.weights import load


def model_directory(path: str | Path) -> Path:
    """The Hugging Face directory behind `model.path`: the one a run began from, if it is a run's.

    One in a bucket is fetched to `data.storage.cache_folder()` first.

    Raises:
      FileNotFoundError: neither a directory nor the shape of a hub id.
      ConfigError: a run without a checkpoint.
      StorageError: a bucket path that holds no model or cannot be read.
    """
    if is_run(path):
        return model_directory(read_config(path).model.path)
    if is_url(path):
        return model_folder(str(path), say)
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

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except OSError as error:  # all that huggingface_hub raises: offline, unknown, gated
        raise FileNotFoundError(
            f"model.path: there is no directory {text}, and the Hugging Face hub gives no model of "
            f"that name: {error}\nWithout the hub, give model.path as a local directory."
        ) from error


def config_directory(path: str) -> Path:
    """A directory with the config.json of `model.path`; weights are not fetched for it.

    The releases' own lie in configs/models, so that a hub id of theirs needs no hub.
    """
    kept = Path(__file__).resolve().parent.parent / "configs" / "models" / path.split("/")[-1]
    if not Path(path).exists() and (kept / "config.json").is_file():
        return kept
    return model_directory(path)


def open_processor(config: Config) -> Processor:
    """The processor of `model.path`, with the pixel limits of `data`.

    Raises:
      ConfigError: `model.init` would put random weights in the place of a run's.
    """
    if config.model.init == "random" and is_run(config.model.path):
        raise ConfigError(
            f"model.init is 'random', but model.path={config.model.path} is a run, whose weights "
            "would not be read: set model.init=checkpoint"
        )
    return Processor.load(model_directory(config.model.path), pixel_limits(config.data))


def vocabulary_of(processor: Processor) -> Vocabulary:
    """What may be emitted: the tokenizer's ids but its special ones, and the end of turn."""
    tokenizer = processor.tokenizer
    usable = np.zeros(processor.config.text.vocab, bool)
    usable[list(tokenizer.get_vocab().values())] = True
    usable[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = False
    end = processor.eos_ids[0]
    usable[end] = True
    return Vocabulary(usable, (end,), processor.pad_id)


def open_policy(section: ModelSection, processor: Processor, *, temperature: float) -> Policy:
    """The policy without its weights."""
    return make_policy(section, processor.config, vocabulary_of(processor), temperature=temperature)


def make_policy(
    section: ModelSection, config: ModelConfig, vocabulary: Vocabulary, *, temperature: float
) -> Policy:
    """The policy of a model's sizes and vocabulary, without its weights."""
    graphdef, _ = abstract_model(config)
    return Policy(
        config=config,
        graphdef=graphdef,
        vocabulary=vocabulary,
        temperature=temperature,
        compute_dtype=jnp.dtype(section.compute_dtype),
        remat=section.remat == "layer",
        logit_chunk=section.logit_chunk,
        attention_chunk=section.attention_chunk,
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


def weight_steps(path: str | Path) -> list[int | None]:
    """The steps of the checkpoints that `load_params` reads: none for a model directory."""
    if not is_run(path):
        return []
    base = read_config(path).model
    return [latest_step(path), *(weight_steps(base.path) if base.freeze_vision else [])]


def load_params(
    path: str | Path, config: ModelConfig, shardings: Any, step: int | None = None
) -> Params:
    """Float32 weights of a model directory or of a run's checkpoint.

    Args:
      shardings: where the weights lie, by "text" and "vision"; only what it names is read.
      step: of the run's checkpoint; None is the newest.

    Raises: as `open_params`; also ConfigError, the run has not kept that step.
    """
    if not is_run(path):
        return load(model_directory(path), config, shardings=shardings)
    base = read_config(path).model
    trained = split_frozen(abstract_model(config)[1], base.freeze_vision)[0]
    like = {
        name: jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
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
    return params | load_params(base.path, config, frozen)


def restore_params(run_dir: str | Path, step: int | None = None) -> tuple[Params, Path]:
    """(all weights of a run's checkpoint, the model directory it began from), for export.

    Args:
      step: see `load_params`.
    """
    directory = model_directory(run_dir)
    config = ModelConfig.load(directory)
    mesh = make_mesh(MeshSection(), jax.local_devices()[:1])
    return load_params(run_dir, config, param_shardings(config, mesh), step), directory
