"""The PyTorch original: transformers' Qwen2.5-VL. The only file that imports torch.

torch is no dependency of jaxgrpo; `missing` says whether it is installed, and nothing else here may
be called if it is not.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgrpo.verification.checks import Check, ask, difference, verdict_on
from jaxgrpo.verification.prompts import Inputs

POSITIONS = "positions"

Dtype = Literal["float32", "bfloat16"]


def missing() -> str | None:
    """Why there is no original to compare with."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    return None


def positions(directory: Path, given: Inputs) -> Check:
    """M-RoPE positions and the window order of patches, from transformers' own code.

    transformers since 5.3 goes on after a video at its start + max(rows, columns), the release
    (4.49) and vLLM at the largest position so far + 1. They agree on every run of text or video by
    itself: each run is taken from transformers and put where the release puts it.

    Raises:
      OtherSideError: transformers cannot compute them.
    """
    theirs, their_order = ask("transformers' positions", lambda: _positions(directory, given))
    kinds = given.prompt.vision_index >= 0
    starts = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(kinds)]
    moved, position = [], 0
    for start, stop in itertools.pairwise(starts):
        run = theirs[start:stop] - theirs[start].min() + position
        moved.append(run)
        position = int(run.max()) + 1
    released = np.concatenate(moved)
    problems = [
        difference("positions", given.prompt.positions, released, 0),
        difference("window order", given.prompt.vision_index[kinds], np.argsort(their_order), 0),
    ]
    good = "those of the release (transformers 4.49, vLLM), and windows as in transformers"
    apart = int((theirs != released).any(axis=1).sum())
    if apart:
        good += f"; transformers' newer rule would move the {apart} tokens after the video"
    return verdict_on(
        POSITIONS, [text for text in problems if text], good, "other positions than the release's"
    )


def _positions(directory: Path, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(i64[S, 3] by transformers' newer rule, its window order of merged units)."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLModel
    from transformers.vision_utils import get_vision_window_index

    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    with torch.device("meta"):  # its methods are needed, not its weights
        model: Any = Qwen2_5_VLModel(config)
    grid = torch.tensor([list(given.grid)])
    positions, _ = model.get_rope_index(
        torch.tensor(given.prompt.tokens[None], dtype=torch.long),
        torch.tensor(2 * (given.prompt.vision_index[None] >= 0)),
        video_grid_thw=grid,
        second_per_grid_ts=torch.tensor([given.seconds_per_grid], dtype=torch.float32),
    )
    vision = config.vision_config
    order, _ = get_vision_window_index(
        grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    return positions[:, 0].T.numpy(), order.numpy()


def run(directory: Path, given: Inputs, dtype: Dtype) -> dict[str, np.ndarray]:
    """What each part of the original gives for the same prompt, as `activations.run` does.

    Raises:
      OtherSideError: transformers cannot load or run the model.
    """
    return ask("transformers' model", lambda: _run(directory, given, dtype))


def _run(directory: Path, given: Inputs, dtype: Dtype) -> dict[str, np.ndarray]:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(directory), dtype=kind, attn_implementation="eager", local_files_only=True
    ).eval()
    vision, text = model.model.visual, model.model.language_model
    parts = {f"vision block {i}": block for i, block in enumerate(vision.blocks)}
    parts["vision merger"] = vision.merger
    parts |= {f"decoder layer {i}": layer for i, layer in enumerate(text.layers)}
    parts |= {"final norm": text.norm, "logits": model.lm_head}
    kept: dict[str, np.ndarray] = {}

    def keeper(name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            kept[name] = output.float().reshape(-1, output.shape[-1]).numpy()

        return keep

    for name, part in parts.items():
        part.register_forward_hook(keeper(name))
    tokens = torch.tensor(given.prompt.tokens[None], dtype=torch.long)
    positions = np.ascontiguousarray(given.prompt.positions.T[:, None])
    with torch.inference_mode():
        model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=torch.tensor(positions, dtype=torch.long),  # the release's, see above
            pixel_values_videos=torch.tensor(given.pixel_values).to(kind),
            video_grid_thw=torch.tensor([list(given.grid)]),
            use_cache=False,
        )
    return {name: kept[name] for name in parts}
