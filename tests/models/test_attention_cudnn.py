"""The calls to cuDNN's attention, computed by XLA, against XLA's own; on a GPU cuDNN itself."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from models import attention_cudnn
from models.attention_backend import XLA, Backend
from tests.models.attention_cases import Case, Heads, assert_as_xla, frames, groups, prompts

EVEN = [
    prompts(Heads(8, 2, 16), lengths=(20, 1, 13), tokens=20),
    groups(Heads(8, 2, 16), lengths=(14, 3), tokens=14, group=3, completion=6),
    frames(Heads(2, 2, 80), (((6, 4), (5, 4, 3)), ((12,), ())), slots=12),
]
ODD = [
    groups(Heads(28, 4, 8), lengths=(9, 11), tokens=11, group=2, completion=5),
    groups(Heads(8, 2, 16), lengths=(9, 12), tokens=12, group=2, completion=1),
    frames(Heads(2, 2, 16), (((6, 4, 1),),), slots=11),
]


@pytest.mark.parametrize("case", EVEN + ODD)
def test_it_is_xlas_attention(case: Case) -> None:
    assert_as_xla(case, Backend("cudnn", emulated=True))


def test_gradients_of_a_shared_prompt_are_summed_in_float32() -> None:
    keys = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    _, pullback = jax.vjp(lambda k: attention_cudnn._repeat(k, 257), keys)
    ones = jnp.ones((257, 1, 1, 1), jnp.bfloat16)
    assert pullback(ones)[0].dtype == jnp.bfloat16
    sums = [e for e in jax.make_jaxpr(pullback)(ones).eqns if e.primitive.name == "reduce_sum"]
    assert [e.invars[0].aval.dtype for e in sums] == [jnp.float32]


@pytest.mark.parametrize("case", EVEN + ODD)
def test_it_lowers_to_cudnns_kernels_forward_and_backward(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # jax asks the machine for a GPU and cuDNN before it lowers; this one stands for an H100's.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_compute_capability", lambda wanted: float(wanted) <= 9
    )
    half = tuple(x.astype(jnp.bfloat16) for x in case.arrays)

    def run(*arrays: jax.Array) -> object:
        return case._replace(arrays=arrays).run(Backend("cudnn"))

    lowered = jax.jit(run).trace(*half).lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"@__cudnn\$fmha(\w+)", lowered))
    forward = {name for name in calls if not name.endswith("Backward")}
    assert forward and calls == forward | {f"{name}Backward" for name in forward}
    assert "bf16" in lowered and "dot_general" not in lowered, "XLA has a part in it"


@pytest.mark.parametrize("case", EVEN + ODD)
def test_cudnn_is_xlas_attention_but_for_the_rounding_of_bfloat16(case: Case) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN is on GPUs: run with JAX_PLATFORMS=cuda")
    half = case._replace(arrays=tuple(x.astype(jnp.bfloat16) for x in case.arrays))
    _, expected, expected_gradients = case.run(XLA)
    out, read, gradients = half.run(Backend("cudnn"))
    assert out.dtype == jnp.bfloat16 and bool(jnp.isfinite(out).all())
    for ours, theirs in zip((read, *gradients), (expected, *expected_gradients), strict=True):
        difference = np.linalg.norm(np.asarray(ours, np.float32) - np.asarray(theirs))
        assert difference <= 0.02 * np.linalg.norm(np.asarray(theirs))
