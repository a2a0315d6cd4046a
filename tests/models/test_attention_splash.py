"""Splash attention, interpreted on the CPU, against XLA's attention: values and all gradients."""

from __future__ import annotations

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from models import attention_splash
from models.attention_backend import Backend
from models.attention_splash import executed_pairs, packed
from tests.models.attention_cases import Case, Heads, assert_as_xla, frames, groups, prompts

SPLASH = Backend("splash", emulated=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 tokens, so that short sequences have several."""
    monkeypatch.setattr(attention_splash, "_BLOCK", 128)


@pytest.mark.parametrize(
    "case",
    [
        prompts(Heads(8, 2, 16), lengths=(200, 1, 130), tokens=200),
        groups(Heads(8, 2, 16), lengths=(150, 3), tokens=150, group=3, completion=30),
        groups(Heads(28, 4, 8), lengths=(90,), tokens=128, group=2, completion=128),
        frames(Heads(2, 2, 80), (((60, 40), (50, 4, 60)), ((140,), ())), slots=140),
    ],
    ids=["prompts", "ragged groups", "whole blocks", "frames"],
)
def test_it_is_xlas_attention(case: Case) -> None:
    assert_as_xla(case, SPLASH)


def test_the_mask_of_a_group_is_as_in_the_docstring() -> None:
    mask = packed(prompt=2, completion=1)(4)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    np.testing.assert_array_equal(mask[:, :], np.array(expected, bool))
    np.testing.assert_array_equal(mask[2:4, 1:3], np.array(expected, bool)[2:4, 1:3])


def test_a_block_of_the_mask_is_made_alone() -> None:
    """A prompt of 16k tokens has 300 million pairs; nobody asks for all of them."""
    mask = packed(prompt=16_384, completion=512)(16_384 + 8 * 512)
    assert isinstance(mask, splash.Mask) and mask.shape == (20_480, 20_480)
    assert mask[16_384:16_896, :512].all() and not mask[16_896:17_408, 16_384:16_896].any()


def test_blocks_that_nobody_reads_are_skipped() -> None:
    """Of 4 blocks of prompt 10, of 3 completions' blocks 4 and their own each."""
    assert executed_pairs(attention_splash.causal, 4 * 128) == 10 * 128**2
    assert executed_pairs(packed(512, 128), 7 * 128) == (10 + 3 * 5) * 128**2
    assert executed_pairs(attention_splash.full, 129) == 4 * 128**2


@pytest.mark.parametrize(
    ("length", "block", "padded"),
    [(1, 128, 128), (128, 128, 128), (512, 512, 512), (720, 384, 768), (4608, 512, 4608)],
)
def test_sequences_are_padded_to_few_blocks(
    monkeypatch: pytest.MonkeyPatch, length: int, block: int, padded: int
) -> None:
    monkeypatch.setattr(attention_splash, "_BLOCK", 512)
    assert attention_splash._blocks(length) == (block, padded)
