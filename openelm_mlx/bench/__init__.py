"""Measurements of speed and memory on this machine, and of mlx-lm's in the same run."""
