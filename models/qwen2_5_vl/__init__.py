"""Qwen2.5-VL in Flax NNX: config, processor, vision tower, decoder, weights."""
