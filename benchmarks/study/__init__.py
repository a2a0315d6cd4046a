"""What the method is worth, on work that fits a laptop: docs/study.md."""
