"""The matrix-product FLOPs of the training programs, counted from shapes.

What the programs execute on a bucket's padded shapes, over all devices together, two FLOPs per
multiply-add. Attention (scores and values) is kept apart: back ends differ in what they compute of
it, and what kernels compute is not in a compiled program's text. Lookups of embeddings, norms,
softmaxes and the optimiser are no matrix products. For the FLOPs of the real tokens alone give the
sizes of a prompt instead of its bucket's, and chunks of 1.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, T tokens;
        text: L layers, D width, N query heads, K key/value heads, H head dimension, F MLP width,
        V vocabulary; vision: M patches, W windows of Q patches, R frames of U patches, I values of
        a patch, B blocks of which J attend to whole frames, Dv width, Fv MLP width, E = 4 Dv.

Forward:
  vision      2 M I Dv  +  B * 2 M (4 Dv^2 + 3 Dv Fv)  +  2 (M / 4) (E^2 + E D)       per prompt
  - attention 4 Dv (J R U^2 + (B - J) W Q^2)                                          per prompt
  text        L * 2 T (2 D N H + 2 D K H + 3 D F)                                     per T tokens
  - prompt    L * 4 N H * sum over blocks of (queries * keys up to the block's end)   per prompt
  - completions  L * 4 N H * G (C S + the same sum over C)                            per prompt
  - decoding  L * 4 N H (S + C): the whole cache, masked                              per token
  logits      2 D V                                                                   per position
  adapters    2 T R (I + O), of every weight [I, O] that has one of rank R             per T tokens

Backward: twice the forward, for the gradients of both factors; patches need none, so once there.
With adapters, which leave the weights no gradient, once; twice for the adapters; patches nothing.

Recomputed in the backward pass:
  - the logits, always;
  - attention's scores, half of its forward, always;
  - with remat "layer" every block and layer, but for the last product of its MLP (2 T F D, and of
    its adapter 2 T R D), whose result nothing in the backward pass reads; with "products" nothing
    that is counted here.
Attention in a kernel (`Backend.kernel`: prompts, completions, frames; never windows and decoding):
  - splash computes whole blocks of scores, those that its mask does not leave out, with heads
    padded to 128: 2 products forward, 7 backward (one kernel for the queries' gradients makes
    scores and their gradients, another for the keys' and values' does so too);
  - cuDNN skips what is above the diagonal of a prompt over itself and takes 5 products backward;
    its blocks are its own, and pairs are counted one by one.
  Its forward pass is computed again with its layer, and of cuDNN's also with "products".
XLA on CPUs sees through some of it, and computes less: one chunk of logits is not computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxgrpo.hlo import Matmul
from models import attention_splash
from models.attention_backend import XLA, Backend
from models.layers import Remat
from models.low_rank import NO_LORA, Lora
from models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig
from models.qwen2_5_vl.sizes import Size

SPLASH = "splash_attention"  # in the names of all that splash attention computes


def is_attention(matmul: Matmul) -> bool:
    """Whether a matrix product of a compiled program is attention's scores or values.

    All of `models/attention.py`'s products name the axes `kgrt`, and they alone have batch
    dimensions, which is how they are known on CPUs, where XLA drops their names. Beside splash's
    kernels stands a small one, of outputs and their gradients.
    """
    names = ("kgrt", SPLASH)
    return any(name in matmul.op_name for name in names) or (matmul.batched and not matmul.op_name)


def branch_shares(config: VisionConfig) -> Callable[[str], list[float] | None]:
    """For `hlo.read`: how often the branches of our only conditional, a vision block's, run."""
    full = len(config.full_attention_blocks) / config.depth
    return lambda op_name: [1 - full, full] if "cond" in op_name else None


@dataclasses.dataclass(frozen=True)
class Step:
    """The shapes of a training step and what is recomputed in it."""

    bucket: Size
    prompts: int  # P
    group: int  # G
    length: int  # C
    logit_chunk: int = 0  # completion positions; 0: all at once
    backend: Backend = XLA
    remat: Remat = "none"
    freeze_vision: bool = False  # encoded once, by the rollout
    lora: Lora = NO_LORA  # of the update; others compute with the base or with merged weights


class Part(NamedTuple):
    """FLOPs of a part of a program."""

    name: str
    matmul: int  # all but attention's scores and values
    attention: int = 0  # on XLA
    kernel: int = 0  # attention in kernels


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one execution of a program, over all devices."""

    parts: tuple[Part, ...]

    @property
    def matmul(self) -> int:
        """All but attention's scores and values."""
        return sum(part.matmul for part in self.parts)

    @property
    def attention(self) -> int:
        """Attention's scores and values, on XLA."""
        return sum(part.attention for part in self.parts)

    @property
    def kernel(self) -> int:
        """Attention's scores and values, in kernels."""
        return sum(part.kernel for part in self.parts)

    @property
    def total(self) -> int:
        return self.matmul + self.attention + self.kernel


def rollout_flops(config: ModelConfig, step: Step) -> Flops:
    """Vision tower, prefill, and decoding of C tokens (it may stop earlier)."""
    p, g, c, s = step.prompts, step.group, step.length, step.bucket.tokens
    text = config.text
    prompt = p * text.layers * _per_pair(text, step.backend) * _prompt_pairs(s, step.backend)
    decoding = text.layers * _per_pair(text, XLA) * (s + c)
    return Flops(
        (
            *_vision(config.vision, step),
            _part("prefill", _layers(text, p * s), prompt, step.backend),
            Part("decode", _layers(text, p * g * c), p * g * c * decoding),
            Part("decode logits", 2 * p * g * c * text.width * text.vocab),
        )
    )


def reference_flops(config: ModelConfig, step: Step) -> Flops:
    """Log-probabilities under the reference policy: forward only."""
    vision = () if step.freeze_vision else _vision(config.vision, step)
    return Flops((*vision, *_packed(config.text, step), _logits(config.text, step)))


def update_flops(config: ModelConfig, step: Step) -> Flops:
    """Forward, backward and what is recomputed; a frozen tower's features are handed in."""
    vision = () if step.freeze_vision else _vision(config.vision, step)
    packed, logits = _packed(config.text, step), _logits(config.text, step)
    adapters = _adapters(config, step)
    forward = (*vision, *packed, *adapters, logits)
    again = [Part("logits", logits.matmul)]
    if step.remat == "layer":
        again += [_without_last(part, config, step) for part in (*vision, *packed, *adapters)]
    if step.remat == "products" and step.backend.kernel == "cudnn":
        again += [part._replace(matmul=0, attention=0) for part in (*vision, *packed)]
    again += [Part(f"{part.name}' scores", 0, part.attention // 2) for part in (*vision, *packed)]
    return Flops(
        (
            *_named("forward", forward),
            *_named("backward", [_backward(part, step) for part in forward]),
            *_named("recomputed", [part for part in again if any(part[1:])]),
        )
    )


def _named(when: str, parts: tuple[Part, ...] | list[Part]) -> list[Part]:
    return [part._replace(name=f"{when}: {part.name}") for part in parts]


# ---- forward ----


def _vision(config: VisionConfig, step: Step) -> tuple[Part, ...]:
    bucket, p, d = step.bucket, step.prompts, config.width
    if bucket.patches == 0:
        return ()
    e = config.merge_area * d
    blocks = config.depth * 2 * bucket.patches * (4 * d * d + 3 * d * config.mlp_width)
    full = len(config.full_attention_blocks)
    windows = (config.depth - full) * bucket.windows * config.window_patches**2
    frames = full * bucket.frames * _frame_pairs(bucket.frame_patches, step.backend)
    in_frames = _part(
        "vision", p * blocks, p * frames * _per_pair(config, step.backend), step.backend
    )
    attention = in_frames.attention + p * windows * _per_pair(config, XLA)
    units = bucket.patches // config.merge_area
    return (
        Part("patches", p * 2 * bucket.patches * config.patch_dim * d),
        in_frames._replace(attention=attention),
        Part("merger", p * 2 * units * (e * e + e * config.out_width)),
    )


def _layers(config: TextConfig, tokens: int) -> int:
    """All layers' products but attention's, for `tokens` tokens."""
    heads = 2 * config.heads + 2 * config.kv_heads  # q and o; k and v
    per_token = config.width * (heads * config.head_dim + 3 * config.mlp_width)
    return config.layers * 2 * tokens * per_token


def _per_pair(config: TextConfig | VisionConfig, backend: Backend) -> int:
    """A layer's scores and values per pair of a query and a key."""
    dim = config.head_dim
    if backend.kernel == "splash":
        dim = attention_splash.padded_dim(dim)
    return 4 * config.heads * dim


def _causal_pairs(length: int, chunk: int) -> int:
    """Pairs of queries and keys: a block of `chunk` queries meets the keys up to its end."""
    chunk = chunk if 0 < chunk < length else max(length, 1)
    ends = [min(start + chunk, length) for start in range(0, length, chunk)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def _prompt_pairs(length: int, backend: Backend) -> int:
    """Pairs of a prompt over itself."""
    if backend.kernel == "splash":
        return attention_splash.executed_pairs(attention_splash.causal, length)
    return _causal_pairs(length, 1 if backend.kernel == "cudnn" else backend.chunk)


def _group_chunk(step: Step) -> int:
    """XLA: queries of one completion whose scores exist at once."""
    return step.backend.chunk and max(step.backend.chunk // step.group, 1)


def _frame_pairs(slots: int, backend: Backend) -> int:
    """Pairs of a row of frames."""
    if backend.kernel == "splash":
        return attention_splash.executed_pairs(attention_splash.full, slots)
    return slots**2


def _group_pairs(step: Step) -> int:
    """Pairs of a prompt and its completions."""
    s, c = step.bucket.tokens, step.length
    if step.backend.kernel == "splash":
        mask = attention_splash.packed(s, c)
        return attention_splash.executed_pairs(mask, s + step.group * c)
    own = c * c if step.backend.kernel == "cudnn" else _causal_pairs(c, _group_chunk(step))
    return _prompt_pairs(s, step.backend) + step.group * (c * s + own)


def _packed(config: TextConfig, step: Step) -> tuple[Part, ...]:
    """All layers over [prompt | completion 1 | ... | completion G]."""
    tokens = step.bucket.tokens + step.group * step.length
    p = step.prompts
    attention = p * config.layers * _per_pair(config, step.backend) * _group_pairs(step)
    return (_part("layers", _layers(config, p * tokens), attention, step.backend),)


def _adapters(config: ModelConfig, step: Step) -> tuple[Part, ...]:
    """Both products of every adapter, of the vision tower and of the decoder."""
    vision, text, rank = config.vision, config.text, step.lora.rank
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    widths = {  # the inputs and outputs of a layer's weights
        "vision.attention": (vision.width + 3 * vision.width) + 2 * vision.width,
        "vision.mlp": 3 * (vision.width + vision.mlp_width),
        "text.attention": 2 * (text.width + heads) + 2 * (text.width + kv_heads),
        "text.mlp": 3 * (text.width + text.mlp_width),
    }
    rows = {
        "vision": step.prompts * vision.depth * step.bucket.patches,
        "text": step.prompts * text.layers * (step.bucket.tokens + step.group * step.length),
    }
    found = []
    for stack, tokens in rows.items():
        width = sum(widths[x] for x in step.lora.targets if x.startswith(stack))
        if width and tokens:
            found.append(Part(f"{stack} adapters", 2 * tokens * rank * width))
    return tuple(found)


def _part(name: str, matmul: int, attention: int, backend: Backend) -> Part:
    """With attention where the back end computes it."""
    if backend.kernel == "xla":
        return Part(name, matmul, attention)
    return Part(name, matmul, kernel=attention)


def _logits(config: TextConfig, step: Step) -> Part:
    """Chunks are padded to a whole number."""
    chunk = step.logit_chunk if 0 < step.logit_chunk < step.length else step.length
    positions = step.prompts * step.group * -(-step.length // chunk) * chunk
    return Part("logits", 2 * positions * config.width * config.vocab)


# ---- backward ----


def _backward(part: Part, step: Step) -> Part:
    times = 1 if part.name == "patches" else 2
    if step.lora.rank and not part.name.endswith("adapters"):
        times -= 1
    products = {"xla": 4, "splash": 7, "cudnn": 5}[step.backend.kernel]
    return part._replace(
        matmul=times * part.matmul,
        attention=2 * part.attention,
        kernel=part.kernel // 2 * products,
    )


def _without_last(part: Part, config: ModelConfig, step: Step) -> Part:
    """What is computed again of a part when its layers are: all but the MLPs' last product."""
    vision, text, rank = config.vision, config.text, step.lora.rank
    of_vision = 2 * step.prompts * step.bucket.patches * vision.depth * vision.width
    tokens = step.bucket.tokens + step.group * step.length
    of_text = 2 * step.prompts * tokens * text.layers * text.width
    last = {
        "vision": of_vision * vision.mlp_width,
        "layers": of_text * text.mlp_width,
        "vision adapters": of_vision * rank * ("vision.mlp" in step.lora.targets),
        "text adapters": of_text * rank * ("text.mlp" in step.lora.targets),
    }
    if part.name not in last:
        return Part(part.name, 0)
    return part._replace(matmul=part.matmul - last[part.name])
