"""The `lora` section, and what it says together with other keys."""

from __future__ import annotations

import pytest

from jaxgrpo.config import Config, ConfigError, from_dict
from models.low_rank import Lora


def config(model: dict[str, object], **lora: object) -> Config:
    return from_dict(
        {
            "run_dir": "run",
            "model": {"path": "model"} | model,
            "data": {"train": "train.jsonl"},
            "lora": lora,
        }
    )


def test_by_default_nothing_has_adapters() -> None:
    plain = config({})
    assert plain.lora.adapters.rank == 0
    assert not plain.vision_frozen and not plain.base_needed


def test_adapters_of_the_decoder_freeze_the_vision_tower() -> None:
    text = config({}, rank=8)
    assert text.lora.adapters == Lora(8, 32.0, ("text.attention", "text.mlp"))
    assert text.vision_frozen and text.base_needed
    both = config({}, rank=8, targets=["text.mlp", "vision.attention"])
    assert not both.vision_frozen and both.base_needed


@pytest.mark.parametrize(
    ("model", "lora", "named"),
    [
        ({}, {"rank": -1}, "lora.rank"),
        ({}, {"rank": 4, "alpha": 0.0}, "lora.alpha"),
        ({}, {"rank": 4, "targets": []}, "lora.targets"),
        ({}, {"rank": 4, "targets": ["text.mlp", "text.mlp"]}, "lora.targets"),
        ({}, {"rank": 4, "targets": ["text.head"]}, "lora.targets"),
        ({"freeze_vision": True}, {"rank": 4, "targets": ["vision.mlp"]}, "lora.targets"),
        ({"init": "random"}, {"rank": 4}, "lora.rank"),
    ],
)
def test_mistakes_are_named(model: dict[str, object], lora: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(model, **lora)
