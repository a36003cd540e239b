"""How fast and how large: measured on this machine, beside mlx-lm in the same run."""
