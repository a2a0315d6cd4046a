"""Looking for scores of a prompt over itself in a program's text."""

from __future__ import annotations

import pytest

from benchmarks.long_prompts import quadratic


@pytest.mark.parametrize(
    ("shape", "large"),
    [
        ("f32[2,600,700]", True),
        ("s8[600,600]", True),
        ("pred[600,1,600]", True),
        ("f8e4m3fn[4,600,600]", True),
        ("u8[360000]", True),  # flattened
        ("bf16[2,600,64]", False),
        ("f32[700]", False),
        ("f32[]", False),
    ],
)
def test_what_is_as_large_as_a_prompt_squared_is_found(shape: str, large: bool) -> None:
    text = f"  %fusion.1 = {shape}{{1,0}} fusion(%p), kind=kLoop"
    assert quadratic(text, 600) == ({shape} if large else set())
