"""One token after the other: how the next one is chosen."""
