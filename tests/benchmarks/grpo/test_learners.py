"""What other trainers are given is what the workload says; none is installed here."""

from __future__ import annotations

import time

from benchmarks.grpo import learners
from benchmarks.grpo.workload import WORKLOADS

TEXT = WORKLOADS["text-512"]


def test_a_prompt_is_as_many_tokens_as_ours_and_none_is_special() -> None:
    first, second = learners.texts(TEXT, 2)
    tokenizer = learners.words(TEXT.vocab)
    ids = tokenizer.encode(first)
    assert len(ids) == len(TEXT.prompt(0).tokens) == 512 and first != second
    assert min(ids) > max(tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == first


def test_a_step_lasts_from_one_call_of_the_reward_function_to_the_next() -> None:
    steps = learners.Steps()
    assert steps(["p"] * 4, ["a"] * 4) == [0.0, 1.0, 0.0, 1.0] and not steps.measured
    time.sleep(0.05)
    steps(["p"] * 4, ["a"] * 4, metadata="is ignored")
    [step] = steps.measured
    assert 0.05 <= step["step"] < 5 and step["gib"] > 0
