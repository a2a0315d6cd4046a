"""The other side of every numerical comparison: code that is not ours."""
