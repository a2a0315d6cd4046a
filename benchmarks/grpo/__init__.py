"""What a GRPO step on video costs, here and in PyTorch: see `benchmarks.grpo_step`."""
